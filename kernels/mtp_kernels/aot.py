"""Ahead-of-time compilation of every shipped kernel configuration, without a GPU.

    python -m mtp_kernels.aot [--json]

compiles each kernel for each architecture with its configuration in `mtp_kernels.configs`, as the
JIT compiler would for bfloat16 and for float32 operands, in each of its variants: with a bias, with
a softcap, with sizes that 16 does not divide, greedy, and so on. It checks what the machine code
shows: no spilled registers, shared memory within the limit of a block, tensor-core instructions
where there is a product, and asynchronous copies where the architecture has them. Exits with 1 if
any check fails. `--json` prints one object as the last line of stdout.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtp_kernels.configs import ARCHITECTURES, KERNELS, Config, shipped_config

SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
"""Shared memory in bytes that one block may use."""
TENSOR_CORE = {"sm_90": "HGMMA", "sm_100": "UTC.*MMA", "gfx942": "v_mfma"} | dict.fromkeys(
    ("sm_80", "sm_89", "sm_120"), "HMMA"
)
"""Regular expression of the architecture's best matrix instruction for these dtypes."""
ASYNC_COPY = dict.fromkeys(("sm_80", "sm_89"), "LDGSTS") | dict.fromkeys(
    ("sm_90", "sm_100", "sm_120"), "LDGSTS|UTMALDG"
)
"""Regular expression of copies to shared memory that bypass registers; none asked on gfx942."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"HAS_BIAS": True, "HAS_DRAFT_BIAS": True},
    "softcap": {"HAS_SOFTCAP": True},
    "odd": {},
    "bias, softcap, odd": {"HAS_BIAS": True, "HAS_DRAFT_BIAS": True, "HAS_SOFTCAP": True},
    "greedy": {"GREEDY": True},
    "reverse": {"REVERSE": True},
    "reverse, teacher": {"REVERSE": True, "OF_TEACHER": True},
    "teacher": {"OF_TEACHER": True},
}
"""Compile-time parameters of each variant that a kernel may have. `odd`: V is not a multiple of 16,
so that rows of logits begin anywhere, and D is not a multiple of the product's steps, so that the
last one is masked. D is a multiple of 16 in any case, see `tiles.aligned`."""
OPTIONAL = {"HAS_DRAFT_BIAS"}
"""Parameters of a variant that not every kernel with this variant has."""

OPERANDS = {"hidden", "weight", "bias", "draft_hidden", "draft_weight", "draft_bias", "out"}
INDICES = {"target", "argmax", "place", "seed", "position", "tokens"}
SIZES = {"vocab", "depth", "draft_depth"}
"""Integers that the JIT compiler specialises on being multiples of 16."""
SCALARS = {"softcap", "inverse_temperature"}


@dataclass(frozen=True)
class Report:
    """Properties of the machine code of one configuration."""

    kernel: str
    target: str
    config: str
    variant: str
    """Key of `VARIANTS`."""
    registers: int
    """Registers per thread."""
    spill_bytes: int
    """Bytes per thread stored to local memory for want of registers."""
    shared_bytes: int
    """Shared memory per block."""
    shared_limit: int
    tensor_core: str | None
    """The matrix instruction found; None where there is none."""
    async_copy: str | None
    """The asynchronous copy found; None where there is none."""

    def failures(self) -> list[str]:
        """Failures that the gate finds."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes spilled")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} of {self.shared_limit} bytes of shared memory")
        if self.kernel != "gradient_from_logits":
            if self.tensor_core is None:
                found.append(f"no {TENSOR_CORE[self.target]} instruction")
            if self.async_copy is None and self.target in ASYNC_COPY:
                found.append(f"no {ASYNC_COPY[self.target]} instruction")
        return found


def kernel_source(
    kernel: str, config: Config, target: str, variant: str = "plain"
) -> tuple[Any, dict[str, Any]]:
    """(the JIT function, its constexprs) of a kernel's name in `configs.KERNELS`."""
    from mtp_kernels.linear_kl.triton import kl_gradient_kernel, kl_stats_kernel
    from mtp_kernels.linear_logprob.triton import row_gradient_kernel, row_stats_kernel
    from mtp_kernels.linear_loss.triton import gradient_from_logits_kernel
    from mtp_kernels.linear_sample.triton import sample_kernel
    from mtp_kernels.linear_verify.triton import residual_kernel
    from mtp_kernels.tiles import Tile

    precision = "ieee" if target.startswith("gfx") else "tf32x3"
    even = "odd" not in variant
    tile = Tile(config.rows, config.vocab, config.depth, even, precision, False, config.described)
    options = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "T": tile}
    table: dict[str, tuple[Any, dict[str, Any]]] = {
        "row_stats": (row_stats_kernel, {**options, "STORE": False}),
        "row_stats_store": (row_stats_kernel, {**options, "STORE": True}),
        "row_gradient": (row_gradient_kernel, options),
        "gradient_from_logits": (
            gradient_from_logits_kernel,
            {"HAS_SOFTCAP": False, "BV": config.vocab},
        ),
        "kl_stats": (kl_stats_kernel, {**options, "REVERSE": False}),
        "kl_gradient": (kl_gradient_kernel, {**options, "REVERSE": False, "OF_TEACHER": False}),
        "sample": (sample_kernel, {**options, "GREEDY": False, "STREAM": 0}),
        "residual": (residual_kernel, {**options, "STREAM": 2, "HAS_DRAFT_BIAS": False}),
    }
    function, constexprs = table[kernel]
    changed = {name: value for name, value in VARIANTS[variant].items() if name in constexprs}
    return function, constexprs | changed


