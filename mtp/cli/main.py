"""The command `mtp`: write text with a trained model, talk with it, evaluate it, export it, report.

Errors are one line on standard error and exit code 2. Heavy imports wait until a command runs, so
`--help` answers at once.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.process import quiet_imports, run_command
from .measure import add_measure_options, chosen_measure, measure
from .options import (
    DEFAULT_SEED,
    add_sampling_options,
    add_search_options,
    add_writing_options,
    check_options,
    make_sampler,
    search_config,
)
from .report import add_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from rich.console import Console

    from ..config import RunConfig
    from ..modeling.branches import SearchConfig
    from ..rollouts.prompt_format import PromptFormat

DEFAULT_MAX_NEW_TOKENS = 256
"""Limit if neither the command line nor the folder sets one."""


@dataclass
class Opened:
    """A model that a command uses."""

    folder: Path
    """Folder of the weights."""
    stage: str | None
    """Stage that saved the model; None for an exported folder."""
    config: "RunConfig | None"
    """Config of the run; None for an exported folder."""

    @property
    def head_is_trained(self) -> bool:
        """False if no stage up to this one trained the head."""
        return self.config is None or any(
            self.config.stages[name].train_head for name in self.stages_so_far()
        )

    def choose_mode(self, mode: str | None) -> str:
        """The given mode, else fast if the head is trained and slow if it is not.

        Raises ValueError for fast mode with an untrained head.
        """
        if mode == "fast" and not self.head_is_trained:
            raise ValueError(f"the head is untrained after stage {self.stage}; use --mode slow")
        return mode or ("fast" if self.head_is_trained else "slow")

    def stages_so_far(self) -> list[str]:
        """Names of the run's stages up to this one."""
        if self.config is None or self.stage is None:
            return []
        names = list(self.config.active_stages())
        return names[: names.index(self.stage) + 1]

    def load(self, device: str) -> tuple[Any, "PromptFormat"]:
        """The model on a device, ready to decode, and its prompt format."""
        from ..common.errors import reading
        from ..hub.build import load_model

        dtype = None if self.config is None else self.config.model.torch_dtype()
        with reading(str(self.folder)):
            model, fmt = load_model(self.folder, dtype)
        return model.to(device).eval(), fmt


