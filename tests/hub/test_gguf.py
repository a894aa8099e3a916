"""A GGUF export, opened again by transformers' own GGUF loading where mtp is not importable."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import run_alone
from test_export import SUMMARY, make, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toy import HEAD, PHASES, SIZES, TEMPLATE, THINK
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from mtp.hub.build import ModelConfig, build_model
from mtp.hub.export import export
from mtp.modeling.heads import HeadConfig
from mtp.rollouts.rollout import DecodingConfig

pytest.importorskip("gguf")

READ = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
out = {out!r}
tokenizer = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
model = AutoModelForCausalLM.from_pretrained(
    out, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype="float32"
)
chat = [{{"role": "user", "content": "what is 12+34="}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
text = tokenizer.decode(tokenizer.encode("46</think>46"), skip_special_tokens=True)
with torch.no_grad():
    logits = model(torch.tensor([prompt])).logits[0]
print(json.dumps([type(model).__name__, prompt, text, logits.tolist()]))
"""


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose pre-tokenizer is GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["what is 12+34= the sum of these numbers is 46"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen3", True)])
def test_the_file_opens_with_mains_logits_prompts_and_delimiters(tmp_path, kind, tied, precision):
    tokenizer = gpt2_tokenizer()
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    # transformers reads no head's width from a GGUF file of Qwen3: it takes Qwen3's own.
    sizes["head_dim"] = {"llama": 8, "qwen3": 128}[kind]
    sizes["eos_token_id"] = tokenizer.eos_token_id
    cls, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3, Qwen3Config)}[kind]
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e4}
    cls(config(**sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = tiny_config()
    run.fabric.precision = precision
    decoding = DecodingConfig(phases=PHASES, system_prompt="Think, then answer.")
    model, text = build_model(
        ModelConfig(source=str(tmp_path / "base"), add_tokens=THINK),
        HeadConfig(**HEAD),
        decoding,
        SimpleNamespace(name="none"),
    )
    export(model, text, tmp_path / "out", SUMMARY, run, "gguf")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    cache = tmp_path / "cache"
    cache.mkdir()
    printed = run_alone(READ.format(out=str(tmp_path / "out")), cache).splitlines()[-1]
    name, prompt, said, logits = json.loads(printed)
    assert name == cls.__name__
    assert prompt == text.prompt_ids("what is 12+34=")
    assert said == "46</think>46"
    for parameter in model.parameters() if precision != "32-true" else ():
        parameter.data = parameter.to(torch.bfloat16).float()
    expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(torch.tensor(logits), expected, atol=2e-5, rtol=1e-4)
    export(model, text, tmp_path / "out", SUMMARY, run)  # replaces it


def test_a_tokenizer_that_llama_cpp_cannot_have_is_one_sentence(tmp_path):
    model, text = make(tmp_path / "out")
    with pytest.raises(ValueError, match="must have a byte-level BPE tokenizer"):
        export(model, text, tmp_path / "new", SUMMARY, tiny_config(), "gguf")
    assert not (tmp_path / "new").exists()
