"""The command `mtp`: train, write text with a trained model, talk with it, evaluate it, export it,
report; the jobs of a sweep; a check of the machine.

Errors are one line on standard error and exit code 2. Heavy imports wait until a command runs, so
`--help` answers at once.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.process import quiet_imports, run_command
from .completion import add_completion, complete_overrides
from .doctor import add_doctor
from .measure import add_measure_options, chosen_measure, measure
from .opening import Opened, choose_device, open_run
from .options import (
    DEFAULT_SEED,
    add_sampling_options,
    add_search_options,
    add_writing_options,
    check_options,
    make_sampler,
    search_config,
)
from .plan import add_plan
from .report import add_report
from .sweep import add_sweep
from .train import train
from .writing import chat, generate

if TYPE_CHECKING:
    from typing import NoReturn

    from ..modeling.branches import SearchConfig


def evaluate(arguments: argparse.Namespace) -> None:
    """`mtp evaluate`."""
    chosen = chosen_measure(arguments)
    opened = open_run(arguments.folder, arguments.stage)
    config, stage = opened.config, opened.stage
    assert config is not None and stage is not None
    if chosen is not None:
        device = choose_device(arguments.device)
        load = partial(opened.load, device)
        measure(arguments, chosen, config, stage, opened.head_is_trained, load)
        return
    number = arguments.num_problems
    search = search_config(arguments)
    if search is not None:
        evaluate_search(arguments, opened, search, number or config.evaluation.num_problems)
        return
    from rich.console import Console

    from ..common.errors import reading
    from ..evaluation.evaluate import evaluate as measured
    from ..evaluation.evaluate import over_test_sets
    from ..hub.build import load_model
    from ..reference import evaluation_reference, folder_of
    from ..reports.metrics import by_test_set
    from ..reports.progress import PartsProgress, make_console
    from ..reports.tables import print_metrics
    from ..training.examples import fit_task

    device = choose_device(arguments.device)
    model, fmt = opened.load(device)
    task = fit_task(config.task.build(), config.decoding, config.active_stages(), model, fmt)
    source = folder_of(config, arguments.folder, evaluation_reference(config))
    reference = None
    if (source / "config.json").is_file():
        with reading(str(source)):
            reference = load_model(source, config.weight_dtype())[0].to(device).eval()
    with PartsProgress(Console(stderr=True)) as report:
        metrics, _ = over_test_sets(
            task,
            lambda split: measured(
                model,
                fmt,
                task,
                config.decoding,
                num_problems=number or config.evaluation.num_problems,
                batch_size=config.evaluation.batch_size,
                use_head=opened.head_is_trained,
                reference=reference,
                verified=config.evaluation.verified,
                thought_budgets=config.evaluation.thought_budgets,
                impl=config.kernels,
                split=split,
                report=report,
            ),
        )
    if arguments.json:
        print(json.dumps({"name": opened.stage, **metrics}, indent=2))
    else:
        for name, (values,) in by_test_set([{"name": opened.stage, **metrics}]).items():
            problems = f"{values['num_problems']} held-out problems, greedy"
            title = f"{arguments.folder}, stage {opened.stage}: {problems}"
            print_metrics(make_console(), title, "run", {name or "value": values})


def evaluate_search(
    arguments: argparse.Namespace, opened: Opened, config: "SearchConfig", num_problems: int
) -> None:
    """`mtp evaluate --search`."""
    run = opened.config
    assert run is not None
    mode = opened.choose_mode(arguments.mode)
    sampler = make_sampler(arguments, config)
    import torch
    from rich.console import Console

    from ..evaluation.evaluate_search import evaluate_search as measured
    from ..modeling.decode_options import DecodeOptions
    from ..reports.progress import PartsProgress, make_console
    from ..reports.tables import print_metrics
    from ..training.examples import fit_task

    device = choose_device(arguments.device)
    seed = DEFAULT_SEED if arguments.seed is None else arguments.seed
    model, fmt = opened.load(device)
    options = DecodeOptions(
        sampler=sampler,
        max_new_tokens=run.decoding.max_new_tokens,
        generator=torch.Generator(device=device).manual_seed(seed),
        impl=run.kernels,
    )
    with PartsProgress(Console(stderr=True)) as report:
        metrics = measured(
            model,
            fmt,
            fit_task(run.task.build(), run.decoding, run.active_stages(), model, fmt),
            config,
            options,
            mode=mode,
            scorer=arguments.scorer or "logprob",
            num_problems=num_problems,
            batch_size=run.evaluation.batch_size,
            report=report,
        )
    if arguments.json:
        asked = {"mode": mode, **vars(config), "temperature": sampler.temperature, "seed": seed}
        print(json.dumps({"name": opened.stage, **asked, **metrics}, indent=2))
        return
    how = f"{opened.stage}, {mode}, {config.method}"
    title = f"{arguments.folder}, stage {how}: {metrics['num_problems']} held-out problems, sampled"
    print_metrics(make_console(), title, "search", {"value": metrics})


def export(arguments: argparse.Namespace) -> None:
    """`mtp export`."""
    opened = open_run(arguments.folder, arguments.stage)
    config = opened.config
    assert config is not None
    from ..common.errors import read_json
    from ..hub.export import check_default_mode, check_replaceable, push
    from ..hub.export import export as write
    from ..hub.formats import find_format

    find_format(arguments.format)
    check_default_mode(arguments.default_mode, arguments.format)
    if arguments.private and arguments.push is None:
        raise ValueError("--private is an option of --push REPO; add it or drop --private")
    check_replaceable(arguments.out)
    measured = arguments.folder / "summary.json"
    summary: dict[str, Any] = {"stages": [], "seed": config.seed}
    if measured.is_file():
        summary = read_json(measured)
    so_far = opened.stages_so_far()
    config.stages = {name: config.stages[name] for name in so_far}  # the card lists them
    try:
        summary["stages"] = [stage for stage in summary["stages"] if stage["name"] in so_far]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{measured} is not the summary of a run; remove it") from None
    model, fmt = opened.load("cpu")
    write(model, fmt, arguments.out, summary, config, arguments.format, arguments.default_mode)
    print(f"exported {opened.folder} to {arguments.out}")
    if arguments.push is not None:
        print(f"uploaded to {push(arguments.out, arguments.push, arguments.private)}")


class Parser(argparse.ArgumentParser):
    """Adds a hint to the error of a prompt that begins with a minus sign."""

    given: "list[str]" = []

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> "NoReturn":
        known = {word for action in self._actions for word in action.option_strings}
        for word in self.given:
            is_option = word.partition("=")[0] in known or word.startswith("--")
            if word.startswith("-") and len(word) > 1 and not is_option:
                message += f"; write -- before an argument that begins with -: {self.prog} FOLDER"
                message += f" -- {shlex.quote(word)}"
                break
        super().error(message)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="mtp", description="Train and use a main LLM with its eavesdropping head.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, folder: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=run)
        sub.add_argument("folder", type=Path, metavar="FOLDER", help=folder)
        return sub

    about = "train, by the settings of conf/ and overrides of them: mtp train --help lists both"
    sub: argparse.ArgumentParser = commands.add_parser("train", help=about, add_help=False)
    complete_overrides(sub)
    a_run = "folder of a run, such as runs/default"
    sub = command("generate", generate, "write text with a model", f"{a_run}, or of an export")
    sub.add_argument("prompt", metavar="PROMPT", help="the user's message, such as 37+85+46=")
    add_search_options(sub)
    writers = [sub]
    sub = command("chat", chat, "talk with a model", f"{a_run}, or of an export")
    writers.append(sub)
    for sub in writers:
        add_writing_options(sub)
    sub = command("evaluate", evaluate, "measure a run's model on held-out problems", a_run)
    sub.add_argument(
        "--num-problems",
        type=int,
        metavar="N",
        help="number of held-out problems; default: the run's evaluation.num_problems",
    )
    sub.add_argument(
        "--json", action="store_true", help="print the metrics in the format of summary.json"
    )
    add_measure_options(sub)
    add_search_options(sub, "scorer", "mode", "temperature", "top_k", "top_p", "seed")
    sub.add_argument(
        "--scorer",
        choices=["logprob", "reward"],
        help="score of texts and branches: their mean log-probability (default), or the reward of "
        "the task, 1 for a right answer",
    )
    add_sampling_options(sub)
    sub = command("export", export, "write a run's model as a Hugging Face folder", a_run)
    sub.add_argument(
        "out", type=Path, metavar="OUT", help="folder to write; an earlier export is replaced"
    )
    sub.add_argument(
        "--format",
        default="huggingface",
        metavar="NAME",
        help="huggingface (main with its head, the default), main (main alone, for any tool), gguf "
        "(main alone in one file, for llama.cpp), eagle3 or speculators (the head as a draft model "
        "for vLLM and SGLang), native_mtp (the head as the MTP layer of main's family)",
    )
    sub.add_argument(
        "--default-mode",
        metavar="MODE",
        help="fast, slow or verified: mode of `generate` where a call names none; without it, "
        "the stock `generate` on main",
    )
    sub.add_argument(
        "--push", metavar="USER/NAME", help="upload the folder to the Hugging Face Hub as well"
    )
    sub.add_argument(
        "--private", action="store_true", help="with --push: make a private repository"
    )
    for name, sub in commands.choices.items():
        if name == "train":
            continue
        sub.add_argument(
            "--stage", metavar="NAME", help="stage whose model is used; default: the last"
        )
        if name != "export":
            sub.add_argument(
                "--device",
                choices=["auto", "cpu", "cuda"],
                default="auto",
                help="default: a GPU if there is one",
            )
    add_report(commands)
    add_sweep(commands)
    add_plan(commands)
    add_doctor(commands)
    add_completion(commands, parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code, see `process`."""
    if argv is None:
        quiet_imports()
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["train"]:
        return train(given[1:], "mtp train")

    def command() -> int | None:
        arguments = make_parser().parse_args(given)
        check_options(arguments)
        return arguments.run(arguments)  # type: ignore[no-any-return]

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
