"""Does an export that one version of transformers wrote open in another? Run once with each.

    .venv/bin/python .ci/stacks/trusted_loading.py write FOLDER
    .venv-oldest/bin/python .ci/stacks/trusted_loading.py read FOLDER

`write` makes exports of two tiny random models and notes the tokens and passes of each mode. `read`
opens them with `trust_remote_code=True`, with mtp made unimportable, and compares.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

ROOT = Path(__file__).parents[2]
FAMILIES, MODES = ("llama", "qwen3"), ("fast", "slow", "verified")
IDS = torch.tensor([[2, 5, 6, 7, 8], [0, 0, 2, 9, 4]])


def decoded(model):
    """Tokens and passes of each mode."""
    given = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "max_new_tokens": 20}
    found = {}
    for mode in MODES:
        out = model.generate(**given, mtp_mode=mode, return_dict_in_generate=True)
        found[mode] = [out.sequences.tolist(), out.passes.tolist()]
    return found


def write(folder):
    """Export the models and what they write."""
    sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "tests", "tests/hub")]
    from test_export import make

    expected = {family: decoded(make(folder / family, family)[0]) for family in FAMILIES}
    (folder / "expected.json").write_text(json.dumps(expected))
    print(f"written by transformers {transformers.__version__}")


def read(folder):
    """Open the exports without mtp; exit code 1 if a mode differs."""
    sys.modules["mtp"] = None  # an import of it is an error
    expected = json.loads((folder / "expected.json").read_text())
    differ = []
    for family in FAMILIES:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / family, trust_remote_code=True
        )
        found = decoded(model)
        differ += [f"{family} {mode}" for mode in MODES if found[mode] != expected[family][mode]]
    print(f"read by transformers {transformers.__version__}: ", end="")
    print(f"differ: {', '.join(differ)}" if differ else "all modes are identical")
    return int(bool(differ))


if __name__ == "__main__":
    action, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    sys.exit({"write": write, "read": read}[action](Path(folder)))
