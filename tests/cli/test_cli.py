"""The command `mtp`: its output, and one line and exit code 2 for a mistake."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM

from mtp.cli.main import main
from mtp.cli.streaming import LiveText
from mtp.config import RunConfig, load_run_config, save_run_config
from mtp.evaluation.evaluate import EvaluationConfig, evaluate
from mtp.hub.build import generation_config, load_model, save_model
from mtp.modeling.branches import SearchConfig
from mtp.modeling.heads import HeadConfig
from mtp.modeling.phases import Phase
from mtp.modeling.records import FORCED, Block
from mtp.reports.measures import forget_results, read_results
from mtp.reports.page import read_runs
from mtp.reports.page.content import page_data
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat
from mtp.rollouts.rollout import DecodingConfig
from mtp.rollouts.tokenization import TextPieces
from mtp.tasks import TASK_CONFIGS
from mtp.tasks.running_sum import RunningSumConfig
from mtp.training.objectives import ObjectiveConfig
from mtp.training.objectives.head_ce import HeadCE
from mtp.training.objectives.main_ce import MainCE
from mtp.training.stage import ExamplesConfig, StageConfig

PHASES = {
    "thought": Phase(mode="fast", opened_by="<think>"),
    "answer": Phase(mode="slow", opened_by="</think>"),
}
MAIN_ONLY = ObjectiveConfig(main_ce=MainCE(weight=1.0))
FIGURES = {"slow_accuracy": 0.5, "fast_accuracy": None, "num_problems": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two stages, random models, the head trained in the second only."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "stages").mkdir(parents=True)
    stages = {
        "main": StageConfig(
            examples=ExamplesConfig(batch_size=4), train_head=False, objective=MAIN_ONLY
        ),
        "head": StageConfig(
            examples=ExamplesConfig(batch_size=4),
            objective=ObjectiveConfig(head_ce=HeadCE(weight=1.0)),
        ),
    }
    config = RunConfig(
        name="tiny",
        run_dir=str(folder),
        head=HeadConfig(num_slots=3, hidden_size=16, intermediate_size=24),
        task=RunningSumConfig(num_terms=2),
        decoding=DecodingConfig(phases=PHASES, max_new_tokens=14),
        evaluation=EvaluationConfig(num_problems=12, batch_size=8),
        stages=stages,
    )
    config.validate()
    save_run_config(config, folder / "config.yaml")
    text = PromptFormat(character_tokenizer("0123456789+=;", ["<think>", "</think>"]), PHASES, 4)
    for seed, name in enumerate(stages):
        model = tiny_model(seed=seed)
        model.generation_config = generation_config(text, PHASES)
        save_model(model, text, folder / "stages" / name)
    summary = {"stages": [{"name": n, **FIGURES, "seconds": 1.0} for n in stages], "seed": 3}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def figures_of(run: Path, stage: str) -> dict:
    """The metrics that the trainer's evaluation of a stage gives."""
    config = load_run_config(run / "config.yaml")
    model, text = load_model(run / "stages" / stage)
    metrics, _ = evaluate(
        model,
        text,
        config.task.build(),
        config.decoding,
        num_problems=12,
        batch_size=8,
        use_head=stage == "head",
        reference=load_model(run / "stages" / "main")[0],
    )
    return metrics


def greedy(run: Path, stage: str, prompt: str, mode: str, limit: int) -> tuple[list, list, int]:
    """Tokens, their slots and the passes, by `generate`."""
    model, text = load_model(run / "stages" / stage)
    ids = torch.tensor([text.prompt_ids(prompt)])
    out = model.generate(ids, mtp_mode=mode, max_new_tokens=limit, return_dict_in_generate=True)
    length = int((out.slots[0] >= 0).sum())
    tokens = out.sequences[0, ids.shape[1] :][:length].tolist()
    return [text.tokenizer.decode([t]) for t in tokens], out.slots[0].tolist(), int(out.passes[0])


