"""An export where other tools open it: what they decode, load and save."""

import base64
import json
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import opens_gguf, run_alone, tiny_model
from safetensors.torch import load_file, save_file
from test_export import PHASES, SUMMARY, make, tiny_config, tiny_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import save_toy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mtp.hub.build import ModelConfig, build_model, generation_config, load_model
from mtp.hub.export import export, push
from mtp.hub.formats.gguf import pre_tokenizer
from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import LlamaMTPForCausalLM
from mtp.modeling.saving import HEAD_FILE, INDEX
from mtp.rollouts.new_tokenizers import PLAIN_TEMPLATE
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.rollout import DecodingConfig
from mtp.rollouts.tokenization import add_delimiters
from mtp.tasks.running_sum import RunningSumConfig

IDS = torch.tensor([[2, 5, 6, 7, 8]])


def test_a_tool_that_skips_special_tokens_shows_where_the_answer_begins(tmp_path):
    _, text = make(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = text.prompt_ids("1+2=") + text.completion_ids("1+2=3", "3")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+2=<think>1+2=3</think>3"


def test_delimiters_that_were_special_tokens_are_none_in_a_new_export(tmp_path):
    """Runs of earlier versions have them among the special tokens; they open, and export as new."""
    model, text = tiny_model(), tiny_text()
    text.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for token in ("<think>", "</think>"):
        assert token in text.tokenizer.all_special_tokens
    model.generation_config = generation_config(text, PHASES)
    export(model, text, tmp_path / "out", SUMMARY, tiny_config())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.all_special_tokens) == {"<pad>", "<eos>"}
    ids = text.completion_ids("1+2=3", "3")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+2=3</think>3"
    assert tokenizer.encode("1</think>3") == text.tokenizer.encode("1</think>3")


def test_mains_files_hold_main_alone_and_the_heads_file_the_rest(tmp_path):
    model, _ = make(tmp_path / "out", tied=True)
    main, head = (load_file(tmp_path / "out" / f) for f in ("model.safetensors", HEAD_FILE))
    assert all(name.startswith("mtp_head.") for name in head)
    assert not any(name.startswith("mtp_head.") for name in main)
    saved = {**main, **head}
    for name, weight in model.named_parameters():
        assert torch.equal(saved[name], weight), name
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert index == dict.fromkeys(main, "model.safetensors") | dict.fromkeys(head, HEAD_FILE)


def test_shards_open_with_the_head_and_without(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    opened = LlamaMTPForCausalLM.from_pretrained(tmp_path)
    state = opened.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))


def test_a_checkpoint_with_the_head_among_mains_weights_opens(tmp_path):
    """The layout of earlier versions."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    both = {**load_file(tmp_path / "model.safetensors"), **load_file(tmp_path / HEAD_FILE)}
    save_file(both, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / HEAD_FILE).unlink()
    (tmp_path / INDEX).unlink()
    state = LlamaMTPForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())


def test_a_head_that_is_missing_is_refused_not_initialised(tmp_path):
    make(tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    message = "must hold the head's weights, but mtp_head.* is missing"
    with pytest.raises(ValueError, match=message):
        LlamaMTPForCausalLM.from_pretrained(tmp_path / "out")
    LlamaMTPForCausalLM.from_pretrained(tmp_path / "out", new_head=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_weight_of_main_that_is_missing_is_refused_not_initialised(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    for new_head in (False, True):
        with pytest.raises(ValueError, match="hold main's weights, but model.layers.1.mlp.down_p"):
            type(model).from_pretrained(tmp_path, new_head=new_head)


def test_a_variant_is_refused_because_main_would_not_be_found(tmp_path):
    with pytest.raises(ValueError, match="variant must be left out of save_pretrained, got 'fp16'"):
        tiny_model().save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.iterdir())


def test_each_loading_path_saves_a_folder_that_opens_as_it_was_opened(tmp_path):
    """Trusted: main, head and code. Stock: main, whose head is not found rather than made up."""
    model, _ = make(tmp_path / "out")
    expected = model.generate(IDS, mtp_mode="fast", max_new_tokens=12).tolist()
    script = f"""
import json, torch
from transformers import AutoModelForCausalLM
out = {str(tmp_path)!r} + "/"
ids = torch.tensor({IDS.tolist()})
AutoModelForCausalLM.from_pretrained(out + "out", trust_remote_code=True).save_pretrained(
    out + "trusted"
)
AutoModelForCausalLM.from_pretrained(out + "out").save_pretrained(out + "stock")
got = {{}}
for name in ("trusted", "stock"):
    stock = AutoModelForCausalLM.from_pretrained(out + name)
    got[name] = stock.generate(ids, max_new_tokens=12, do_sample=False).tolist()
