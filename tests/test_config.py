"""Every file of conf/ composes; a mistake is one line that names its key, and so is a bad value."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers import config as tiny_config
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf, open_dict

from mtp.cli.hydra import SweepCallback, job_folder, register_configs
from mtp.common.errors import one_line
from mtp.config import decides_numbers, to_run_config, with_defaults
from mtp.hub.build import build_model
from mtp.hub.run_folder import changed_settings
from mtp.rollouts.new_tokenizers import character_tokenizer
from mtp.rollouts.prompt_format import PromptFormat

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


def files(group: str) -> list[str]:
    folder = CONF / group
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name.removesuffix(".yaml") for name in found)


def composed(*overrides: str):
    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True)


def run_config(*overrides: str):
    config = composed(*overrides)
    with open_dict(config):
        del config["hydra"]
    return to_run_config(config)


def mistake(*overrides: str) -> str:
    """The line that a user sees."""
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        config = run_config(*overrides)
        build_model(config.model, config.head, config.decoding, config.task.build())
    line = one_line(caught.value)
    assert line is not None and "\n" not in line, caught.value
    return line


@pytest.mark.parametrize("experiment", files("experiment"))
def test_every_experiment_composes(experiment):
    config = run_config(f"experiment={experiment}")
    assert config.active_stages()
    assert config.run_dir == f"runs/{config.name}"
    source = config.model.source
    assert source is None or not source.startswith("runs/") or config.model.gguf_file is None


@pytest.mark.parametrize(
    "choice",
    [
        f"{group.name}={name}"
        for group in sorted(path for path in CONF.iterdir() if path.is_dir())
        for name in files(group.name)
        if group.name not in ("experiment", "sweep", "study")
    ],
)
def test_every_choice_composes(choice):
    assert run_config(choice, "name=mine").run_dir == "runs/mine"


def test_a_run_of_an_earlier_version_resumes_with_settings_that_were_added_since():
    config = run_config()
    now = json.loads(json.dumps(asdict(config)))
    saved = json.loads(json.dumps(now))
    del saved["task"]["num_train"], saved["evaluation"]["thought_budgets"]
    del saved["stages"]["rl"]["reward"]["thought_budget"]
    assert changed_settings(with_defaults(saved, config), now) == {}
    del saved["task"]["num_train"]
    now["task"]["num_train"] = 400
    with pytest.raises(ValueError, match="task.num_train was 0 and is now 400"):
        changed_settings(with_defaults(saved, config), now)


@pytest.mark.parametrize("study", files("study"))
def test_a_variant_of_a_study_comes_after_the_one_that_it_begins_from(study):
    hydra = composed(f"study={study}").hydra
    assert hydra.sweep.dir == f"runs/{study}"
    experiments = [name.strip() for name in hydra.sweeper.params.experiment.split(",")]
    before = {f"runs/{study}/start", f"runs/{study}/kl_only"} if study == "pass_budget" else set()
    for experiment in experiments:
        config = run_config(f"experiment={experiment}", "seed=7")
        assert config.name.startswith(f"{study}/") and config.name.endswith("/7")
        assert config.run_dir == f"runs/{config.name}"
        source, _, stage = (config.model.source or "").partition("/7/stages/")
        if experiment != f"{study}/start":
            assert source in before and stage in ("head", "joint", "rl"), f"{experiment}: {source}"
        before.add(config.run_dir.removesuffix("/7"))


def test_a_study_says_what_it_sweeps_over(monkeypatch, capsys):
    monkeypatch.setattr("mtp.cli.hydra.run_from_copy", lambda *_: None)
    for given, swept in ((), "experiment, seed"), (("seed=4",), "experiment"):
        config = composed("study=imperfect_teacher")
        with open_dict(config):
            config.hydra.overrides.task = list(given)
        SweepCallback().on_multirun_start(config)
        assert f"sweep over {swept}: runs/imperfect_teacher\n" == capsys.readouterr().out


@pytest.mark.parametrize("sweep", files("sweep"))
def test_every_sweep_chooses_its_launcher(sweep):
    if sweep != "basic":
        plugin = "hydra_plugins.hydra_" + sweep.partition("_")[0] + "_launcher"
        pytest.importorskip(plugin, reason="the launchers are the optional extra [sweep]")
    config = composed(f"sweep={sweep}")
    assert config.hydra.runtime.choices["hydra/launcher"] == sweep
    if sweep == "submitit_slurm":
        assert config.hydra.launcher.max_num_timeout > 0, "a preempted job would not run again"
        unresolved = OmegaConf.to_container(config)["grace_seconds"]
        assert unresolved == "${hydra:launcher.signal_delay_s}"
        assert config.hydra.launcher.signal_delay_s > 0


def test_optuna_raises_the_accuracy_and_proposes_the_same_values_again():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweeper = composed("sweeper=optuna").hydra.sweeper
    assert (sweeper.direction, sweeper.sampler.seed) == ("maximize", 1)


def test_a_single_run_does_not_resume_and_belongs_to_no_group():
    config = run_config()
    assert config.resume is False
    assert run_config("resume=true").resume is True
    assert run_config("resume=auto").resume == "auto"
    assert run_config("logger=wandb").logger.sinks["wandb"].group is None


def test_the_log_is_files_and_the_sinks_that_are_chosen():
    chosen = {"logger=files": ["files"], "logger=wandb": ["files", "wandb"]}
    chosen["logger=[wandb,files]"] = ["files", "wandb"]
    chosen["logger=[tensorboard,mlflow]"] = ["files", "tensorboard", "mlflow"]
    assert list(run_config().logger.sinks) == ["files"]
    for override, sinks in chosen.items():
        assert list(run_config(override).logger.sinks) == sinks
    assert list(run_config("logger=wandb", "~logger.sinks.files").logger.sinks) == ["wandb"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("nme=3", "unknown key nme; did you mean name or numbers?"),
        ("+nme=3", "unknown key nme; mtp has no such field, so it cannot be added with +"),
        ("+task.dataset=gcd", "unknown key task.dataset; mtp has no such field"),
        (
            "stages.rl.objective.polcy.weight=1",
            "unknown key stages.rl.objective.polcy; did you mean policy?",
        ),
        ("stages.rll.steps=1", "unknown key stages.rll; did you mean rl?"),
        ("fabric.zzz=1", "unknown key fabric.zzz; there are accelerator, devices, num_nodes,"),
        ("seed=abc", "seed must be a whole number, got 'abc'"),
        (
            "stages.main.optimizers.main.lr=fast",
            "stages.main.optimizers.main.lr must be a number, got 'fast'",
        ),
        ("overwrite=3.5", "overwrite must be true or false, got '3.5'"),
        ("head.num_slots=null", "head.num_slots must not be null"),
        ("head.taps=2", "head.taps must be a list, such as head.taps=[...]"),
        (
            "+stages.more.steps=5",
            "stages.more cannot be added on the command line; write a new one",
        ),
        ("+stages.more={steps: 5}", "stages.more cannot be added on the command line; write a ne"),
        ("stages.more.steps=5", "unknown key stages.more; there are main, head, joint, rl; write"),
        (
            "experiment=imperfect_teacher/main_onli",
            "experiment=imperfect_teacher/main_onli is not a choice; did you mean imperfect_te",
        ),
        (
            "experiment=nope",
            "experiment=nope is not a choice; there are gsm_symbolic, gsm_symbolic_",
        ),
        ("stages.rl=5", "stages.rl holds keys of its own: set stages.rl.KEY=..."),
        ("seed=???", "seed must be set: seed=..."),
        ("seed", "'seed' could not be read as key=value ("),
        ("seed=1,2", "seed=1,2 gives several values: add -m for a sweep, or write 'seed=[1,2]'"),
        ("head=3", "Config group override must be a string or a list"),
        ("experiment=runing_sum", "experiment=runing_sum is not a choice; did you mean running_su"),
        ("head.num_slots=0", "head.num_slots must be at least 1, got 0"),
        ("head.taps=[0,9]", "head.taps must be layers between 0 and "),
        (
            "decoding.phases.foo.mode=slow",
            "unknown key decoding.phases.foo; there are ",
        ),
        (
            "decoding.phases.answer.opened_by='<eos>'",
            "delimiter '<eos>' must be a token of",
        ),
        (
            "decoding.phases.answer.opened_by='<think>'",
            "decoding.phases.thought.opened_by must",
        ),
        ("=foo", "unknown key '', got =foo; write key=value"),
        ("model.attention=foo", "model.attention must be sdpa or eager, got 'foo'"),
        (
            "stages.rl.rollouts.mode=foo",
            "stages.rl.rollouts.mode must be fast, slow or verified, got 'foo'",
        ),
        ("stages.main.rollouts.num_prompts=4", "stages.main must have either stages.main.examples"),
        ("stages.rl.rollouts.zzz=1", "unknown key stages.rl.rollouts.zzz; there are "),
        ("task=rows", "task.source must be a .jsonl or .parquet file"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_key(override, line):
    assert mistake(override).startswith(line)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("model.source=runs/a/seed=1", """'model.source="runs/a/seed=1"'"""),
        ("name=it's", """'name="it'"'"'s"'"""),
        ('name=a"b', """'name="a\\"b"'"""),
    ],
)
def test_a_value_that_needs_quotes_is_shown_in_them(override, shown):
    line = mistake(override)
    assert line.endswith(f"; quote the value: {shown}")
    pasted = shlex.split(shown)[0]
    assert run_config(pasted, "name=mine" if "name" not in pasted else pasted)


def test_an_unknown_choice_lists_the_choices_without_schemas():
    line = mistake("task=zzz")
    assert line.startswith("task=zzz is not a choice; there are ")
    assert "reasoning_gym, rows, running_sum" in line and "schema" not in line


def test_resuming_and_overwriting_contradict_each_other():
    assert "contradict" in mistake("resume=auto", "overwrite=true")


def test_a_delimiter_must_be_a_token_of_the_tokenizer():
    phases = run_config("decoding.phases.answer.opened_by='</thought>'").decoding.phases
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PromptFormat(character_tokenizer("0123456789+=;", ["<think>", "</think>"]), phases, 6)
    line = one_line(caught.value)
    assert line is not None and line.startswith("delimiter '</thought>' must be one token")


def test_an_empty_dataset_is_named(tmp_path):
    source = tmp_path / "empty.jsonl"
    source.write_text("")
    assert str(source) in mistake("task=rows", f"task.source={source}")


def test_the_experiment_of_the_docs_composes(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/howto.md").read_text(), re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    added = f"hydra.searchpath=[file://{tmp_path}]"
    config = run_config(added, "experiment=mine")
    assert config.task.source == "problems.jsonl"
    assert config.active_stages()["joint"].steps == 480


def test_a_mistake_in_an_experiment_names_the_file(tmp_path):
    (tmp_path / "experiment").mkdir()
    content = "# @package _global_\nstages: {main: {stpes: 3}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(content)
    line = mistake(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert line == "conf/experiment/mine.yaml: unknown key stages.main.stpes; did you mean steps?"


def test_a_launcher_or_sweeper_that_is_not_installed_says_what_to_install():
    for group, key, name, package in (
        ("launcher", "sweep", "submitit_slurm", "hydra-submitit-launcher"),
        ("sweeper", "sweeper", "optuna", "hydra-optuna-sweeper"),
    ):
        assert one_line(MissingConfigException("", f"hydra/{group}/{name}", ["basic"])) == (
            f"{key}={name} needs the package {package}; install the launchers and sweepers with: "
            "pip install '.[sweep]'"
        )


def test_errors_of_other_libraries_keep_their_traceback():
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        json.loads("{")
    assert one_line(caught.value) is None
    assert one_line(RuntimeError("out of memory")) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.rl.objective.reference_kl.kind=k1", "decoding.top_k=5"],
            r"stages.rl.objective.reference_kl.kind=k1 needs decoding.top_k=0 .*, got 5 and 1.0",
        ),
        (
            ["stages.joint.objective.head_ce.slot_weights=[1,2]"],
            r"stages.joint.objective.head_ce.slot_weights must have head.num_slots=\d entries",
        ),
    ],
)
def test_a_stream_that_does_not_fit_is_refused_before_anything_trains(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, *overrides).validate()


def test_overrides_that_decide_a_runs_numbers():
    """Threads, logs and the place of a run do not; a group of the user's own may."""
    for deciding in ("seed=2", "++stages.rl.steps=0", "head=tiny", "experiment=a", "+mine=b",
                     "fabric.precision=32-true", "fabric=mine",
                     "~evaluation.thought_budgets"):  # fmt: skip
        assert decides_numbers(deciding), deciding
    for other in ("fabric.num_threads=1", "logger=wandb", "++logger.log_every=2", "name=a",
                  "overwrite=true", "resume=false", "sweep=ray"):  # fmt: skip
        assert not decides_numbers(other), other


