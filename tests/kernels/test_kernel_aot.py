"""The ahead-of-time gate: two configurations by default, every shipped one when slow tests run."""

import json
import subprocess
import sys
from os import environ
from pathlib import Path

import pytest
import torch
from kernel_cases import reads_compiled_code
from mtp_kernels.configs import ARCHITECTURES, KERNELS
from mtp_kernels.dispatch import rows_per_chunk
from mtp_kernels.tiles import aligned

KERNELS_FOLDER = str(Path(__file__).parents[2] / "kernels")
COMPILES = {k: v for k, v in environ.items() if k != "TRITON_INTERPRET"}
"""An environment in which Triton compiles; the command would start anew without the variable."""
DESCRIBED = {"row_stats", "row_stats_store", "row_gradient", "kl_gradient"}
"""Kernels of which one configuration reads its operands through descriptors."""
FIELDS = {
    "kernel",
    "target",
    "config",
    "variant",
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
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNELS_FOLDER, env=COMPILES)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])["configs"]


@reads_compiled_code
def test_a_product_on_hopper_uses_its_tensor_cores_without_spilling():
    status, configs = gate("--kernel", "row_gradient", "--target", "sm_90", "--variant", "plain")
    assert status == 0
    # bfloat16 operands, the same read through descriptors, and float32 operands
    assert [config["async_copy"] for config in configs] == ["LDGSTS", "UTMALDG", "LDGSTS"]
    for config in configs:
        assert set(config) == FIELDS
        assert config["spill_bytes"] == 0
        assert config["shared_bytes"] <= config["shared_limit"]
        assert config["tensor_core"] == "HGMMA"


def test_a_block_of_a_consumer_gpu_has_99_kib_and_odd_sizes_do_not_spill():
    for target in ("sm_89", "sm_120"):
        status, (config, *_) = gate(
            "--kernel", "row_stats_store", "--target", target, "--variant", "odd"
        )
        assert status == 0
        assert config["shared_limit"] == 99 << 10 and config["tensor_core"] == "HMMA"


def test_rows_of_odd_length_are_padded_with_zeros():
    rows = torch.arange(1.0, 11.0).view(2, 5)
    padded = aligned(rows)
    assert padded.shape == (2, 16) and padded.is_contiguous()
    assert torch.equal(padded[:, :5], rows) and not padded[:, 5:].any()
    assert aligned(padded) is padded


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shipped_configuration_passes(kernel):
    status, configs = gate("--kernel", kernel)
    assert status == 0, [config for config in configs if config["spill_bytes"]]
    described = [config for config in configs if "described" in config["config"]]
    plain = [config for config in configs if config["variant"] == "plain"]
    in_plain = [config for config in described if config["variant"] == "plain"]
    assert {config["kernel"] for config in configs} == {kernel}
    assert len(plain) - len(in_plain) == 2 * len(ARCHITECTURES)
    assert len(in_plain) == (kernel in DESCRIBED)
    assert all(config["async_copy"] == "UTMALDG" for config in described)


@reads_compiled_code
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
        env=COMPILES,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_chunk_on_a_device_is_addressed_in_32_bits():
    operand = torch.empty(0, 16_384, dtype=torch.bfloat16, device="meta")
    for vocab in (7, 49_152, 262_144, 1_000_003):
        for tall in (False, True):
            assert 0 < rows_per_chunk(10**9, vocab, operand, tall=tall) * vocab < 2**31