def variants_of(kernel: str) -> list[str]:
    """The variants that a kernel has: those that change what is compiled."""
    _, constexprs = kernel_source(kernel, shipped_config(kernel, "sm_80", torch.bfloat16), "sm_80")
    return [v for v, changes in VARIANTS.items() if set(changes) - OPTIONAL <= set(constexprs)]


def argument_types(
    names: list[str], constexprs: dict[str, Any], operand: str, config: Config
) -> dict[str, str]:
    """Triton's signature of a kernel, from the names of its arguments and the operands' dtype."""
    from mtp_kernels.tiles import VARYING

    described = {}
    if config.described:
        described = {
            "hidden": f"tensordesc<{operand}[{config.rows},{config.depth}]>",
            "weight": f"tensordesc<{operand}[{config.vocab},{config.depth}]>",
        }
    types = {}
    for name in names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name in described:
            types[name] = described[name]
        elif name in OPERANDS:
            types[name] = f"*{operand}"
        elif name in INDICES:
            types[name] = "*i64"
        elif name == "rejected":
            types[name] = "*i32"
        elif name in SIZES or name in VARYING:
            types[name] = "i32"
        elif name in SCALARS:
            types[name] = "fp32"
        else:
            types[name] = "*fp32"
    return types


def compile_config(
    kernel: str, target: str, config: Config, operand: str = "bf16", variant: str = "plain"
) -> Report:
    """Compiles one configuration for operands "bf16" or "fp32" and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constexprs = kernel_source(kernel, config, target, variant)
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    types = argument_types(function.arg_names, constexprs, operand, config)
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if types[name].startswith("*")
        or (name in SIZES and not ("odd" in variant and name == "vocab"))
    }
    source = ASTSource(function, types, constexprs, aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=gpu, options=options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, code = read(compiled.asm, target)
    return Report(
        kernel,
        target,
        f"{operand} {config.rows}x{config.vocab}x{config.depth} w{config.warps} s{config.stages}"
        + " described" * config.described,
        variant,
        registers,
        spilled,
        compiled.metadata.shared,
        SHARED_LIMIT[target],
        _first(TENSOR_CORE[target], code),
        _first(ASYNC_COPY.get(target, r"buffer_load\S* .*\blds\b"), code),
    )


def _first(pattern: str, code: str) -> str | None:
    match = re.search(pattern, code)
    return match.group(0) if match else None


def _read_nvidia(asm: dict[str, Any], target: str) -> tuple[int, int, str]:
    """(registers, spilled bytes, SASS) of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / "ptxas-blackwell"  # Triton before 3.6 has one assembler for all
    if target not in ("sm_100", "sm_120") or not ptxas.is_file():
        ptxas = tools / "ptxas"
    arch = re.search(r"^\.target (\w+)", asm["ptx"], re.MULTILINE)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(asm["ptx"])
        log = _tool(str(ptxas), "-v", f"--gpu-name={arch.group(1)}", str(ptx), "-o", str(cubin))
        code = _tool(str(tools / "cuobjdump"), "-sass", str(cubin))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return registers, spilled, code


def _read_amd(asm: dict[str, Any], target: str) -> tuple[int, int, str]:
    """(vector registers, spilled bytes, assembly) of a compiled kernel."""
    code = asm["amdgcn"]
    counts = {
        name: max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", code))
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    spilled = 4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"])
    return counts["vgpr_count"], spilled, code


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_all(kernels: list[str], targets: list[str], variants: list[str]) -> Iterator[Report]:
    """Reports of the shipped configurations, one after the other."""
    for kernel in kernels:
        for target in targets:
            for operand, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
                for variant in [v for v in variants_of(kernel) if v in variants]:
                    is_aligned = "odd" not in variant
                    configs = {
                        shipped_config(
                            kernel, target, dtype, described, is_aligned, "softcap" in variant
                        )
                        for described in (True, False)
                    }
                    for config in sorted(configs, key=lambda c: c.described):
                        yield compile_config(kernel, target, config, operand, variant)


def main(arguments: list[str] | None = None) -> int:
    """Runs the gate; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mtp_kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this kernel")
    parser.add_argument("--target", action="append", choices=ARCHITECTURES, help="only this target")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this variant")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        # Triton decides at import whether functions are interpreted: start anew without it.
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        given = sys.argv[1:] if arguments is None else arguments
        return subprocess.call([sys.executable, "-m", "mtp_kernels.aot", *given], env=clean)
    reports, failed = [], 0
    for report in compile_all(
        options.kernel or list(KERNELS),
        options.target or list(ARCHITECTURES),
        options.variant or list(VARIANTS),
    ):
        reports.append(report)
        failures = report.failures()
        failed += bool(failures)
        print(
            f"{report.kernel:22} {report.target:7} {report.config:35} "
            f"{report.variant:18} "
            f"{report.registers:4} registers {report.spill_bytes:6} spilled "
            f"{report.shared_bytes:7} shared  {report.tensor_core} {report.async_copy}  "
            f"{'; '.join(failures) or 'ok'}",
            flush=True,
        )
    print(f"{len(reports) - failed} of {len(reports)} compiled kernels pass")
    if options.json:
        print(json.dumps({"configs": [asdict(report) for report in reports]}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