trusted = AutoModelForCausalLM.from_pretrained(out + "trusted", trust_remote_code=True)
got["fast"] = trusted.generate(ids, mtp_mode="fast", max_new_tokens=12).tolist()
try:
    AutoModelForCausalLM.from_pretrained(out + "stock", trust_remote_code=True)
except OSError as error:
    got["error"] = str(error)
print(json.dumps(got))
"""
    cache = tmp_path / "cache"
    cache.mkdir()
    got = json.loads(run_alone(script, cache).splitlines()[-1])
    assert got["fast"] == expected
    slow = model.generate(IDS, max_new_tokens=12, do_sample=False).tolist()
    assert got["trusted"] == got["stock"] == slow
    assert "modeling_mtp.py" in got["error"]
    for name in ("trusted", "stock"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
    assert load_model(tmp_path / "out")[0].mtp_settings == model.mtp_settings


def test_a_default_mode_is_that_of_every_tool_that_names_none(tmp_path):
    model, text = tiny_model(), tiny_text()
    model.generation_config = generation_config(text, PHASES)
    export(model, text, tmp_path / "out", SUMMARY, tiny_config(), default_mode="fast")
    opened = LlamaMTPForCausalLM.from_pretrained(tmp_path / "out")
    fast = model.generate(IDS, mtp_mode="fast", max_new_tokens=12)
    assert torch.equal(opened.generate(IDS), fast)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    slow = model.generate(IDS, max_new_tokens=12)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Without `mtp_mode`, `generate` writes in `fast` mode" in card
    assert getattr(model.generation_config, "mtp_mode", None) is None
    assert torch.equal(opened.generate(IDS, mtp_mode="stock"), slow)
    assert torch.equal(stock.generate(IDS), slow)
    assert not torch.equal(fast, slow)


@pytest.mark.parametrize(
    ("mode", "format", "message"),
    [
        ("quick", "huggingface", "--default-mode must be one of fast, slow, verified, got 'quick'"),
        ("fast", "main", "--default-mode must be left out with --format main"),
    ],
)
def test_a_default_mode_that_nothing_has_is_refused(tmp_path, mode, format, message):
    model, text = tiny_model(), tiny_text()
    model.generation_config = generation_config(text, PHASES)
    with pytest.raises(ValueError, match=message):
        export(model, text, tmp_path / "out", SUMMARY, tiny_config(), format, mode)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["huggingface", "main"])
def test_a_run_of_mixed_precision_is_written_in_its_dtype(tmp_path, format):
    model, text, config = tiny_model(), tiny_text(), tiny_config()
    model.generation_config = generation_config(text, PHASES)
    config.fabric.precision = "bf16-mixed"
    export(model, text, tmp_path / "out", SUMMARY, config, format)
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert {w.dtype for w in load_file(file).values()} == {torch.bfloat16}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.dtype == torch.bfloat16
    expected = model.lm_head.weight.to(torch.bfloat16)
    assert torch.equal(opened.lm_head.weight, expected)
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("template", [True, False])
def test_the_template_gives_the_prompts_of_training(tmp_path, template):
    decoding = DecodingConfig(
        phases=PHASES, system_prompt="Add." if template else None, chat_template=template
    )
    model, text = build_model(
        ModelConfig(source=str(save_toy(tmp_path / "base")), add_tokens=["<think>", "</think>"]),
        HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24),
        decoding,
        RunningSumConfig().build(),
    )
    export(model, text, tmp_path / "out", SUMMARY, tiny_config())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    given = {"add_generation_prompt": True, "return_dict": False}
    user = {"role": "user", "content": "a b"}
    assert tokenizer.apply_chat_template([user], **given) == text.prompt_ids("a b")
    if template:
        other = [{"role": "system", "content": "b"}, user]
        plain = text.tokenizer.apply_chat_template(other, **given)
        assert tokenizer.apply_chat_template(other, **given)[: len(plain)] == plain
    _, opened = load_model(tmp_path / "out")
    assert opened.prompt_ids("a b") == text.prompt_ids("a b")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not {"name_or_path", "is_local", "local_files_only"} & set(config)
    assert str(tmp_path) not in json.dumps(config)


@opens_gguf
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gguf_opens_with_mains_logits_and_the_same_text(tmp_path, family, tied, precision):
    model, text = tiny_model(family, tied=tied), gguf_text()
    config = tiny_config()
    config.fabric.precision = precision
    model.generation_config = generation_config(text, PHASES)
    export(model, text, tmp_path / "out", SUMMARY, config, "gguf")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    # transformers does not read Qwen3's head_dim from GGUF; that of the released models is its own.
    opened = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32, head_dim=8
    )
    with torch.no_grad():
        expected, got = model(IDS).logits, opened(IDS).logits
    close = {} if precision == "32-true" else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(got, expected, **close)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    ids = text.prompt_ids("1+2=") + text.completion_ids("1+2=3", "3")
    assert tokenizer.encode("1+2=<think>1+2=3</think>3<eos>", add_special_tokens=False) == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+2=<think>1+2=3</think>3"
    message = [{"role": "user", "content": "1+2="}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert prompt == text.prompt_ids("1+2=")


def gguf_text():
    """A byte-level BPE tokenizer of 20 tokens, as SmolLM's."""
    letters = "0123456789+=;"
    tokens = ["<pad>", "<eos>", "<think>", "</think>", *letters, "+=", "=;"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("+", "="), ("=", ";")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    add_delimiters(tokenizer, ["<think>", "</think>"])
    tokenizer.chat_template = PLAIN_TEMPLATE
    return PromptFormat(tokenizer, PHASES, 4)


@pytest.mark.parametrize(
    ("numbers", "letters", "name"),
    [
        (r"\p{N}{1,3}", r"\p{L}+", "llama-bpe"),
        (r"\p{N}", r"\p{L}+", "qwen2"),
        (r"\p{N}", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+", None),
        (r"\p{N}{1,3}", r"[\p{L}\p{M}]+", None),
    ],
)
def test_gguf_names_a_pre_tokenizer_only_by_its_whole_pattern(numbers, letters, name):
    """Patterns of Llama 3 and Qwen 2; the third is of the kind of Mistral's tekken."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    core = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}}
    if name is None:
        with pytest.raises(ValueError, match="GPT-2, SmolLM, Llama 3 or Qwen 2, got"):
            pre_tokenizer(core)
    else:
        assert pre_tokenizer(core) == name


def test_gguf_refuses_what_it_has_no_place_for(tmp_path):
    model, text = tiny_model(), tiny_text()
    model.generation_config = generation_config(text, PHASES)
    with pytest.raises(ValueError, match="must be given a byte-level BPE tokenizer, got WordLevel"):
        export(model, text, tmp_path / "out", SUMMARY, tiny_config(), "gguf")
    assert not (tmp_path / "out").exists()


SLIDES = {"sliding_window": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is silu, got gelu; "),
        ("mistral", {"sliding_window": 255}, "max_position_embeddings of 256, got 255; "),
        ("mistral", {"sliding_window": 256}, None),
        ("qwen3", SLIDES, "sliding_window is null .* got 8; lower max_position_embeddings"),
        ("qwen3", SLIDES | {"layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_gguf_refuses_a_main_that_it_would_compute_otherwise(tmp_path, family, settings, message):
    model, text = tiny_model(family), gguf_text()
    model.generation_config = generation_config(text, PHASES)
    for name, value in settings.items():
        setattr(model.config, name, value)
    refused = nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with refused:
        export(model, text, tmp_path / "out", SUMMARY, tiny_config(), "gguf")
    assert (tmp_path / "out").exists() == (message is None)


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hugging Face Hub that an upload of small files asks for."""

    files: dict[str, bytes] = {}
    deleted: list[str] = []

    def do_GET(self):
        old = {"type": "file", "path": "stale.py", "size": 1, "oid": "0" * 40}
        self.answer([old] if "/tree/" in self.path else {"id": "me/adder", "sha": "0" * 40})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": self.address(), "id": "me/adder"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            ways = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": ways})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    Hub.files[line["value"]["path"]] = content
                elif line["key"] == "deletedFile":
                    Hub.deleted.append(line["value"]["path"])
            self.answer({"commitUrl": f"{self.address()}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"errors": [], "warnings": []})

    def address(self):
        return "http://{}:{}/me/adder".format(*self.server.server_address)

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *rest):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_export_is_uploaded_as_it_is(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # `hub` is local
    make(tmp_path / "out")
    done = push(tmp_path / "out", "me/adder", endpoint=hub, token="hf_none")
    assert done == f"{hub}/me/adder/commit/1"
    here = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert Hub.files == here
    assert HEAD_FILE in here
    assert Hub.deleted == ["stale.py"]


def test_an_upload_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    make(tmp_path / "out")
    with pytest.raises(ValueError, match="--push me/adder failed: .*hf auth login"):
        push(tmp_path / "out", "me/adder", endpoint="http://127.0.0.1:9", token="hf_none")
