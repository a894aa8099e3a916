"""Time of an optimizer step of Muon on a CPU: the iteration in bfloat16 beside float32.

    python benchmarks/muon.py [--json] [--repeats N] [--threads N]

The matrices are those of the default experiment's main. `torch` is `torch.optim.Muon`, whose
iteration is in bfloat16 (left out where torch has none). Contenders take turns and medians are
reported.
"""

import torch
from attention import main_of, read_options
from measure import print_json, take_turns

from mtp.training.muon import Muon
from mtp.training.optimizers import is_hidden_matrix, split_parameters


def main() -> None:
    """Measures, and prints a line."""
    options = read_options(__doc__)
    parameters = split_parameters(main_of("running_sum"))["main"]
    matrices = [p for name, p in parameters.items() if is_hidden_matrix(name, p)]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    made = {
        name: Muon(matrices, 1e-3, 0.0, dtype)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    contenders = {name: optimizer.step for name, optimizer in made.items()}
    if hasattr(torch.optim, "Muon"):
        contenders["torch"] = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw").step
    median, _ = take_turns(contenders, options.repeats)
    ratio = median["bfloat16"] / median["float32"]
    times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in median.items())
    print(
        f"{len(matrices)} matrices, {options.threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}: {times}; bfloat16 over float32 {ratio:.1f}"
    )
    print_json(options.json, {**median, "bfloat16_over_float32": ratio})


if __name__ == "__main__":
    main()