def test_folders_of_jobs_are_readable_valid_and_distinct():
    assert job_folder("head.num_slots=5,seed=1", 0) == "head.num_slots=5,seed=1"
    assert job_folder("", 3) == "job3"
    slash, underscore = job_folder("model.source=a/b", 0), job_folder("model.source=a_b", 0)
    assert slash.startswith("model.source=a_b-") and slash != underscore
    assert not set(slash) & set("/[]'\" ")
    long = job_folder("x=" + "y" * 400, 0)
    assert len(long) < 120 and long != job_folder("x=" + "y" * 401, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["seed=abc"], 2, "error: seed must be a whole number, got 'abc'\n"),
        (["run_dir=/dev/null"], 2, "error: run_dir=/dev/null cannot be written: not a folder"),
        (["study=pass_budget"], 2, "error: study=pass_budget belongs to a sweep: add -m\n"),
        (["-m", "name=a,b"], 2, "error: a sweep writes to runs/<name>_sweep/<overrides>: "),
    ],
)
def test_the_command_line_prints_one_line_and_no_traceback(arguments, code, shown):
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr.startswith(shown) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["decoding=segments"], "decoding.compile_passes must be false with several segments"),
        (["fabric.strategy=fsdp2"], "decoding.compile_passes must be false with fabric.strategy=f"),
        (["channel.name=soft"], "decoding.compile_passes must be false with a channel that is not"),
    ],
)
def test_passes_that_cannot_be_compiled_are_refused_by_their_key(overrides, line):
    assert mistake("decoding.compile_passes=true", *overrides).startswith(line)
