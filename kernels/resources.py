"""What every kernel costs a multiprocessor, compiled for Hopper on any machine: no GPU is needed.

    python -m megaprior.kernels.resources          a table: registers per thread, spilled bytes, shared memory
    python -m megaprior.kernels.resources --json   the same as JSON, as tests/kernels/resources.json keeps it

A kernel that spills, or that needs more registers than its launch was chosen for, is as slow as one with a wrong algorithm:
a test holds these numbers to the recorded ones.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURE = 90
VOCABULARY = 128_256
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_ALIGNED = [["tt.divisibility", 16]]  # what a launch finds of pointers from torch and of padded row strides


class Cost(NamedTuple):
    """registers and spilled bytes per thread, bytes of shared memory per block known at compile time."""

    registers: int
    spilled: int
    shared: int


def triton_costs() -> dict[str, Cost]:
    """Every Triton kernel in the forms that launches use. Triton must not be in its interpreter (TRITON_INTERPRET)."""
    return {name: _compile(*form) for name, form in _forms()}


def cuda_costs() -> dict[str, Cost]:
    """Every kernel of the CUDA source. Raises RuntimeError without nvcc."""
    from . import cuda_rows

    return {f"cuda {name}": Cost(*numbers) for name, *numbers in cuda_rows.compile_report()}


def compilers() -> dict[str, str]:
    """Whose numbers these are: another release may allot registers otherwise."""
    import triton

    from . import cuda_rows

    return {"triton": triton.__version__, "nvcc": cuda_rows.nvcc_release()}


def _forms() -> Iterator[tuple[str, tuple[Any, dict[str, str], dict[str, Any], int]]]:
    """(name, (kernel, signature, constants, warps))."""
    from . import triton_rows as rows

    block, warps = rows.row_block(VOCABULARY)
    for dtype in ("bf16", "fp32"):
        for gradient in (True, False):
            signature = {
                "logits": f"*{dtype}", "row_stride": "i64", "targets": "*i64", "factors": "*fp32", "nlls": "*fp32",
                "vocabulary": "i32",
            }  # fmt: skip
            name = f"triton cross_entropy_rows {dtype} {'gradient' if gradient else 'nll only'}"
            yield name, (rows.cross_entropy_kernel, signature, {"GRADIENT": gradient, "BLOCK": block}, warps)
        signature = {"values": f"*{dtype}", "row_stride": "i64", "scale": "*fp32", "columns": "i32", "blocks": "i32"}
        form = rows.scale_kernel, signature, {"BLOCK": rows.SCALED_PER_BLOCK}, rows.SCALE_WARPS
        yield f"triton scale {dtype}", form
    for kind, alpha in (("logprob", 1.0), ("logprob", 0.5), ("importance", 1.0)):
        signature = {"scores": "*fp32", "edges": "*i32", "keep": "*i1", "weights": "*fp32"}
        constants = {"ALPHA": alpha, "LOGPROB": kind == "logprob", "LENGTH_SCALE": True, "BLOCK": rows.TOKENS_PER_BLOCK}
        yield f"triton token_weights {kind} alpha {alpha:g}", (rows.segment_weights_kernel, signature, constants, 4)


def _compile(kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int) -> Cost:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (index,): _ALIGNED
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("row_stride", "vocabulary")
    }
    source = ASTSource(
        kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants, attrs=aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options={"num_warps": warps})
    return _cost_of(compiled.asm["cubin"])


def _cost_of(binary: bytes) -> Cost:
    """Of one kernel's machine code, the very bytes that would run. What spills lies on a thread's stack or in its local
    memory, and these kernels put nothing else there."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, shared, local = (int(n) for n in _USAGE.findall(report)[0])
    return Cost(registers, stack + local, shared)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    costs = triton_costs() | cuda_costs()
    if options.json:
        kernels = {name: cost._asdict() for name, cost in costs.items()}
        print(json.dumps({"compilers": compilers(), "kernels": kernels}, indent=1))
        return
    print(", ".join(f"{name} {release}" for name, release in compilers().items()) + f", sm_{ARCHITECTURE}")
    print(f"{'kernel':48} {'registers':>9} {'spilled':>8} {'shared':>8}")
    for name, cost in costs.items():
        print(f"{name:48} {cost.registers:9} {cost.spilled:8} {cost.shared:8}")


if __name__ == "__main__":
    main()
