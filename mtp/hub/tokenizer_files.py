"""Files of a tokenizer as a checkpoint holds them.

Delimiters of phases are not special tokens in them, whatever they were before: text decoded with
`skip_special_tokens=True` keeps `</think>` between thought and answer. Settings of the machine that
opened the tokenizer are left out.
"""

import json
from pathlib import Path
from typing import Any

from ..rollouts.prompt_format import PromptFormat

OF_A_MACHINE = ("is_local", "local_files_only", "gguf_file", "cache_dir", "token", "force_download")
"""Arguments of `from_pretrained` that transformers writes into `tokenizer_config.json`."""


def save_tokenizer(fmt: PromptFormat, folder: Path) -> None:
    """Write the tokenizer's files into a folder."""
    fmt.tokenizer.save_pretrained(folder)
    delimiters = set(fmt.delimiters)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            edited = _edited(content, delimiters)
            if edited != content:
                text = json.dumps(edited, indent=2, ensure_ascii=False)
                path.write_text(text + "\n", encoding="utf-8")


def _edited(content: dict[str, Any], delimiters: set[str]) -> dict[str, Any]:
    """The content of one of the files, with delimiters that are not special."""
    content = {key: value for key, value in content.items() if key not in OF_A_MACHINE}
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(content.get(key), list):
            content[key] = [token for token in content[key] if _text(token) not in delimiters]
            if not content[key]:
                del content[key]
    if "added_tokens" in content:
        content["added_tokens"] = [_plain(t, delimiters) for t in content["added_tokens"]]
    if "added_tokens_decoder" in content:
        added = content["added_tokens_decoder"].items()
        content["added_tokens_decoder"] = {i: _plain(token, delimiters) for i, token in added}
    return content


def _text(token: Any) -> Any:
    """Text of a special token, which is a string or an object with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _plain(token: dict[str, Any], delimiters: set[str]) -> dict[str, Any]:
    """An added token; one that is a delimiter is not special."""
    return {**token, "special": False} if token["content"] in delimiters else token
