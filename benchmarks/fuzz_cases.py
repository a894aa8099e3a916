"""Impossible input, generated: the cases of `fuzz.py`.

A generator takes a random number generator and the material of a finished run. The change that it
makes is known to be impossible, and it knows the words of which the error must hold one.
"""

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("stages.main.steps=1", "stages.head.steps=0", "stages.joint.steps=1", "stages.rl.steps=1"),
    *(
        "stages.main.examples.batch_size=2",
        "stages.joint.examples.batch_size=2",
        "stages.joint.stop_accuracy=0",
    ),
    *(
        "stages.rl.rollouts.num_prompts=2",
        "stages.rl.rollouts.group_size=2",
        "stages.rl.evaluate_every=0",
    ),
    *("evaluation.num_problems=2", "evaluation.num_interim_problems=2", "fabric=cpu"),
    *("decoding.max_new_tokens=4", "model.config.hidden_size=32", "head.hidden_size=16"),
    *("model.config.intermediate_size=48", "head.intermediate_size=24", "fabric.num_threads=1"),
]
"""A run of a second."""

Rng = random.Random


@dataclass
class Case:
    """One impossible input."""

    program: str
    """`train.py`, or a module that is run with -m."""
    arguments: list[str]
    names: list[str]
    """The line must hold one of these."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content by path within the case's folder."""
    runs: dict[str, str] = field(default_factory=dict)
    """Folders of the finished run to copy, by the path of the copy."""
    removed: list[str] = field(default_factory=list)
    """Paths to take away from the copies."""


@dataclass
class World:
    """Material of the cases."""

    home: Path
    """Holds `run`, a finished run."""
    numbers: list[tuple[str, Any, dict[str, float]]]
    """Key, value and bounds of every number of the default config."""
    keys: list[str]
    """All keys that hold a value."""

    def content(self, path: str) -> bytes:
        """A file of the finished run."""
        return (self.home / "run" / path).read_bytes()


def word(rng: Rng) -> str:
    """A word that names nothing."""
    return "zq" + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))


