"""Random models small enough for a test, and the ids that they speak."""

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from torch.utils._python_dispatch import TorchDispatchMode

from mtp.cli.hydra import register_configs
from mtp.config import to_run_config
from mtp.modeling.decode import decode
from mtp.modeling.decode_options import DecodeOptions
from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class
from mtp.modeling.output_layer import OutputLayer
from mtp.modeling.phases import PhasePlan
from mtp.modeling.records import pad
from mtp.modeling.sampler import Sampler
from mtp.reports.json_lines import read_records
from mtp.training.objectives.scored import OutputRows

EOS, CLOSE, PAD = 1, 2, 0
VOCABULARY = 23
GREEDY = Sampler(temperature=0)


HEADS = (
    "eavesdrop",
    "parallel",
    "eavesdrop that recalls",
    "parallel that recalls",
    "eagle3",
    "eagle3 that drafts",
)
"""Types of heads for `tiny_model`."""
DRAFT = [1, 2, 4, 5, 6, 8, 9, 12, 15, 18, 21]
"""A draft vocabulary: half of the tokens, the end and the delimiter among them."""

opens_gguf = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig"),
    reason="transformers before 5.18 reads the tokenizer of a GGUF file wrong",
)
checks_configs = pytest.mark.skipif(
    not is_dataclass(transformers.LlamaConfig),
    reason="transformers checks how the fields of a config fit together from 5.4 on",
)


def tiny_config(cls: Any, num_layers: int, tied: bool) -> Any:
    """Main's config of a random model: a few thousand parameters a layer."""
    return cls.config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.25,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def tiny_model(
    family: str = "llama",
    *,
    type: str = "eavesdrop",
    tied: bool = False,
    seed: int = 0,
    **head: object,
):
    """A random model of a few thousand parameters whose tokens vary from position to position."""
    torch.manual_seed(seed)
    cls = family_class(family)
    config = tiny_config(cls, 3, tied)
    kind, _, does = type.partition(" that ")
    settings = {"type": kind, "recall": does == "recalls", "num_slots": 3, "hidden_size": 16}
    settings |= {"intermediate_size": 24}
    if kind == "eagle3":
        settings |= {"hidden_size": 32, "taps": [1, 2, 3]}
    if does == "drafts":
        settings |= {"options": {"draft_vocab_size": len(DRAFT)}}
    config.mtp = asdict(HeadConfig(**{**settings, **head}))
    model = cls(config).eval()
    if does == "drafts":
        model.mtp_head.set_draft_tokens(DRAFT)
    return model


def run(
    model,
    prompts,
    plan,
    sampler=GREEDY,
    seed=0,
    max_new_tokens=24,
    on_block=None,
    num_return_sequences=1,
    **options,
):
    """Decode prompts of different lengths; further options are those of `DecodeOptions`."""
    tokens, lengths = pad(prompts, PAD)
    generator = torch.Generator().manual_seed(seed)
    given = {"sampler": sampler, "max_new_tokens": max_new_tokens, "pad_id": PAD}
    given |= {"generator": generator, **options}
    return decode(
        model,
        tokens,
        lengths,
        plan,
        DecodeOptions(**given),
        on_block=on_block,
        num_return_sequences=num_return_sequences,
    )


def head_rows(model, taps, tokens, block):
    """[K, E] the head's rows after a text by the definition: its taps [1, T, taps, D], its tokens
    [1, T], and the tokens that the last pass has sampled so far.
    """
    embeds = model.head_embed(torch.tensor([block]))
    context = model.head_context(taps, tokens, torch.tensor([taps.shape[1] - 1]))
    return model.mtp_head(context, embeds)[0]


def completions(out):
    """The new tokens of each row."""
    return [out.tokens[r, : out.lengths[r]].tolist() for r in range(len(out.tokens))]


ROOT = Path(__file__).parents[1]


