"""Upload of an export to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .pretrained import blame


def check_repository(repo_id: str) -> None:
    """Raises ValueError unless `repo_id` names a repository, as USER/NAME does."""
    try:
        validate_repo_id(repo_id)
        is_whole = "/" in repo_id
    except HFValidationError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"--push must be a repository of the hub, USER/NAME, got {repo_id!r}")


def push(folder: Path, repo_id: str) -> str:
    """Upload an export's folder as one commit; a missing repository is made. Returns its address.

    License and base model are in the folder's README.md. Raises ValueError naming the repository if
    the upload fails; the folder is complete in any case.
    """
    check_repository(repo_id)
    api = HfApi(library_name="mtp-eavesdrop")
    remedy = "log in with `hf auth login` to an account that may write there; the folder is written"
    with blame(f"--push could not upload {folder} to {repo_id}", remedy):
        address = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Export of mtp-eavesdrop"
        )
    return str(address)