def damaged(rng: Rng, content: bytes) -> bytes:
    """A file cut short, overwritten or empty."""
    noise = rng.randbytes(rng.randint(1, 400))
    return rng.choice(
        [content[: rng.randrange(len(content) * 3 // 4)], b"\xff" + noise, b"", noise]
    )


def train(*arguments: str, names: list[str], **files: Any) -> Case:
    """A case of train.py with a tiny run's settings."""
    return Case("train.py", [*TINY, *arguments], names, **files)


# Config


def out_of_bounds(rng: Rng, world: World) -> Case:
    """A number that is not finite or is beyond its bounds."""
    key, value, bounds = rng.choice(world.numbers)
    choices: list[Any] = ["nan", "inf", "-inf"] if isinstance(value, float) else []
    size = rng.choice([1, 7, 10 ** rng.randint(1, 6)])
    for bound, limit in bounds.items():
        beyond = limit - size if bound in ("at_least", "above") else limit + size
        choices.append(int(beyond) if isinstance(value, int) else float(beyond))
        if bound in ("above", "below"):
            choices.append(limit)
    if "at_most" not in bounds and "below" not in bounds:
        choices += [10 ** rng.randint(10, 30)]
    bad, base = rng.choice(choices), key.partition("[")[0]
    return train(f"{base}=[{bad}]" if base != key else f"{base}={bad}", names=[base])


def wrong_type(rng: Rng, world: World) -> Case:
    """A word, a list, a mapping or null for a number."""
    key = rng.choice([key for key, _, _ in world.numbers if "[" not in key])
    bad = rng.choice([word(rng), f"[{rng.randint(0, 9)}]", f"{{{word(rng)}:1}}", "true1", "''"])
    return train(f"{key}={bad}", names=[key])


def unknown_key(rng: Rng, world: World) -> Case:
    """A key that is not there, plainly or with a plus sign."""
    parts = rng.choice(world.keys).split(".")
    parts[rng.randrange(len(parts))] = word(rng)
    made = next(i for i, part in enumerate(parts) if part.startswith("zq"))
    plus = rng.choice(["", "", "+", "++"]) if parts[0] not in ("model", "decoding") else ""
    if plus and parts[0] == "stages" and made == 1:
        plus = ""
    return train(f"{plus}{'.'.join(parts)}={rng.randint(0, 9)}", names=[parts[made]])


CHOSEN = [
    *("stages.rl.rollouts.mode", "stages.rl.optimizers.main.algorithm", "resume", "kernels"),
    *(
        "stages.main.optimizers.head.decay",
        "stages.rl.objective.policy.algorithm",
        "fabric.accelerator",
    ),
    *("stages.rl.objective.policy.ratio", "stages.rl.objective.policy.normalizer", "head.type"),
    *("stages.rl.objective.reference_kl.kind", "stages.rl.advantage.kind", "fabric.precision"),
    *("fabric.strategy", "model.family", "model.dtype", "evaluation.reference"),
    *("decoding.phases.thought.mode", "decoding.phases.answer.mode", "stages.rl.reference"),
    *("stages.main.train_head", "dry_run", "overwrite", "decoding.chat_template"),
    *("model.config.tie_word_embeddings", "model.attention"),
]
"""Keys that take one of a few words."""


def unknown_word(rng: Rng, world: World) -> Case:
    """A word that is not one of the few that a key takes."""
    key = rng.choice(CHOSEN)
    return train(f"{key}={word(rng)}", names=[key, "model.config"])


def unknown_group(rng: Rng, world: World) -> Case:
    """A choice of a group that is not there."""
    group, name = (
        rng.choice(["experiment", "model", "head", "task", "decoding", "sweep"]),
        word(rng),
    )
    return train(f"{group}={name}", names=[name])


def grammar(rng: Rng, world: World) -> Case:
    """An override that Hydra cannot read."""
    key, text = rng.choice(world.keys), word(rng)
    shapes = [
        "[{}",
        "{{{}:1",
        "'{}",
        '"{}',
        "{}={}",
        "{}]",
        "({}",
        "{})",
        "a[{}",
        "${{{}",
        "{}}}",
        "{}'",
    ]
    value = rng.choice(shapes).format(text, text)
    return train(f"{key}={value}", names=[key])


def command_line(rng: Rng, world: World) -> Case:
    """Something on the command line of train.py that is no override of a key."""
    text = word(rng)
    bad = [f"~{text}", f"--{text}", text, f"={text}", f"hydra.{text}=1", f"--config-name={text}"]
    bad += [f"{rng.choice(world.keys)}={text},{rng.randint(1, 9)}", f"{text}@{text}={text}"]
    return train(rng.choice(bad), names=[text])


def phases(rng: Rng, world: World) -> Case:
    """Phases that no text can have."""
    key, digit = "decoding.phases", str(rng.randint(0, 9))
    changes = [
        *(
            f"{key}.answer.opened_by={d}"
            for d in ("'<eos>'", "'<pad>'", f"'{digit}'", "''", "null")
        ),
        *(f"{key}.{p}.max_tokens={-int(digit)}" for p in ("thought", "answer")),
        f"{key}.answer.max_tokens={1 + int(digit)}",
        f"{key}.answer.opened_by='<think>'",
        f"{key}.thought.closed_by='</think>'",
        f"decoding.segments.max_segments={2 + int(digit)}",
        f"{key}.{rng.choice(['thought', 'answer'])}={word(rng)}",
    ]
    return train(rng.choice(changes), names=["decoding", "delimiter"])


def run_folder(rng: Rng, world: World) -> Case:
    """A run folder that cannot be made or written."""
    text, depth = word(rng), rng.randint(0, 3)
    bad = rng.choice(["/dev/null", "file", f"/proc/{text}", "x" * rng.randint(256, 400)])
    path = "/".join([bad, *[text] * depth])
    return train(f"run_dir='{path}'", names=["run_dir"], files={"file": b"mine"})


# Data and rewards

GOOD = "".join(
    json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(30)
).encode()


def data(rng: Rng, world: World) -> Case:
    """Rows that are no problems."""
    number, text = rng.randint(0, 10**6), word(rng)
    lines: list[Any] = [
        *(str(number), "null", f'"{text}"', f"[{number}]", "{", "}", text, '{"prompt":"1+1="'),
        *("[" * rng.randint(5000, 20000), '{"prompt": "1+1=", "answer": 1' + "0" * 5000 + "}"),
        *({}, {"prompt": "1+1="}, {"answer": "2"}, {text: "1+1=", "answer": "2"}),
        *({"prompt": None, "answer": "2"}, {"prompt": [text], "answer": "2"}),
        *({"prompt": "1+1=", "answer": {text: 2}}, {"prompt": "1+1=", "answer": [number]}),
        *({"prompt": "1+1=", "answer": None}, {"prompt": "1+1=", "answer": float("nan")}),
        *({"prompt": "1+1=", "answer": "2", "thought": [number]}, {"prompt": "", "answer": ""}),
    ]
    line = rng.choice(lines)
    line = line if isinstance(line, str) else json.dumps(line)
    before = rng.choice([b"", GOOD])
    contents = [before + line.encode() + b"\n"] * 6
    contents += [b"", b"\n" * (1 + number % 99), b"\xff\xfe\xff" + rng.randbytes(60)]
    name = f"{text}.{rng.choice(['jsonl', 'jsonl', 'jsonl', 'parquet'])}"
    content = rng.choice(contents)
    if name.endswith("parquet"):
        content = rng.choice([b"PAR1" + rng.randbytes(99) + b"PAR1", rng.randbytes(200), b""])
    key = rng.choice(["source", "source", "test_source"])
    files = {name: content, "good.jsonl": GOOD}
    given = ["task.source=good.jsonl"] if key == "test_source" else []
    return train(
        "task=rows", *given, f"task.{key}={name}", "model.source=run/export",
        names=[name], files=files, runs={"run/export": "export"},
    )  # fmt: skip


def settings_of_data(rng: Rng, world: World) -> Case:
    """Settings of a task that do not fit its data."""
    text = word(rng)
    rows, files = (
        ["task=rows", "model.source=run/export"],
        {"good.jsonl": GOOD, "text.txt": b"short"},
    )
    good = [*rows, "task.source=good.jsonl"]
    cases = [
        ([*rows, f"task.source={text}"], text),
        ([*rows, f"task.source={text}.jsonl"], text),
        ([*rows, "task.source=''"], "task.source"),
        ([*good, f"task.prompt_column={text}"], text),
        ([*good, f"task.answer_column={text}"], text),
        ([*good, f"task.test_source={text}.jsonl"], text),
        ([*good, f"task.reward_style={text}", "task.reward=reward:good"], text),
        (["task=continuation", f"task.files=[{text}*]"], text),
        (["task=continuation", "task.files=[text.txt]"], "task.files"),
        (["task=running_sum", f"task.high={rng.randint(0, 9)}"], "task.high"),
        (["task=reasoning_gym", f"task.dataset={text}"], text),
        (["task=reasoning_gym", f"+task.options.{text}=1"], text),
        (["task=chain_sum", "task.options.min_terms=-1"], "min_terms"),
    ]
    arguments, name = rng.choice(cases)
    reward = {
        "reward.py": b"def good(completions, **rest):\n    return [1.0 for _ in completions]\n"
    }
    return train(*arguments, names=[name], files=files | reward, runs={"run/export": "export"})


def reward(rng: Rng, world: World) -> Case:
    """A reward that is no function, or raises, or gives no number."""
    text = word(rng)
    sources = [
        "def score(:",
        f"raise RuntimeError('{text}')",
        f"import {text}",
        "score = 3",
        "x = 1",
    ]
    sources += ["class score: pass", f"open('{text}')", "def score(): return 1.0", "\0", "1/0"]
    module = f"m{text}"
    spec = f"{module}:score"
    if rng.random() < 0.3:
        spec = rng.choice([text, f"{text}:", f":{text}", f"{text}:{text}", f"{module}:{text}:x"])
    return train(
        "task=rows", "task.source=good.jsonl", f"task.reward='{spec}'", "model.source=run/export",
        names=["task.reward", module, text],
        files={"good.jsonl": GOOD, f"{module}.py": rng.choice(sources).encode() + b"\n"},
        runs={"run/export": "export"},
    )  # fmt: skip


# Models and checkpoints


def broken_json(rng: Rng, content: bytes, keys: list[str]) -> bytes:
    """A JSON file that is damaged, or whose content is impossible."""
    if rng.random() < 0.4:
        return damaged(rng, content)
    made = json.loads(content)
    key = rng.choice([key for key in keys if key in made])
    made[key] = rng.choice([word(rng), -rng.randint(1, 99), [word(rng)], {word(rng): 1}])
    return rng.choice([json.dumps(made), json.dumps(made), "[]", "3", "null"]).encode()


CONFIG_KEYS = [
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "model_type",
    "mtp",
]


def broken_model(rng: Rng, world: World, folder: str) -> tuple[dict[str, bytes], list[str]]:
    """(files, removed) that make a copy of the finished run's model unreadable."""
    name = rng.choice(["config.json", "tokenizer.json", "model.safetensors"])
    path = f"{folder}/{name}"
    if rng.random() < 0.15:
        return {}, [path]
    content = world.content(f"export/{name}")
    if name == "config.json":
        return {path: broken_json(rng, content, CONFIG_KEYS)}, []
    if name == "tokenizer.json":
        return {path: broken_json(rng, content, ["model", "version"])}, []
    at, header = rng.randrange(9, 60), bytearray(content)
    header[:8] = rng.choice([rng.randbytes(8), header[:8]])
    header[at] = 0xFF
    return {path: rng.choice([damaged(rng, content), bytes(header)])}, []


def model(rng: Rng, world: World) -> Case:
    """A pretrained model that cannot be read."""
    text = word(rng)
    runs = {text: "export"}
    if rng.random() < 0.2:
        given, names = rng.choice(
            [
                ([f"model.source=no/{text}/{text}"], [text]),
                ([f"model.source=package:no{text}"], [text]),
                ([f"model.source={text}", f"model.gguf_file={text}.gguf"], [f"{text}.gguf"]),
                ([f"model.source={text}", f"head.num_slots={rng.randint(6, 9)}"], ["head"]),
            ]
        )
        return train(*given, names=names, runs=runs)
    files, removed = broken_model(rng, world, text)
    return train(f"model.source={text}", names=[text], files=files, runs=runs, removed=removed)


def checkpoint(rng: Rng, world: World) -> Case:
    """A checkpoint that cannot be resumed from."""
    import pickle

    # The run has ended, so its last checkpoint is that of its last step.
    name = max(p.name for p in (world.home / "run" / "checkpoints").glob("step_*"))
    path, runs = f"run/checkpoints/{name}", {"run": "."}
    content = bytearray(world.content(f"checkpoints/{name}"))
    at = rng.randrange(len(content) // 4, len(content) * 3 // 4)
    content[at] ^= 1 << rng.randrange(8)
    made = [
        bytes(content),
        damaged(rng, bytes(content)),
        pickle.dumps({word(rng): rng.randint(0, 9)}),
        pickle.dumps(rng.randint(0, 9)),
    ]
    given = ["run_dir=run", "resume=true"]
    if rng.random() < 0.1:
        missing = rng.choice(["step_00000000", "best_of_all", word(rng)])
        return train("run_dir=run", f"resume={missing}", names=["resume must be"], runs=runs)
    if rng.random() < 0.2:
        change = rng.choice(["seed=7", "head.num_slots=4", "stages.rl.steps=3", "task.num_terms=4"])
        return train(*given, change, names=["resumed run must keep"], runs=runs)
    return train(*given, names=[name], files={path: rng.choice(made)}, runs=runs)


# Commands


def option(rng: Rng, world: World) -> Case:
    """An option or argument of `mtp` that cannot be followed."""
    text, number = word(rng), rng.randint(1, 10**6)
    write = rng.choice([["generate", "run", "1+2="], ["chat", "run"]])
    search = ["generate", "run", "1+2=", "--search", rng.choice(["best_of_n", "beam", "mcts"])]
    cases = [
        *(([*write, o, str(-number)], o) for o in ("--max-new-tokens", "--max-thought-tokens")),
        *(
            ([*write, o, str(-number)], o)
            for o in ("--top-k", "--top-p", "--max-segments", "--seed")
        ),
        *(
            ([*write, "--temperature", t], "temperature")
            for t in ("nan", "inf", f"-{number}", text)
        ),
        *(([*write, "--top-p", t], "top-p") for t in ("nan", "0", str(1 + number))),
        *(([*write, o, text], o) for o in ("--mode", "--device", "--stage", "--seed", "--top-k")),
        ([*write, "--max-segments", str(1 + number)], "max_segments"),
        ([*write, "--seed", str(2**64 + number)], "--seed"),
        ([*write, f"--{text}"], text),
        *(([*search, o, str(-number)], o) for o in ("--n", "--expand")),
        ([*search, "--choose", text], "--choose"),
        (["generate", "run", "1+2=", "--n", "4"], "--n"),
        (["generate", "run", f"-{number}+1="], "-- "),
        (["generate", "run", text], repr(text[0])),
        (["generate", "run", "1+2=\udcff"], "prompt"),
        (["generate", text, "1+2="], text),
        (["generate", "run"], "PROMPT"),
        ([text], text),
        ([], "COMMAND"),
        *(
            (["evaluate", "run", "--num-problems", t], "--num-problems")
            for t in (f"-{number}", text)
        ),
        (["evaluate", "run", "--scorer", "reward"], "--scorer"),
        (["export", "run", "file"], "file"),
        (["export", "run", "file/out"], "file"),
        (["export", "run", "other"], "other"),
        (["export", "run", "out", "--stage", text], "--stage"),
    ]
    arguments, name = rng.choice(cases)
    names = [name, name.removeprefix("--").replace("-", "_") if name != "-- " else name]
    files = {"file": b"mine", "other/mine": b"mine"}
    return Case("mtp.cli.main", arguments, names, files, {"run": "."})


def folder(rng: Rng, world: World) -> Case:
    """A run, an export or a sweep that `mtp` cannot read."""
    text = word(rng)
    command = rng.choice([["generate", text, "1+2="], ["evaluate", text], ["export", text, "out"]])
    if rng.random() < 0.15:
        name = rng.choice(["job.json", "summary.json"])
        content = rng.choice(
            [b"[]", b"3", b"{}", b'{"stages": []}', b'{"stages": 3}', b"\xff", b"{"]
        )
        return Case("mtp.reports.sweep", [text], [text], {f"{text}/seed=1/{name}": content})
    if rng.random() < 0.3:
        path, config = f"{text}/config.yaml", world.content("config.yaml")
        broken = [b"\xff\xfe" + rng.randbytes(30), b"[1, 2]", b"seed: [", b"\t- x: {", b"", b"3"]
        broken += [config + f"{word(rng)}: 1\n".encode(), config.replace(b"seed: 1", b"seed: x")]
        broken += [config.replace(b"mode: fast", f"mode: {word(rng)}".encode())]
        return Case("mtp.cli.main", command, [text], {path: rng.choice(broken)}, {text: "."})
    if rng.random() < 0.3:
        files, removed = broken_model(rng, world, text)
        return Case(
            "mtp.cli.main", ["generate", text, "1+2="], [text], files, {text: "export"}, removed
        )
    files, removed = broken_model(rng, world, f"{text}/stages/rl")
    if f"{text}/stages/rl/config.json" in removed:  # the stage before it is taken
        files, removed = {f"{text}/stages/rl/config.json": b"{"}, []
    return Case("mtp.cli.main", command, [text], files, {text: "."}, removed)


KINDS: dict[str, list[Callable[[Rng, World], Case]]] = {
    "config": [out_of_bounds, wrong_type, unknown_key, unknown_word, unknown_group, phases],
    "grammar": [grammar, command_line],
    "folder": [run_folder],
    "data": [data, settings_of_data],
    "reward": [reward],
    "model": [model],
    "checkpoint": [checkpoint],
    "command": [option, folder],
}


def make_case(world: World, seed: int, number: int, kind: str | None = None) -> tuple[str, Case]:
    """The generator's name and the case: a function of its arguments."""
    rng = random.Random(f"{seed}/{number}")
    kinds = [kind] if kind else [k for k in KINDS for _ in KINDS[k]]
    made = rng.choice(KINDS[rng.choice(kinds)])
    return made.__name__, made(rng, world)
