"""A task with further held-out sets: which set an evaluation reads, and where its metrics are."""

import io

import pytest
from helpers import config, records
from rich.console import Console

import mtp.stages.evaluation
from mtp.evaluation.evaluate import evaluate, over_test_sets
from mtp.hub.model_card import CARD
from mtp.reports.json_lines import with_plain_names
from mtp.reports.metrics import by_test_set
from mtp.reports.tables import print_table
from mtp.tasks.base import Example, check_disjoint
from mtp.tasks.running_sum import RunningSum, RunningSumConfig
from mtp.trainer import train


class SumsOfSizes(RunningSum):
    """`test` and `validation`: three terms; `long`: four."""

    test_sets = ("test", "long")
    interim_set = "validation"

    def size(self, split):
        return {"train": None, "test": 8, "long": 5, "validation": 7}[split]

    def example(self, split, index):
        if split == "long":
            example = super().example("test", index)
            return Example(f"{example.prompt[:-1]}+10=", str(int(example.answer) + 10), "1+1=2")
        if split == "validation":
            return super().example("test", 100 + index)
        return super().example(split, index)


class SumsConfig(RunningSumConfig):
    def build(self):
        return SumsOfSizes(self)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "run"
    settings = config(
        folder, "stages.joint.steps=0", "stages.rl.steps=0", "stages.main.steps=2",
        "stages.head.steps=2", "stages.head.evaluate_every=1", "decoding.max_new_tokens=32",
    )  # fmt: skip
    settings.task = SumsConfig()
    evaluated, reports = [], []

    def watched(*args, split, **settings):
        evaluated.append(split)
        report = settings.pop("report")

        def noted(part, done, total):
            reports.append((part, done, total))
            report(part, done, total)

        return evaluate(*args, split=split, report=noted, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mtp.stages.evaluation, "evaluate", watched)
        return folder, train(settings), evaluated, reports


def test_a_stage_ends_with_the_metrics_of_every_test_set(run):
    folder, summary, *_ = run
    for stage in summary["stages"]:
        assert set(stage["test_sets"]) == {"long"}
        assert stage["num_problems"] == 8 and stage["test_sets"]["long"]["num_problems"] == 5
    passes = summary["stages"][-1]["test_sets"]["long"]["fast_passes"]
    last = [r for r in records(folder) if "eval/long/fast_passes" in r][-1]
    assert last["stage"] == "head" and last["eval/long/fast_passes"] == passes > 0


def test_evaluations_within_a_stage_read_the_interim_set(run):
    """Stage main, an evaluation within stage head, stage head."""
    assert run[2] == ["test", "long", "validation", "test", "long"]


def test_no_curve_of_the_log_has_points_of_two_sets(run):
    found = [r for r in records(run[0]) if any(name.startswith("eval/") for name in r)]
    within, end = found[1], found[2]
    assert {name.split("/")[1] for name in within if "/" in name} == {"validation"}
    assert "eval/slow_passes" in end and not any("validation" in name for name in end)
    assert with_plain_names(within)["eval/slow_passes"] == within["eval/validation/slow_passes"]
    assert with_plain_names(end) == end


def test_each_decoding_of_an_evaluation_reports_its_progress(run):
    """Set and mode or control, at its begin and after each batch of at most 256 problems."""
    of_head = run[3][-16:]
    parts = ["slow", "fast", "empty thought", "wrong thought"]
    sizes = {"test": 8, "long": 5}
    assert of_head == [
        (f"{split}, {part}", done, size)
        for split, size in sizes.items()
        for part in parts
        for done in (0, size)
    ]


def test_tables_name_the_set(run):
    folder, summary, *_ = run
    console = Console(width=100, file=io.StringIO(), record=True)
    print_table(console, summary)
    shown = console.export_text()
    assert "8 held-out problems, greedy" in shown
    assert "5 held-out problems of long, greedy" in shown
    card = (folder / "export" / CARD).read_text()
    for name in ("main", "head", "main (long)", "head (long)"):
        assert f"| {name} |" in card
    names = {k: [s["name"] for s in v] for k, v in by_test_set(summary["stages"]).items()}
    assert names == {"": ["main", "head"], "long": ["main", "head"]}


def test_metrics_of_further_sets_are_beside_those_of_test():
    figures, shown = over_test_sets(SumsConfig().build(), lambda split: ({"of": split}, [split]))
    assert figures == {"of": "test", "test_sets": {"long": {"of": "long"}}}
    assert shown == ["test"]
    assert over_test_sets(RunningSumConfig().build(), lambda s: ({"of": s}, []))[0] == {
        "of": "test"
    }


def test_a_question_in_two_sets_is_refused():
    class Sharing(SumsOfSizes):
        def example(self, split, index):
            return super().example("test" if split == "validation" else split, index)

    with pytest.raises(ValueError, match="validation problem 0 is also a test problem"):
        check_disjoint(Sharing(RunningSumConfig()), num_train=8)
