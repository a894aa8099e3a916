"""Fine-tuning with tools that know nothing of the head: `forward(labels)`, and adapters of PEFT."""

import pytest
import torch
from helpers import HEADS, PAD, tiny_model
from test_export import make
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from mtp.modeling.modeling_mtp import LlamaMTPForCausalLM

IDS = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 4, 4, PAD, PAD]])
MASK = (IDS != PAD).long()
LABELS = torch.where(IDS == PAD, -100, IDS)


def by_definition(model, labels):
    """Mean over anchors and slots of -log p of the head, one anchor at a time, without tokens that
    it cannot write.
    """
    losses = []
    hidden, taps = model.main_hidden(IDS, attention_mask=MASK)
    _, output = model.output_layers()
    for row in range(len(IDS)):
        for anchor in range(IDS.shape[1] - 2):
            block = IDS[row, anchor + 1 : anchor + 1 + model.block_size]
            wanted = labels[row, anchor + 2 : anchor + 1 + model.block_size]
            padded = F.pad(block, (0, model.block_size - len(block)))[None, :-1]
            context = model.head_context(
                taps[row : row + 1], IDS[row : row + 1], torch.tensor([anchor])
            )
            rows = model.mtp_head(context, model.head_embed(padded))[0]
            logits = output.logits(rows)[: len(wanted)].float()
            each = F.cross_entropy(logits, wanted, reduction="none", ignore_index=-100)
            scored = (wanted != -100) & each.isfinite()
            losses += each[scored].unbind()
    return torch.stack(losses).mean()


@pytest.mark.parametrize("head", HEADS)
def test_the_heads_loss_is_that_of_its_definition(head):
    model = tiny_model(type=head)
    stock = LlamaForCausalLM.forward(model, IDS, attention_mask=MASK, labels=LABELS).loss
    given = {"attention_mask": MASK, "labels": LABELS}
    assert model(IDS, **given).loss == stock
    model.config.mtp_loss_weight = 0.5
    out = model(IDS, **given)
    torch.testing.assert_close(out.loss, stock + 0.5 * by_definition(model, LABELS))
    assert out.hidden_states is None
    partly = LABELS.clone()
    partly[:, :4] = -100
    stock = LlamaForCausalLM.forward(model, IDS, attention_mask=MASK, labels=partly).loss
    expected = stock + 0.5 * by_definition(model, partly)
    torch.testing.assert_close(model(IDS, attention_mask=MASK, labels=partly).loss, expected)
    counted = model(IDS, num_items_in_batch=torch.tensor(40), **given).loss
    labels = (LABELS[:, 1:] != -100).sum()
    torch.testing.assert_close(counted, out.loss * labels / 40)


def test_off_the_head_gets_no_gradient_and_on_it_learns():
    model = tiny_model().train()
    model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    assert all(p.grad is None for p in model.mtp_head.parameters())
    model.config.mtp_loss_weight = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.mtp_head.parameters())
    assert model.eval()(IDS, attention_mask=MASK, labels=LABELS).loss < 0.5


def test_the_weight_is_saved_with_the_config(tmp_path):
    model = tiny_model()
    model.config.mtp_loss_weight = 0.25
    model.save_pretrained(tmp_path)
    opened = LlamaMTPForCausalLM.from_pretrained(tmp_path)
    given = {"attention_mask": MASK, "labels": LABELS}
    torch.testing.assert_close(opened(IDS, **given).loss, model(IDS, **given).loss)


def test_a_head_that_remembers_refuses_padding_on_the_left():
    model = tiny_model(type="eavesdrop that recalls")
    model.config.mtp_loss_weight = 1.0
    with pytest.raises(ValueError, match="needs texts padded on the right"):
        model(IDS.flip(1), attention_mask=MASK.flip(1), labels=LABELS.flip(1))


MAIN = r"model\.layers\..*_proj"
HEAD = r"mtp_head\..*(_proj|proj)"
TARGETS = {"main": MAIN, "head": HEAD, "both": f"({MAIN})|({HEAD})"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("part", TARGETS)
def test_adapters_of_peft_train_merge_and_open_again(tmp_path, part):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    make(tmp_path / "out")
    model = LlamaMTPForCausalLM.from_pretrained(tmp_path / "out")
    before = {n: w.clone() for n, w in model.state_dict().items()}
    model.config.mtp_loss_weight = 1.0
    config = peft.LoraConfig(target_modules=TARGETS[part], r=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).train()
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    in_head = ["mtp_head." in name for name in names]
    assert {"main": not any(in_head), "head": all(in_head)}.get(part, 0 < sum(in_head) < len(names))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(8):
        optimizer.zero_grad()
        adapted(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        optimizer.step()
    adapted.eval()
    given = {"input_ids": IDS[:1], "max_new_tokens": 12, "return_dict_in_generate": True}
    expected = {mode: adapted.generate(**given, mtp_mode=mode) for mode in ("fast", "slow")}
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        LlamaMTPForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "adapter"
    )
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    opened = LlamaMTPForCausalLM.from_pretrained(tmp_path / "merged")
    for mode, out in expected.items():
        for other in (again, merged, opened):
            got = other.generate(**given, mtp_mode=mode)
            torch.testing.assert_close(got.logprobs, out.logprobs, atol=1e-4, rtol=1e-4)
            assert torch.equal(got.sequences, out.sequences)
    moved = {n for n, w in opened.state_dict().items() if not torch.equal(w, before[n])}
    assert {name.startswith("mtp_head.") for name in moved} == {
        "main": {False}, "head": {True}, "both": {False, True}
    }[part]  # fmt: skip
