"""The ahead-of-time gate: two configurations by default, every shipped one when slow tests run."""

import json
import subprocess
import sys
from os import environ
from pathlib import Path

import pytest
import torch
from mtp_kernels.configs import ARCHITECTURES, KERNELS
from mtp_kernels.dispatch import rows_per_chunk

KERNELS_FOLDER = str(Path(__file__).parents[2] / "kernels")
FIELDS = {
    "kernel",
    "target",
    "config",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "shared_limit",
    "tensor_core",
    "async_copy",
}


def gate(*arguments: str) -> tuple[int, list[dict]]:
    """(exit status, configurations) of the command, run as a user runs it."""
    command = [sys.executable, "-m", "mtp_kernels.aot", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNELS_FOLDER)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])["configs"]


def test_a_product_on_hopper_uses_its_tensor_cores_without_spilling():
    status, configs = gate("--kernel", "row_gradient", "--target", "sm_90")
    assert status == 0
    # bfloat16 operands, the same read through descriptors, and float32 operands
    assert [config["async_copy"] for config in configs] == ["LDGSTS", "UTMALDG", "LDGSTS"]
    for config in configs:
        assert set(config) == FIELDS
        assert config["spill_bytes"] == 0
        assert config["shared_bytes"] <= config["shared_limit"]
        assert config["tensor_core"] == "HGMMA"


@pytest.mark.slow
def test_every_shipped_configuration_passes():
    status, configs = gate()
    assert status == 0, [config for config in configs if config["spill_bytes"]]
    described = [config for config in configs if "described" in config["config"]]
    assert len(configs) - len(described) == 2 * len(KERNELS) * len(ARCHITECTURES)
    assert len(described) == 4
    assert all(config["async_copy"] == "UTMALDG" for config in described)


def test_addresses_of_rows_are_computed_in_64_bits():
    """40,960 rows of 128,256 logits pass 2**31: row times stride must not be an i32 product.

    What may be one: the row of a teacher's logits, of which a chunk holds less than 2**31. Where
    noise is sampled, its 32-bit words are multiplied too: there the operands' rows are counted.
    """
    program = """
import re
from mtp_kernels.aot import argument_types, kernel_source
from mtp_kernels.configs import KERNELS, shipped_config
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for kernel in KERNELS:
    config = shipped_config(kernel, "sm_90", torch.bfloat16, described=False)
    function, constexprs = kernel_source(kernel, config, "sm_90")
    types = argument_types(function.arg_names, constexprs, "bf16", config)
    compiled = triton.compile(ASTSource(function, types, constexprs), GPUTarget("cuda", 90, 32))
    column = r"arith.muli .*: tensor<(?:\\d+x1|1x\\d+)x(i\\d+)>"
    products = re.findall(column, compiled.asm["ttir"])
    if kernel == "gradient_from_logits":
        products = re.findall(r"arith.muli %row\\S*, \\S+ : (i\\d+)", compiled.asm["ttir"])
    if kernel in ("sample", "residual"):
        assert products.count("i64") == {"sample": 2, "residual": 4}[kernel], (kernel, products)
    else:
        teacher = kernel.startswith("kl")
        assert products and products.count("i32") <= teacher, (kernel, products)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=KERNELS_FOLDER,
        env={k: v for k, v in environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_chunk_on_a_device_is_addressed_in_32_bits():
    operand = torch.empty(0, 16_384, dtype=torch.bfloat16, device="meta")
    for vocab in (7, 49_152, 262_144, 1_000_003):
        for tall in (False, True):
            assert 0 < rows_per_chunk(10**9, vocab, operand, tall=tall) * vocab < 2**31
