"""Export: the folder opens in both ways and gives the same numbers as before."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import run_alone, tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_imports

from mtp.config import RunConfig
from mtp.hub import model_card
from mtp.hub.build import ModelConfig, generation_config, load_model
from mtp.hub.export import export
from mtp.hub.model_card import NUM_TRIED, base_model
from mtp.modeling.phases import Phase
from mtp.modeling.segments import SegmentSettings
from mtp.rollouts.new_tokenizers import PLAIN_TEMPLATE, character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.rollout import DecodingConfig
from mtp.tasks.running_sum import RunningSumConfig
from mtp.training.stage import StageConfig

ROOT = Path(__file__).parents[2]
PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}
STAGE = {
    "name": "joint",
    "slow_accuracy": 0.9875,
    "fast_accuracy": 0.5,
    "slow_passes": 24.0,
    "fast_passes": 8.0,
    "fast_tokens_per_pass": 3.125,
    "empty_thought_accuracy": 0.0,
    "wrong_thought_accuracy": None,
    "true_steps": 0.25,
    "reference_nats_per_token": 1.25,
    "num_problems": 512,
    "seconds": 61.0,
}
SUMMARY = {"stages": [STAGE], "seed": 7, "seconds": 61.0, "export": "out"}


def tiny_text(system_prompt: str | None = None) -> PromptFormat:
    """A tokenizer of 18 tokens under the 23 of `tiny_model`."""
    tokenizer = character_tokenizer("0123456789+=;", ["<think>", "</think>"])
    return PromptFormat(tokenizer, PHASES, 4, system_prompt=system_prompt)


def tiny_config() -> RunConfig:
    return RunConfig(
        name="tiny",
        run_dir="runs/tiny",
        task=RunningSumConfig(),
        decoding=DecodingConfig(phases=PHASES, max_new_tokens=12),
        stages={"joint": StageConfig()},
    )


def make(folder: Path, family="llama", *, tied=False, **head):
    """Export a random model to `folder`; returns the model and its text format."""
    model, text = tiny_model(family, tied=tied, **head), tiny_text()
    model.generation_config = generation_config(text, PHASES)
    export(model, text, folder, SUMMARY, tiny_config())
    return model, text


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("head", ["eavesdrop", "parallel"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_stock_door_gives_mains_logits_and_finds_no_head(tmp_path, family, head, shared, tied):
    model, _ = make(tmp_path / "out", family, tied=tied, type=head, shared_embeddings=shared)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock).__module__.startswith("transformers.")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids).logits)
    given = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(stock.generate(ids, **given), model.generate(ids, **given))


def test_mtp_opens_an_export_with_the_very_parameters(tmp_path):
    model, text = make(tmp_path / "out", tied=True)
    opened, opened_text = load_model(tmp_path / "out")
    before, after = dict(model.named_parameters()), dict(opened.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert opened_text.phases == text.phases
    assert opened_text.prompt_ids("1+2=") == text.prompt_ids("1+2=")


def test_the_trusting_door_decodes_the_same_tokens_where_mtp_is_not_importable(tmp_path):
    """Both families, heads and kinds of embeddings, one after the other in one process."""
    ids = torch.tensor([[2, 5, 6, 7, 8], [0, 0, 2, 9, 4]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 20}
    expected, number = {}, 0
    for family in ("llama", "qwen3"):
        for head in ("eavesdrop", "parallel"):
            for same in (True, False):
                name, number = f"{family}-{number}", number + 1
                model, _ = make(
                    tmp_path / name, family, tied=same, type=head, shared_embeddings=same
                )
                expected[name] = {"class": type(model).__name__}
                for mode in ("fast", "slow", "verified"):
                    out = model.generate(**given, mtp_mode=mode, return_dict_in_generate=True)
                    expected[name][mode] = [out.sequences.tolist(), out.passes.tolist()]
                    expected[name][f"{mode}_logprobs"] = out.logprobs.tolist()
                with torch.no_grad():
                    expected[name]["logits"] = model(ids[:1]).logits.tolist()
    cache = tmp_path / "cache"
    cache.mkdir()
    script = f"""
import json, torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
ids = torch.tensor({ids.tolist()})
given = dict(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=20)
got = {{}}
for name in {list(expected)}:
    model = AutoModelForCausalLM.from_pretrained(
        {str(tmp_path)!r} + "/" + name, trust_remote_code=True
    )
    got[name] = {{"class": type(model).__name__}}
    for mode in ("fast", "slow", "verified"):
        out = model.generate(**given, mtp_mode=mode, return_dict_in_generate=True)
        got[name][mode] = [out.sequences.tolist(), out.passes.tolist()]
        got[name][mode + "_logprobs"] = out.logprobs.tolist()
    with torch.no_grad():
        got[name]["logits"] = model(ids[:1]).logits.tolist()