def test_a_runs_config_comes_back_as_it_was(run):
    config = load_run_config(run / "config.yaml")
    assert config.task == RunningSumConfig(num_terms=2)
    assert config.stages["head"].objective.head_ce == HeadCE(weight=1.0)
    assert config.decoding.phases == PHASES
    assert config.run_dir == str(run)


@pytest.mark.parametrize("name", sorted(TASK_CONFIGS))
def test_every_tasks_config_comes_back(tmp_path, name):
    stages = {
        "main": StageConfig(
            examples=ExamplesConfig(batch_size=4), train_head=False, objective=MAIN_ONLY
        )
    }
    config = RunConfig(run_dir="runs/x", task=TASK_CONFIGS[name](num_test=5), stages=stages)
    save_run_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_generate_prints_the_passes_of_generate(run, capsys, mode):
    assert main(["generate", str(run), "12+34=", "--mode", mode, "--max-new-tokens", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens, slots, passes = greedy(run, "head", "12+34=", mode, 9)
    blocks = "".join(
        ("|" if s == 0 and i else "") + t
        for i, (t, s) in enumerate(zip(tokens, slots, strict=False))
    )
    assert lines[0] == f"12+34= {blocks}"
    assert lines[0].count("|") == passes - 1
    assert f"{mode}: {len(tokens)} tokens in {passes} passes" in lines[1]
    assert f"{len(tokens) / passes:.2f} tokens per pass" in lines[1]


def test_generate_takes_the_mode_and_limit_of_the_run_and_stage(run, capsys):
    assert main(["generate", str(run), "12+34="]) == 0
    last = capsys.readouterr().out
    assert "fast: " in last
    assert main(["generate", str(run), "12+34=", "--stage", "main"]) == 0
    first = capsys.readouterr().out
    tokens, _, passes = greedy(run, "main", "12+34=", "slow", 14)
    assert f"slow: {len(tokens)} tokens in {passes} passes" in first


@pytest.mark.parametrize("method", ["best_of_n", "beam", "mcts"])
def test_a_search_shows_its_choice_and_what_else_it_found(run, capsys, method):
    options = ["--search", method, "--n", "3", "--choose", "majority", "--mode", "slow"]
    assert main(["generate", str(run), "12+34=", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    model, text = load_model(run / "stages" / "head")
    config = SearchConfig(method=method, n=3, choose="majority")
    found = model.search(
        torch.tensor([text.prompt_ids("12+34=")]), config=config, answer_of=text.answer_text,
        mtp_mode="slow", do_sample=True, top_k=0, max_new_tokens=14,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    tokens = found.sequences[0, len(text.prompt_ids("12+34=")) :].tolist()
    shown = "|".join(text.tokenizer.decode([token]) for token in tokens)
    assert lines[0] == f"12+34= {shown}"
    scores = [f"{branch.score:.4f}" for branch in found.texts[0]]
    assert [line.split()[-2 - line.endswith("no answer")] for line in lines[1:-1]] == scores
    assert sum(line.startswith("*") for line in lines[1:-1]) == 1
    spent = f"{int(found.passes[0])} passes, {int(found.tokens_read[0])} tokens read"
    assert lines[-1] == f"slow, {method}: {len(scores)} texts, {spent}"


@pytest.mark.parametrize("method", ["best_of_n", "beam", "mcts"])
def test_evaluate_tells_what_a_search_chooses_and_what_it_found(run, capsys, method):
    options = ["--search", method, "--n", "4", "--json"]
    assert main(["evaluate", str(run), *options]) == 0
    by_score = json.loads(capsys.readouterr().out)
    assert by_score["num_problems"] == 12 and by_score["method"] == method
    assert by_score["search_passes"] > 0 and 1 <= by_score["search_texts"] <= 4
    assert main(["evaluate", str(run), "--search", method, "--n", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"stage head, fast, {method}: 12 held-out problems" in shown.replace("\n", " ")
    assert "any text right" in shown


def test_sampling_is_decided_by_the_seed(run, capsys):
    def text(seed: str) -> str:
        main(["generate", str(run), "1+2=", "--temperature", "2", "--seed", seed])
        return capsys.readouterr().out.splitlines()[0]

    assert text("1") == text("1")
    assert len({text(str(seed)) for seed in range(4)}) > 1


def test_tokens_of_an_unfinished_character_wait_for_its_last_one():
    class Tokenizer:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    pieces = TextPieces(Tokenizer())
    assert [pieces.add(byte) for byte in "aé!".encode()] == ["a", "", "é", "!"]
    pieces = TextPieces(Tokenizer())
    assert [pieces.add(97), pieces.add(0xC3), pieces.pending()] == ["a", "", "�"]


def test_a_terminal_shows_the_emitters_in_colours():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=80)
    live = LiveText(console, character_tokenizer("0123456789;", []))
    ids = live.tokenizer.encode("3;45", add_special_tokens=False)
    row = [torch.tensor([values]) for values in (ids, [0, 1, 0, FORCED], [0, 0, 2, 0])]
    live(Block(torch.tensor([0]), *row, torch.zeros(1, 4), torch.tensor([4])))
    live(Block(torch.tensor([0]), *(x[:, :1] for x in row), torch.zeros(1, 1), torch.tensor([1])))
    shown = file.getvalue()
    assert "\x1b[1;33m3" in shown and "\x1b[36m;" in shown
    assert "\x1b[3;32m4" in shown and "\x1b[4;35m5" in shown
    assert shown.endswith("\x1b[2m|\x1b[0m\x1b[1;33m3\x1b[0m"), "passes are separated"


def test_without_colours_the_emitters_still_differ():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, no_color=True, width=80)
    live = LiveText(console, character_tokenizer("0123456789;", []))
    ids = live.tokenizer.encode("3;45", add_special_tokens=False)
    row = [torch.tensor([values]) for values in (ids, [0, 1, 0, FORCED], [0, 0, 2, 0])]
    live(Block(torch.tensor([0]), *row, torch.zeros(1, 4), torch.tensor([4])))
    assert file.getvalue() == "\x1b[1m3\x1b[0m;\x1b[3m4\x1b[0m\x1b[4m5\x1b[0m"


def test_verified_text_is_slow_text(run, capsys):
    texts = []
    for mode in ("slow", "verified"):
        assert main(["generate", str(run), "12+34=", "--mode", mode]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].startswith(f"{mode}: ")
        texts.append(lines[0].replace("|", ""))
    assert texts[0] == texts[1]


def test_a_thought_budget_closes_the_thought(run, capsys):
    arguments = ["--mode", "slow", "--max-thought-tokens", "3"]
    assert main(["generate", str(run), "12+34=", *arguments]) == 0
    text = capsys.readouterr().out.splitlines()[0].split(" ")[1]
    assert text.index("</think>") <= len("1|2|3")


def test_chat_reads_messages_from_standard_input(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2=\n/quit\n"))
    assert main(["chat", str(run), "--mode", "slow"]) == 0
    assert "slow: " in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["main", "head"])
def test_evaluate_gives_the_figures_of_the_summary(run, capsys, stage):
    assert main(["evaluate", str(run), "--json", "--stage", stage]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got == {"name": stage, **figures_of(run, stage)}
    assert got["num_problems"] == 12
    assert (got["fast_passes"] is None) == (stage == "main")


def test_evaluate_prints_a_table(run, capsys):
    assert main(["evaluate", str(run), "--num-problems", "4"]) == 0
    shown = capsys.readouterr().out
    assert "stage head: 4 held-out problems" in shown
    assert "slow acc." in shown and "seconds" not in shown


def test_export_writes_the_last_stage_and_the_chosen_one(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "stages/head" in capsys.readouterr().out
    ids = torch.tensor([[5, 6, 7]])
    for stage, rows in (("head", 2), ("main", 1)):
        assert main(["export", str(run), str(tmp_path / "out"), "--stage", stage]) == 0
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        own, _ = load_model(run / "stages" / stage)
        assert torch.equal(stock(ids).logits, own(ids).logits)
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("| 50.0 % |") == rows
        assert card.count("- Stage `") == rows
    assert main(["generate", str(tmp_path / "out"), "1+2=", "--mode", "slow"]) == 0
    tokens, _, passes = greedy(run, "main", "1+2=", "slow", 14)
    assert f"slow: {len(tokens)} tokens in {passes} passes" in capsys.readouterr().out


def test_a_run_that_has_not_ended_gives_its_last_model_and_says_so(run, tmp_path, capsys):
    (tmp_path / "stages").mkdir()
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "none of its stages has ended" in capsys.readouterr().err
    (tmp_path / "stages" / "main").symlink_to(run / "stages" / "main")
    assert main(["generate", str(tmp_path), "1+2="]) == 0
    said = capsys.readouterr()
    assert "has not ended (head to go)" in said.err
    assert "slow: " in said.out
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 0
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "RUN/absent", "1+2="], "does not exist"),
        (["evaluate", "RUN/stages"], "config.yaml does not exist"),
        (["generate", "RUN/stages", "1+2="], "neither a run (no config.yaml) nor an exported"),
        (["generate", "RUN", "1+2=", "--stage", "rl"], "--stage must be one of main, head"),
        (["generate", "RUN/stages/head", "1+2=", "--stage", "main"], "but RUN/stages/head is one"),
        (["generate", "RUN", "1+2=", "--stage", "main", "--mode", "fast"], "main is untrained"),
        (["generate", "RUN", "1 + x"], "tokenizer does not know ' ' 'x'"),
        (["generate", "RUN", "1+2=", "--max-new-tokens", "0"], "--max-new-tokens must be at"),
        (
            ["generate", "RUN", "1+2=", "--temperature", "-1"],
            "--temperature must be at least",
        ),
        (["evaluate", "RUN", "--num-problems", "0"], "--num-problems must be at least 1"),
        (["evaluate", "RUN", "--n", "4"], "--n is an option of --search"),
        (["evaluate", "RUN", "--top-k", "4"], "--top-k is an option of --search"),
        (["generate", "RUN", "1+2=", "--choose", "score"], "--choose is an option of --search"),
        (["generate", "RUN", "1+2=", "--search", "beam", "--n", "0"], "n must be at least 1"),
        (["generate", "RUN", "1+2=", "--search", "beam", "--max-segments", "2"], "one segment"),
        (["evaluate", "RUN", "--search", "mcts", "--expand", "1"], "expand must be at least 2"),
        (["evaluate", "RUN", "--search", "beam", "--temperature", "0"], "sampling must be on"),
        (["evaluate", "RUN", "--stage", "main", "--search", "beam", "--mode", "fast"], "untrained"),
        (
            ["generate", "RUN", "1+2=", "--temperature", "nan"],
            "--temperature must be a finite",
        ),
        (["generate", "RUN", "1+2=", "--top-k", "5"], "--top-k needs a --temperature above 0"),
        (
            ["generate", "RUN", "1+2=", "--temperature", "0", "--top-p", "0.5"],
            "--top-p needs a --temperature above 0",
        ),
        (["export", "RUN", "RUN/out", "--private"], "--private is an option of --push"),
        (["generate", "RUN", "1+2=", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (
            ["generate", "RUN", "1+" * 125, "--max-new-tokens", "9"],
            "a prompt of 251 tokens and 9 new ones must fit in the model's 256 positions",
        ),
        (["generate", "RUN", "1+2=\udcff"], "the prompt must be UTF-8 text, got '1+2=\\udcff'"),
        (["export", "RUN", "RUN"], "holds files that no export wrote"),
        (["export", "RUN", "RUN/config.yaml"], "is a file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, capsys, arguments, message):
    assert main([a.replace("RUN", str(run)) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message.replace("RUN", str(run)) in said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_name": "chess"}, "'running_sum'], got 'chess'"),
        ({"task_name": None}, "'running_sum'], got None"),
        ({"colour": 1}, "could not be read: Key 'colour' not in 'RunConfig'"),
        ({"seed": "many"}, "could not be read: Value 'many'"),
    ],
)
def test_a_config_that_does_not_fit_names_the_file(run, tmp_path, change, message):
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(run / "config.yaml"), change), path)
    with pytest.raises(ValueError, match="config.yaml") as error:
        load_run_config(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["evaluate"], ["export"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: mtp" in capsys.readouterr().out


def test_a_prompt_that_begins_with_a_minus_sign_gets_a_hint(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "runs/default", "-37+85="])
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    hint = "write -- before an argument that begins with -: mtp generate FOLDER -- -37+85="
    assert line.endswith(hint)


def test_closed_streams_are_no_error(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", str(run)]) == 0
    monkeypatch.setattr("sys.stdout", None)
    assert main(["generate", str(run), "1+2="]) == 0
    sys.stdin.close()
    sys.stdout.close()
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_gone_ends_a_command_quietly(run, monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stream = open(write, "w", buffering=1)  # noqa: SIM115
        patch.setattr("sys.stdout", stream)
        sys.exit(main(["generate", str(run), "1+2="]))
    stream.close()
    assert end.value.code == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_model_is_one_line_that_names_its_folder(run, tmp_path, capsys, name):
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy" / "stages" / "head" / name
    file.write_bytes(file.read_bytes()[:40])
    assert main(["generate", str(tmp_path / "copy"), "1+2="]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and f"{file.parent} could not be read: " in said
    assert said.count("\n") == 1


def test_evaluate_measures_the_channel_and_the_report_shows_it(run, capsys):
    given = ["--num-problems", "5", "--others", "3", "--temperature", "1.5", "--seed", "4"]
    command = ["evaluate", str(run), "--measure", "channel", *given]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((run / "measures" / "head.channel.json").read_text())
    assert printed == saved
    assert saved["settings"] == {"temperature": 1.5, "others": 3, "seed": 4}
    assert saved["channel_limit_bits"] <= 2.0
    assert len(saved["block_entropy_bits_by_slot"]) == 4
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "entropy of a block" in shown and "by slot" in shown
    (result,) = read_results(run)
    assert result == saved, "the same seed gives the same result"
    page = page_data(read_runs([run]), "tiny")
    assert page.data["runs"][0]["measures"] == [saved]
    (about,) = page.data["measures"]
    assert about["measure"] == "channel" and about["by_slot"][0]["name"] == "channel_least_bits"
    forget_results(run, "head")
    assert read_results(run) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--others", "3"], "--others is an option of --measure; add --measure"),
        (["--measure", "thought", "--others", "3"], "--others is no option of --measure thought"),
        (
            ["--measure", "channel", "--search", "beam"],
            "--search is no option of --measure channel",
        ),
        (["--measure", "channel", "--others", "0"], "--others must be at least 1, got 0"),
        (["--measure", "channel", "--temperature", "0"], "--temperature must be above 0"),
        (["--measure", "channel", "--stage", "main"], "needs a trained head, which stage main"),
        (["--measure", "gradient"], "needs a stage with objective.policy.weight above 0"),
        (["--measure", "thought", "--reader", "rl"], "--reader must be a stage that has ended"),
        (["--measure", "thought", "--stage", "main", "--mode", "fast"], "use --mode slow"),
    ],
)
def test_a_measure_that_cannot_be_taken_is_one_line(run, capsys, arguments, message):
    assert main(["evaluate", str(run), "--num-problems", "4", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
