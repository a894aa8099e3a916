"""Tokens that are added to a pretrained model, and matrices that have a row for each."""

import pytest
import torch
from toy import THINK, build_toy, save_toy, toy_tokenizer

from mtp.hub.build import load_model, save_model

IDS = len(toy_tokenizer())
OWN = {"shared_embeddings": False}


def matrices(model) -> dict[str, torch.Tensor]:
    """Matrices with a row for each token."""
    names = ("embed_tokens.weight", "lm_head.weight")
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith(names)}


@pytest.mark.parametrize("type", ["eavesdrop", "parallel"])
def test_a_heads_own_matrices_grow_with_mains(tmp_path, type):
    folder = save_toy(tmp_path / "base")
    torch.manual_seed(1)
    model, text = build_toy(folder, head={**OWN, "type": type})
    assert len(text.tokenizer) == IDS + 2
    found = matrices(model)
    own = {"mtp_head.lm_head.weight"} | (
        {"mtp_head.embed_tokens.weight"} if type == "eavesdrop" else set()
    )
    assert set(found) == {"model.embed_tokens.weight", "lm_head.weight"} | own
    assert all(len(matrix) == IDS + 2 for matrix in found.values())
    assert model.mtp_head.lm_head.out_features == model.config.vocab_size == IDS + 2
    # transformers draws new rows close to the mean of the old ones.
    for matrix in found.values():
        assert torch.allclose(matrix[IDS:], matrix[:IDS].mean(0).expand(2, -1), atol=1e-3)
    save_model(model, text, tmp_path / "saved")
    opened, _ = load_model(tmp_path / "saved")
    saved = dict(opened.named_parameters())
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())


def test_old_rows_stay_as_they_are_whoever_resizes(tmp_path):
    model, _ = build_toy(save_toy(tmp_path), head=OWN)
    before = {name: matrix.clone() for name, matrix in matrices(model).items()}
    kind = type(model.mtp_head.lm_head)
    model.mtp_head.lm_head.weight.requires_grad_(False)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    rows = -(-(IDS + 2) // 64) * 64
    for name, matrix in matrices(model).items():
        assert len(matrix) == rows, name
        assert torch.equal(matrix[: IDS + 2], before[name]), name
    assert type(model.mtp_head.lm_head) is kind
    assert not model.mtp_head.lm_head.weight.requires_grad
    model.resize_token_embeddings(IDS)
    assert all(torch.equal(m, before[name][:IDS]) for name, m in matrices(model).items())


def test_padded_rows_are_used_before_new_ones_are_made(tmp_path):
    folder = save_toy(tmp_path, rows=5)
    model, text = build_toy(folder, head=OWN)
    assert all(len(matrix) == IDS + 5 for matrix in matrices(model).values())
    assert [text.delimiter_id(token) for token in THINK] == [IDS, IDS + 1]


def test_tokens_are_added_to_a_checkpoint_that_has_a_head(tmp_path):
    first, text = build_toy(save_toy(tmp_path / "base"), head=OWN)
    save_model(first, text, tmp_path / "saved")
    torch.manual_seed(2)
    second, text = build_toy(tmp_path / "saved", head=OWN, add_tokens=[*THINK, "<note>"])
    assert len(text.tokenizer) == IDS + 3
    before, after = matrices(first), matrices(second)
    assert before.keys() == after.keys()
    for name, matrix in after.items():
        assert torch.equal(matrix[: IDS + 2], before[name]), name
        assert len(matrix) == IDS + 3, name
    save_model(second, text, tmp_path / "again")
    assert load_model(tmp_path / "again")[0].mtp_head.lm_head.out_features == IDS + 3


def test_added_delimiters_are_shown_where_special_tokens_are_skipped(tmp_path):
    _, text = build_toy(save_toy(tmp_path))
    assert set(text.tokenizer.all_special_tokens) == {"<|im_start|>", "<|im_end|>"}
    ids = text.prompt_ids("a") + text.completion_ids("a", "a")
    shown = text.tokenizer.decode(ids, skip_special_tokens=True)
    assert shown.endswith("<think>a</think>a")


def test_a_tokenizer_beyond_the_matrix_is_refused_and_add_tokens_makes_the_rows(tmp_path):
    folder = save_toy(tmp_path)
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<note>", *THINK])
    tokenizer.save_pretrained(folder)
    message = rf"at most {IDS} ids, .* got {IDS + 3} \(beyond them: </think>, <note>, <think>\)"
    with pytest.raises(ValueError, match=message):
        build_toy(folder)
    model, _ = build_toy(folder, add_tokens=["<note>", *THINK])
    assert model.get_input_embeddings().num_embeddings == IDS + 3