print(json.dumps(got))
"""
    got = json.loads(run_alone(script, cache))
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        exact = {key: values[key] for key in ("class", "fast", "slow", "verified")}
        assert {key: got[name][key] for key in exact} == exact
        assert values["fast"] != values["slow"]
        for key in ("logits", "fast_logprobs", "slow_logprobs"):
            torch.testing.assert_close(torch.tensor(got[name][key]), torch.tensor(values[key]))


def test_the_modeling_file_itself_imports_every_file_of_the_export(tmp_path):
    """transformers before 5.8 copies the files that it imports, and none that those import."""
    make(tmp_path / "out")
    files = {path.stem for path in (tmp_path / "out").glob("*.py")} - {"modeling_mtp"}
    assert set(get_relative_imports(tmp_path / "out" / "modeling_mtp.py")) == files
    assert {"decode_state", "versions"} <= files


def test_the_trusting_door_searches_as_here_where_mtp_is_not_importable(tmp_path):
    model, _ = make(tmp_path / "out")
    ids = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 4, 5, 5]])
    expected = {}
    for method in ("best_of_n", "beam", "mcts"):
        out = model.search(
            ids, config={"method": method, "n": 3}, do_sample=True, top_k=0, max_new_tokens=12,
            generator=torch.Generator().manual_seed(4),
        )  # fmt: skip
        expected[method] = [out.sequences.tolist(), out.passes.tolist(), len(out.texts[0])]
    script = f"""
import json, torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
got = {{}}
for method in {list(expected)}:
    out = model.search(
        torch.tensor({ids.tolist()}), config=dict(method=method, n=3), do_sample=True, top_k=0,
        max_new_tokens=12, generator=torch.Generator().manual_seed(4),
    )
    got[method] = [out.sequences.tolist(), out.passes.tolist(), len(out.texts[0])]