def open_run(folder: Path, stage: str | None) -> Opened:
    """A run's model: at the end of the given stage, or of the last stage that has ended.

    Raises ValueError if the folder is no run or holds no such model.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; give a folder such as runs/default")
    from ..config import load_run_config

    config = load_run_config(folder / "config.yaml")
    ended = [
        name
        for name in config.active_stages()
        if (folder / "stages" / name / "config.json").is_file()
    ]
    if not ended:
        raise ValueError(f"{folder} holds no trained model yet: none of its stages has ended")
    if stage is not None and stage not in ended:
        raise ValueError(f"--stage must be one of {', '.join(ended)} in {folder}, got {stage}")
    missing = [name for name in config.active_stages() if name not in ended]
    if stage is None and missing:
        print(
            f"note: {folder} has not ended ({', '.join(missing)} to go); this is its model after "
            f"{ended[-1]}",
            file=sys.stderr,
        )
    stage = stage or ended[-1]
    return Opened(folder / "stages" / stage, stage, config)


def open_model(folder: Path, stage: str | None) -> Opened:
    """The model of a run, or that of an exported folder."""
    if (folder / "config.yaml").is_file() or not folder.is_dir():
        return open_run(folder, stage)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither a run (no config.yaml) nor an exported model (no config.json)"
        )
    if stage is not None:
        raise ValueError(f"--stage selects a stage of a run, but {folder} is one model")
    from ..common.errors import read_json

    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "mtp" not in config:
        raise ValueError(f"{folder} holds a model without a head; give one that mtp wrote")
    return Opened(folder, None, None)


def choose_device(name: str) -> str:
    """`auto` is a GPU if there is one. Raises ValueError for a missing device."""
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("--device cuda needs a GPU that torch can use; there is none")
    return ("cuda" if has_gpu else "cpu") if name == "auto" else name


@dataclass
class Writer:
    """A model that is ready to write, with the options of `mtp generate` or `mtp chat`."""

    console: "Console"
    model: Any
    fmt: "PromptFormat"
    mode: str
    check_length: "Callable[[list[int]], None]"
    """Raises ValueError for prompt ids that leave too few positions for the new tokens."""
    write: "Callable[[list[int], str], list[int]]"
    """(prompt ids, mode) -> completion ids, shown as they are sampled."""


def open_writer(arguments: argparse.Namespace) -> Writer:
    """The model of a writing command. Raises ValueError for settings that it cannot follow."""
    opened = open_model(arguments.folder, arguments.stage)
    mode = opened.choose_mode(arguments.mode)
    config = search_config(arguments)
    if config is not None and (arguments.max_segments or 1) > 1:
        raise ValueError(
            f"a search writes one segment, got --max-segments {arguments.max_segments}; drop it"
        )
    sampler = make_sampler(arguments, config)
    import torch

    from ..modeling.decode_options import DecodeOptions
    from ..modeling.segments import check_segments
    from ..reports.progress import make_console
    from .streaming import write_live
    from .streaming_search import write_found

    device = choose_device(arguments.device)
    model, fmt = opened.load(device)
    limit = arguments.max_new_tokens
    if limit is None and opened.config is not None:
        limit = opened.config.decoding.max_new_tokens
    if limit is None:
        limit = model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    if arguments.max_segments is not None:
        fmt.segments = replace(fmt.segments, max_segments=arguments.max_segments)
        check_segments(fmt.segments, fmt.phases, "decoding")
    seed = DEFAULT_SEED if arguments.seed is None else arguments.seed
    generator = torch.Generator(device=device).manual_seed(seed)
    options = DecodeOptions(sampler=sampler, max_new_tokens=limit, generator=generator)
    console = make_console()

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def check_length(prompt: list[int]) -> None:
        if positions is not None and len(prompt) + limit > positions:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {limit} new ones must fit in the model's "
                f"{positions} positions; shorten the prompt or lower --max-new-tokens"
            )

    def write(prompt: list[int], mode: str) -> list[int]:
        plan = fmt.plan(mode)
        if arguments.max_thought_tokens is not None:
            plan.max_tokens[0] = arguments.max_thought_tokens
        if config is not None:
            return write_found(console, model, fmt, prompt, plan, options, config, mode=mode)
        return write_live(console, model, fmt, prompt, plan, options, mode=mode)

    return Writer(console, model, fmt, mode, check_length, write)


def generate(arguments: argparse.Namespace) -> None:
    """`mtp generate`."""
    writer = open_writer(arguments)
    writer.fmt.check_prompt(arguments.prompt)
    prompt = writer.fmt.prompt_ids(arguments.prompt)
    writer.check_length(prompt)
    style = "dim" if writer.console.is_terminal else ""
    writer.console.print(arguments.prompt, end=" ", style=style)
    writer.write(prompt, writer.mode)


def chat(arguments: argparse.Namespace) -> None:
    """`mtp chat`."""
    from .streaming import HELP, converse

    writer = open_writer(arguments)
    console = writer.console
    if console.is_terminal:
        console.print(HELP, style="dim")

    def said() -> "Iterator[str]":
        while True:
            try:
                yield console.input("> " if console.is_terminal else "")
            except EOFError:
                return

    converse(
        said(),
        console,
        writer.fmt,
        writer.write,
        mode=writer.mode,
        check=writer.fmt.check_prompt,
        check_length=writer.check_length,
    )


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
    from ..common.errors import reading
    from ..evaluation.evaluate import evaluate as measured
    from ..evaluation.evaluate import over_test_sets
    from ..hub.build import load_model
    from ..reference import evaluation_reference, folder_of
    from ..reports.metrics import by_test_set
    from ..reports.progress import make_console
    from ..reports.tables import print_metrics
    from ..training.examples import fit_task

    device = choose_device(arguments.device)
    model, fmt = opened.load(device)
    task = fit_task(config.task.build(), config.decoding, config.active_stages(), model, fmt)
    source = folder_of(config, arguments.folder, evaluation_reference(config))
    reference = None
    if (source / "config.json").is_file():
        with reading(str(source)):
            reference = load_model(source, config.model.torch_dtype())[0].to(device).eval()
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
            impl=config.kernels,
            split=split,
        ),
    )
    if arguments.json:
        print(json.dumps({"name": opened.stage, **metrics}, indent=2))
    else:
        problems = f"{metrics['num_problems']} held-out problems, greedy"
        title = f"{arguments.folder}, stage {opened.stage}: {problems}"
        for name, (values,) in by_test_set([{"name": opened.stage, **metrics}]).items():
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

    from ..evaluation.evaluate_search import evaluate_search as measured
    from ..modeling.decode_options import DecodeOptions
    from ..reports.progress import make_console
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
    check_replaceable(arguments.out)
    measured = arguments.folder / "summary.json"
    summary: dict[str, Any] = {"stages": [], "seed": config.seed}
    if measured.is_file():
        summary = read_json(measured)
    so_far = opened.stages_so_far()
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
    parser = Parser(
        prog="mtp", description="Use a main LLM and its eavesdropping head, trained by train.py."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, folder: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=run)
        sub.add_argument("folder", type=Path, metavar="FOLDER", help=folder)
        return sub

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
        help="huggingface (main with its head, the default), main (main alone, for any tool) or "
        "gguf (main alone in one file, for llama.cpp)",
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code, see `process`."""
    if argv is None:
        quiet_imports()

    def command() -> None:
        arguments = make_parser().parse_args(argv)
        check_options(arguments)
        arguments.run(arguments)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