TINY = [
    "stages.main.steps=6",
    "stages.head.steps=4",
    "stages.joint.steps=4",
    "stages.rl.steps=4",
    "stages.rl.rollouts.num_prompts=4",
    "stages.rl.rollouts.group_size=4",
    "evaluation.num_problems=8",
    "evaluation.num_interim_problems=4",
    "decoding.max_new_tokens=16",
    "stages.joint.evaluate_every=2",
    "stages.rl.evaluate_every=2",
    "logger.log_every=1",
    "fabric.accelerator=cpu",
    "fabric.num_threads=1",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "head.hidden_size=16",
    "head.intermediate_size=24",
]


SWEEP = [
    "stages.head.steps=0",
    "stages.joint.steps=0",
    "stages.rl.steps=0",
    "evaluation.num_problems=2",
    "evaluation.num_interim_problems=2",
    "fabric.accelerator=cpu",
    "fabric.num_threads=1",
]
"""Jobs of the main stage alone."""


def start_sweep(folder: Path, *arguments: str, env: dict[str, str] | None = None):
    """Start a sweep in a folder; its output is in a pipe."""
    command = [sys.executable, "train.py", "-m", f"hydra.sweep.dir={folder}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


CLOCKS = {"step_time", "rollout_time", "tokens_per_second"}


def run_config(run_dir: Path, *overrides: str):
    """The settings of a run of full size."""
    register_configs()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", [f"run_dir={run_dir}", *overrides])
    return to_run_config(composed)


def config(run_dir: Path, *overrides: str):
    """The settings of a run of seconds."""
    return run_config(run_dir, *TINY, *overrides)


def records(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in record.items() if k not in CLOCKS}
        for record in read_records(folder / "metrics.jsonl")
    ]


PLAN = PhasePlan(keep=[4, 1], opened_by=[None, CLOSE], eos_ids=[EOS])


SAMPLES = [([5, 6], [7, 8, 9, 10, CLOSE, 11, EOS]), ([3], [4, 5]), ([9, 9, 9], [12, 13, 14, 15])]


def emitter(rows: list[list[float]], targets: list[int]) -> OutputRows:
    """Rows of given probabilities, through an identity output matrix."""
    logits = torch.tensor(rows).log()
    return OutputRows(logits, OutputLayer(torch.eye(logits.shape[1])), torch.tensor(targets))


def rollouts(model, seed=0):
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12], [4, 4]]
    tokens, lengths = pad(prompts, PAD)
    out = decode(
        model,
        tokens,
        lengths,
        PLAN,
        DecodeOptions(
            sampler=Sampler(),
            max_new_tokens=20,
            pad_id=PAD,
            generator=torch.Generator().manual_seed(seed),
        ),
    )
    return prompts, out, torch.tensor([1.0, -1.0, 0.5, -0.5])


# The model code must work where mtp is not installed: any import of it fails here.
ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mtp", "mtp_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import mtp
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("mtp can be imported here, so this proves nothing")
"""


def run_alone(script: str, cache: Path) -> str:
    """Run Python without mtp, with an empty Hugging Face cache, and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE + script],
        cwd=cache,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU, on any device.

    They are those that read a tensor's values: to return a number or a list, or to find out the
    shape of their result.
    """

    OPERATIONS = {
        "aten._local_scalar_dense": 1,
        "aten.nonzero": 1,
        "aten.masked_select": 1,
        "aten._unique2": 1,
        "aten.unique_dim": 1,
        "aten.equal": 1,
        "aten.multinomial": 2,
    }
    READS = ("tolist", "numpy", "cpu")

    def __init__(self):
        super().__init__()
        self.count = 0
        self.patches = ExitStack()

    def __enter__(self):
        for name in self.READS:
            read = getattr(torch.Tensor, name)

            def counted(tensor, *args, read=read, **kwargs):
                self.count += 1
                return read(tensor, *args, **kwargs)

            self.patches.enter_context(mock.patch.object(torch.Tensor, name, counted))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0]
        self.count += self.OPERATIONS.get(name, 0)
        if name in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
            self.count += sum(i is not None and i.dtype == torch.bool for i in args[1])
        if name == "aten.repeat_interleave" and isinstance(args[-1], torch.Tensor):
            self.count += (kwargs or {}).get("output_size") is None
        return function(*args, **(kwargs or {}))