print(json.dumps(got))
"""
    cache = tmp_path / "cache"
    cache.mkdir()
    assert json.loads(run_alone(script, cache)) == expected


def test_the_cards_snippets_run_as_they_stand(tmp_path):
    make(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 2
    script = "\n".join(snippets).replace("path/to/this/folder", str(tmp_path / "out"))
    lines = run_alone(script, tmp_path).splitlines()
    assert "93+63+48=<think>" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["fast", "slow"]
    assert all("<think>" in line for line in lines[1:])


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_the_documentations_snippets_run_as_they_stand(tmp_path, page):
    make(tmp_path / "out")
    source = (ROOT / page).read_text()
    snippets = re.findall(r"```python\n(.*?)```", source, flags=re.DOTALL)
    script = "\n".join(snippets)
    for folder in ('"out"', '"runs/default/export"'):
        script = script.replace(folder, repr(str(tmp_path / "out")))
    assert "37+85+46=<think>" in run_alone(script, tmp_path)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({0: ["fast"], 2: ["fast", "slow"], 3: ["fast", "slow"]}, None),
        ({0: ["fast"], 1: ["slow"]}, "slow"),
        ({}, "fast`, `slow"),
    ],
)
def test_the_cards_example_is_one_that_all_modes_answer_right(tmp_path, monkeypatch, right, wrong):
    """The example is the first that most modes answer right, and the card names a wrong answer."""
    config, text = tiny_config(), tiny_text()
    examples = [config.task.build().example("test", i) for i in range(NUM_TRIED)]

    def decode_all(model, text, examples, mode, *rest, **given):
        said = ["0" if mode not in right.get(i, ()) else e.answer for i, e in enumerate(examples)]
        rows = [text.completion_ids("", answer) for answer in said]
        return [SimpleNamespace(completion=lambda row: rows[row])]

    monkeypatch.setattr("mtp.hub.model_card.decode_all", decode_all)
    model = tiny_model()
    model.generation_config = generation_config(text, PHASES)
    export(model, text, tmp_path / "out", SUMMARY, config)
    card = (tmp_path / "out" / "README.md").read_text()
    assert examples[2 if wrong is None else 0].prompt in card
    caveat = f"the answer of `{wrong}` mode to it is wrong"
    assert (caveat in card) if wrong else ("mode to it is wrong" not in card)


def test_the_card_tells_the_measured_figures_and_where_the_model_is_from(tmp_path):
    make(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    row = "| joint | 98.8 % | 50.0 % | 24.0 | 8.0 | 3.1 | 0.0 % | 25.0 % | 1.250 | 61.0 |"
    assert row in card
    assert "512 held-out problems, greedy decoding, seed 7" in card
    assert "none (llama trained from scratch)" in card
    assert f", torch {torch.__version__.partition('+')[0]}, " in card
    assert "nobody verifies the head's tokens" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("recorded", ["2.13.0", "2.13.0+cu130", "2.13.0+cpu"])
def test_the_card_names_a_release_of_torch_whatever_its_build(tmp_path, monkeypatch, recorded):
    installed = {"mtp-eavesdrop": "1.0", "torch": recorded, "transformers": "5.0"}
    monkeypatch.setattr(model_card, "version", installed.__getitem__)
    make(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Versions: mtp-eavesdrop 1.0, torch 2.13.0, transformers 5.0\n" in card


def test_config_and_generation_config_tell_both_doors_what_they_need(tmp_path):
    make(tmp_path / "out", "qwen3")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_mtp.Qwen3MTPForCausalLM"}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 12
    rest = {"min_probability": 0.0, "max_tokens": None, "closed_by": None}
    assert generation["mtp_phases"] == [
        {"name": "thought", "mode": "fast", "opened_by": 2, **rest},
        {"name": "answer", "mode": "slow", "opened_by": 3, **rest},
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_main_alone_is_a_stock_folder(tmp_path, family, tied):
    model, text = tiny_model(family, tied=tied), tiny_text()
    model.generation_config = generation_config(text, PHASES)
    export(model, text, tmp_path / "out", SUMMARY, tiny_config(), "main")
    assert not list((tmp_path / "out").glob("*.py"))
    for file in (tmp_path / "out").glob("*.json"):
        assert "mtp" not in file.read_text(), file.name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert not [key for key in weights.keys() if "mtp_head" in key]  # noqa: SIM118
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock).__module__.startswith("transformers.")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "1+2="}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert prompt == text.prompt_ids("1+2=")
    given = {"input_ids": torch.tensor([prompt]), "do_sample": False, "max_new_tokens": 8}
    slow = model.generate(**given, mtp_mode="slow")
    assert torch.equal(stock.generate(**given)[0, : slow.shape[1]], slow[0])


def test_the_card_of_main_alone_runs_and_its_folder_is_replaced_by_any_format(tmp_path):
    model, text = make(tmp_path / "out")
    export(model, text, tmp_path / "out", SUMMARY, tiny_config(), "main")
    card = (tmp_path / "out" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    script = snippet.replace("path/to/this/folder", str(tmp_path / "out"))
    assert "93+63+48=<think>" in run_alone(script, tmp_path)
    assert "trust_remote_code" not in card and "custom_code" not in card
    export(model, text, tmp_path / "out", SUMMARY, tiny_config())
    assert (tmp_path / "out" / "modeling_mtp.py").is_file()


@pytest.mark.parametrize(
    ("format", "told"),
    [("huggingface", "segments = model.generate_segments("), ("main", "the first segment alone")],
)
def test_a_card_tells_how_text_in_segments_is_written(tmp_path, format, told):
    summary = Phase(mode="slow", opened_by="<summary>", closed_by="</summary>", max_tokens=8)
    phases = {"thought": replace(PHASES["thought"], max_tokens=8), "summary": summary}
    phases["answer"] = PHASES["answer"]
    marks = ["<think>", "</think>", "<summary>", "</summary>"]
    tokenizer = character_tokenizer("0123456789+=;write dlon:\n", marks)
    text = PromptFormat(tokenizer, phases, 4, segments=SegmentSettings(max_segments=3))
    model = tiny_model()
    model.generation_config = generation_config(text, phases)
    export(model, text, tmp_path / "out", SUMMARY, tiny_config(), format)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "up to 3 segments" in card and told in card


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "{% if true %}{% endif %}\n", "  "])
def test_the_chat_template_opens_the_first_phase(tmp_path, ending):
    model, text = tiny_model(), tiny_text()
    model.generation_config = generation_config(text, PHASES)
    text.tokenizer.chat_template = PLAIN_TEMPLATE + ending
    export(model, text, tmp_path / "out", SUMMARY, tiny_config())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "1+2="}]
    given = {"tokenize": True, "return_dict": False}
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **given)
    assert ids == text.prompt_ids("1+2=")
    assert tokenizer.apply_chat_template(messages, **given) == ids[:-1]


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    model, text = make(tmp_path / "out")
    (tmp_path / "out" / "stale.json").write_text("{}")
    other = deepcopy(model)
    torch.nn.init.ones_(other.model.norm.weight)
    torch.nn.init.constant_(other.model.embed_tokens.weight, 0.5)
    export(other, text, tmp_path / "out", SUMMARY, tiny_config())
    opened, _ = load_model(tmp_path / "out")
    assert torch.equal(opened.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "stale.json").exists()
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="no export wrote .notes.md."):
        export(model, text, tmp_path / "out", SUMMARY, tiny_config())
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "data.json").write_text("[]")
    with pytest.raises(ValueError, match="no export wrote .data.json."):
        export(model, text, tmp_path / "own", SUMMARY, tiny_config())
    assert (tmp_path / "own" / "data.json").read_text() == "[]"


def contents(folder):
    """Every file below a folder, by its path."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_failed_export_leaves_the_earlier_one(tmp_path):
    model, text = make(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(KeyError):
        export(model, text, tmp_path / "out", {"stages": [{"name": "x"}]}, tiny_config())
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["---\nmy notes\n---\n", "---\ntitle: My: model\n---\n", b"\xff"])
def test_a_readme_that_is_no_model_card_has_no_licence(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert base_model(ModelConfig(source=str(tmp_path)))[2] is None


def test_the_base_models_licence_is_read_where_it_is_written(tmp_path):
    assert base_model(ModelConfig()) == ("none (llama trained from scratch)", None, None)
    folder = tmp_path / "base"
    folder.mkdir()
    assert base_model(ModelConfig(source=str(folder))) == ("base", None, None)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert base_model(ModelConfig(source=str(folder))) == ("base", None, "apache-2.0")
    assert base_model(ModelConfig(source="some/model")) == ("some/model", "some/model", None)
