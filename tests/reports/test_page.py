"""The content of the report page, and its parts."""

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from made_run import PLANTED, write_run

from mtp.cli import report as command
from mtp.cli.main import main
from mtp.reports.page import find_runs, read_runs, write_page
from mtp.reports.page.content import MAX_SETTINGS, curves, page_data

OPEN_STEP = '{"stage": "rl", "step": 11, "global_step": 21, "loss": 1.0}\n{"stage": "r'


def test_a_page_of_one_run_by_hand(tmp_path):
    page = page_data(read_runs([write_run(tmp_path / "run")]), "made")
    (run,) = page.data["runs"]
    assert (run["status"], run["seed"]) == ("ended", "1")
    low, high = run["stages"][1]["intervals"]["fast_accuracy"]
    assert (low, high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    assert run["times"][1] == {"stage": "rl", "sampling": 0.5, "update": 1.5}
    assert run["curves"]["main/kl"] == [[20], [0.01]]
    finals = {(p["stage"], p["mode"]): (p["passes"], p["accuracy"]) for p in run["finals"]}
    assert finals["rl", "fast"] == (4.0, 0.75) and finals["rl", "slow"] == (8.0, 1.0)
    slots = run["slots"][1]
    # Of slots 0 to 3: the fast phases of four thoughts; slot 3 is written once per first block.
    assert slots["entropy"] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert slots["message"] == [None, 1.5, 1.5, 1.5]
    assert slots["agreement"] == [None, 0.0, 0.0, 0.0], "main would write 5 everywhere"
    assert slots["accepted"] == [0.9, 0.5, 0.25]
    assert slots["reference"] == pytest.approx([1.0] * 4)


def test_evaluations_of_the_same_problems_are_compared_in_pairs(tmp_path):
    page = page_data(read_runs([write_run(tmp_path / "run")]), "made")
    found = {(tuple(p["first"]), tuple(p["second"])): p for p in page.data["pairs"]}
    pair = found[(0, "joint", "fast"), (0, "rl", "fast")]
    assert (pair["both"], pair["only_first"], pair["only_second"]) == (2, 1, 1)
    assert ((0, "joint", "slow"), (0, "rl", "fast")) not in found, "two things differ"
    two = [write_run(tmp_path / str(seed), name=f"s/{seed}", seed=seed) for seed in (1, 2)]
    pairs = page_data(read_runs(two), "two").data["pairs"]
    assert {(tuple(p["first"]), tuple(p["second"])) for p in pairs} == {
        ((0, "rl", "slow"), (0, "rl", "fast")),
        ((1, "rl", "slow"), (1, "rl", "fast")),
        ((0, "rl", "slow"), (1, "rl", "slow")),
        ((0, "rl", "fast"), (1, "rl", "fast")),
    }
    other = two[1] / "outcomes.jsonl"
    other.write_text(other.read_text().replace("abc", "def"))
    left = page_data(read_runs(two), "two").data["pairs"]
    assert all(p["first"][0] == p["second"][0] for p in left), "other problems"


def test_problems_of_projects_have_no_intervals_and_no_pairs(tmp_path):
    """They may fail together, so methods for independent problems say too much."""
    folder = write_run(tmp_path / "run")
    for file in ("metrics.jsonl", "summary.json"):
        text = (folder / file).read_text()
        places = 'fast_accuracy_by_place": [1.0, 0.5], "fast_passes"'
        (folder / file).write_text(text.replace('fast_passes"', places))
    outcomes = (folder / "outcomes.jsonl").read_text()
    (folder / "outcomes.jsonl").write_text(outcomes.replace('"mode"', '"project_size": 2, "mode"'))
    page = page_data(read_runs([folder]), "made")
    (run,) = page.data["runs"]
    assert all(stage["intervals"] == {} for stage in run["stages"]) and run["stages"]
    assert {(point["low"], point["high"]) for point in run["points"]} == {(None, None)}
    assert {(point["low"], point["high"]) for point in run["finals"]} == {(None, None)}
    assert page.data["pairs"] == []


def test_evaluations_of_a_set_of_their_own_are_points_of_the_curve(tmp_path):
    folder = write_run(tmp_path / "run")
    (run,) = page_data(read_runs([folder]), "made").data["runs"]
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines()
    lines[1] = lines[1].replace('"eval/', '"eval/validation/')
    log.write_text("\n".join(lines) + "\n")
    (other,) = page_data(read_runs([folder]), "made").data["runs"]
    assert [p["accuracy"] for p in other["points"]] == [p["accuracy"] for p in run["points"]]
    assert other["curves"] == run["curves"]


def test_seeds_of_a_sweep_are_a_group_with_an_interval(tmp_path):
    for seed in (1, 2):
        folder = write_run(tmp_path / f"seed={seed}", seed=seed)
        (folder / "job.json").write_text(json.dumps({"overrides": {}, "error": None}))
    failed = tmp_path / "seed=3"
    failed.mkdir()
    (failed / "config.yaml").write_text("name: made\nseed: 3\n")
    (failed / "metrics.jsonl").write_text("")
    (failed / "job.json").write_text(json.dumps({"overrides": {}, "error": "out of memory"}))
    runs = read_runs(find_runs([tmp_path]))
    page = page_data(runs, "sweep")
    assert [run["status"] for run in page.data["runs"]] == ["ended", "ended", "failed"]
    (group,) = page.data["groups"]
    assert group["seeds"] == ["1", "2"] and group["metrics"]["fast_accuracy"] == [0.75] * 3


def test_only_runs_that_differ_by_seed_alone_are_a_group(tmp_path):
    """Others differ by the precision, or by a setting for which the table has no column."""

    def groups(*kinds):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, settings in enumerate(kinds):
            for seed in (1, 2):
                run = write_run(folder / f"{number}.{seed}", name="made", seed=seed)
                (run / "job.json").write_text(json.dumps({"overrides": {}, "error": None}))
                given = {"name": "made", "seed": seed, **settings}
                (run / "config.yaml").write_text(yaml.safe_dump(given))
        runs = read_runs(find_runs([folder]))
        data = page_data(runs, "made").data
        assert len({run["group"] for run in data["runs"]}) == len(data["groups"])
        assert all(len(run["overrides"]) <= MAX_SETTINGS + 1 for run in data["runs"])
        return [(group["name"], group["seeds"]) for group in data["groups"]]

    precisions = [{"fabric": {"precision": name}} for name in ("32-true", "bf16-mixed")]
    assert groups(*precisions) == [
        (f"fabric.precision={name}", ["1", "2"]) for name in ("32-true", "bf16-mixed")
    ]
    many = {f"k{i}": 0 for i in range(MAX_SETTINGS + 1)}
    found = groups({**many, "lr": 1}, {**many, "lr": 100}, {key: 1 for key in [*many, "lr"]})
    assert [seeds for _, seeds in found] == [["1", "2"]] * 3
    assert found[1][0] == f"{found[0][0]} (2)"


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    for number, seed in enumerate((1, 2, 2)):
        run = write_run(tmp_path / str(number), seed=seed)
        (run / "job.json").write_text(json.dumps({"overrides": {}, "error": None}))
    (group,) = page_data(read_runs(find_runs([tmp_path])), "made").data["groups"]
    assert group["seeds"] == ["1", "2"]


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path):
    folder = write_run(tmp_path / "run", has_ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(OPEN_STEP)
    with (folder / "thoughts.jsonl").open("a") as file:
        file.write('{"stage": "rl", "tok')
    (run,) = read_runs([folder])
    assert run.status == "unfinished" and len(list(run.thoughts())) == 8
    page = page_data([run], "made")
    assert page.data["runs"][0]["stages"][1]["ended"] is False
    assert page.data["runs"][0]["stages"][1]["fast_accuracy"] == 0.75
    assert write_page([folder], folder / "report.html", watch=True) is False
    assert '"refresh":10' in (folder / "report.html").read_text()


def test_a_long_curve_is_averaged_and_what_is_not_finite_left_out(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run")])
    run.records = [{"stage": "rl", "global_step": i, "loss": float(i)} for i in range(400)]
    run.records[7]["loss"] = math.nan
    steps, values = curves(run, 100)["loss"]
    assert steps[:2] == [3, 8] and values[:2] == [1.5, (4 + 5 + 6 + 8) / 4]
    assert len(steps) == 100


def test_text_of_a_model_is_data_and_only_the_pages_scripts_may_run(tmp_path):
    """No text ends its element, each script has its hash in the policy, nothing is fetched."""
    folder = write_run(tmp_path / "run", name="</title><script>alert(1)</script>")
    write_page([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    assert PLANTED not in html and "<script>alert" not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and "default-src 'none'" in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 7
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="', html.partition("<main>")[0])


def test_the_command_writes_the_page_and_names_what_is_missing(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert "wrote" in capsys.readouterr().out and (folder / "report.html").is_file()
    opened: list[str] = []
    monkeypatch.setattr(command.webbrowser, "open", lambda url: opened.append(url) or True)
    assert main(["report", str(folder), "--open", "--output", str(tmp_path / "a.html")]) == 0
    assert opened == [(tmp_path / "a.html").as_uri()]
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "none does not exist; give a folder such as runs/default" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "holds no run: give the folder of a run or of a sweep" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    assert "--output must be a file, got the folder" in capsys.readouterr().err


def test_watching_ends_with_the_run(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "run", has_ended=False)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            (folder / "summary.json").write_text(json.dumps({"stages": [], "seconds": 1.0}))

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert main(["report", str(folder), "--watch"]) == 0
    assert len(looks) == 2 and "all runs have ended" in capsys.readouterr().out
    assert '"refresh":null' in (folder / "report.html").read_text()


def test_kept_studies_are_found_below_their_folder():
    study = Path(__file__).parents[2] / "docs" / "results" / "rl_proof"
    runs = read_runs(find_runs([study]))
    assert len(runs) == 27 and {run.status for run in runs} == {"ended"}
    names = {group["name"] for group in page_data(runs, "study").data["groups"]}
    assert "rl_proof/executed_open" in names and len(names) == 7
