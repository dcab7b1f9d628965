"""The CUDA row kernels against float64, without a GPU: kernels/cuda/emulation.cpp runs the very bodies of the kernels on the
CPU, thread by thread in random order, behind the same C interface and the same Python functions. What stays unproved until
a device runs them - the same tests do, where there is one - is that the hardware's copies and barriers do what their names
say, the launch itself, and speed.

n rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaprior.kernels import cuda_rows, oracle
from megaprior.kernels.cuda import build

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])
GUARD = 777.0  # what lies around the rows


@dataclass(frozen=True)
class Backend:
    """Where the kernels run. `arrange(seed, slots)`: the order of threads, and slots per block (0: as on a device)."""

    device: str
    arrange: Callable[[int, int], None]


def compiled_emulation(folder: Path, sources: Path = build.FOLDER) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc")
    target = folder / "emulation.so"
    shared = ["-Xcompiler", "-fPIC"] if compiler.endswith("nvcc") else ["-fPIC", "-Wall", "-Wextra"]
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-shared", *shared, "-o", target, sources / "emulation.cpp"], check=True
    )
    library = ctypes.CDLL(str(target))
    cuda_rows.declare(library)
    library.megaprior_emulation.argtypes, library.megaprior_emulation.restype = (ctypes.c_uint64, ctypes.c_int64), None
    return library


def emulate(patch: pytest.MonkeyPatch, library: ctypes.CDLL) -> Backend:
    patch.setattr(cuda_rows, "_library", lambda: library)
    patch.setattr(cuda_rows, "_stream", lambda device: nullcontext(0))
    return Backend("cpu", library.megaprior_emulation)


@pytest.fixture(scope="module", params=["emulated", "device"])
def backend(request, tmp_path_factory) -> Iterator[Backend]:
    if request.param == "device":
        if not torch.cuda.is_available() or cuda_rows.unavailable(torch.device("cuda"), F32):
            pytest.skip("needs a CUDA device of compute capability 9.0, and the kernels built")
        yield Backend("cuda", lambda seed, slots: None)
        return
    with pytest.MonkeyPatch.context() as patch:
        yield emulate(patch, compiled_emulation(tmp_path_factory.mktemp("cuda")))


def laid_out(values: torch.Tensor, *, stride: int = 0, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory that ends where the last row ends, the rows in it); values (n, V)."""
    rows, vocabulary = values.shape
    stride = max(stride, vocabulary)
    memory = values.new_full((offset + (rows - 1) * stride + vocabulary,), GUARD)
    view = memory.as_strided((rows, vocabulary), (stride, 1), offset)
    return memory, view.copy_(values)


def exactly(logits, targets, factor, dtype=torch.float64):
    """(nll, gradient of sum(factor * nll)) from the oracle, the logits taken in `dtype`."""
    leaf = logits.detach().to(dtype).requires_grad_()
    labels = targets.where(targets >= 0, -100)
    loss, nll = oracle.weighted_cross_entropy(leaf, labels, factor.to(torch.float64), denominator=1)
    return nll, torch.autograd.grad(loss, leaf)[0]


def check(backend, logits, targets, factor, *, gradient=True, stride=0, offset=0):
    """Run the rows and compare everything with float64, memory beside the rows included. -> (nll, gradient)"""
    logits, targets, factor = (tensor.to(backend.device) for tensor in (logits, targets, factor))
    memory, rows = laid_out(logits, stride=stride, offset=offset)
    nll = torch.full_like(factor, GUARD)
    cuda_rows.cross_entropy_rows(rows, targets, factor, nll, gradient=gradient)
    want_nll, want = exactly(logits, targets, factor)
    torch.testing.assert_close(nll.double(), want_nll.double(), rtol=5e-7, atol=1e-6)  # 9e-7 seen: half an ulp of 12
    assert (nll >= 0).all()
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(rows.shape, rows.stride(), offset).fill_(False)
    assert (memory[outside] == GUARD).all()
    if not gradient:
        assert torch.equal(rows, logits)
        return nll, None
    bare = (targets < 0) | (factor == 0)
    assert (rows[bare] == 0).all()
    rounding = 2.0**-8 if logits.dtype == BF16 else 1e-5  # 3.9e-3 and 1.2e-6 seen; more where logits are far apart
    torch.testing.assert_close(rows.double(), want, rtol=rounding, atol=2e-7 * factor.abs().max().item())
    return nll, rows


def problem(vocabulary, targets, *, dtype, seed=0, spread=3.0):
    make = torch.Generator().manual_seed(seed)
    on_cpu = {"generator": make, "device": "cpu"}
    rows = len(targets)
    logits = (spread * torch.randn(rows, vocabulary, **on_cpu)).to(dtype)
    factor = (2 * torch.rand(rows, **on_cpu) + 0.1) * (torch.randint(2, (rows,), **on_cpu) * 2 - 1)
    return logits, torch.tensor(targets, device="cpu"), factor


def edges(vocabulary: int, dtype: torch.dtype) -> list[int]:
    """The first and last column, and those on both sides of where one block's slice meets the next one's."""
    blocks, _, slice_bytes = cuda_rows.plan(vocabulary, dtype)
    starts = [block * slice_bytes // dtype.itemsize for block in range(1, blocks)]
    return [0, vocabulary - 1, *(column for start in starts[:3] for column in (start - 1, start))]


@DTYPES
@pytest.mark.parametrize(
    ("vocabulary", "stride", "offset"),
    [(1, 0, 0), (7, 0, 0), (8, 8, 0), (1000, 0, 0), (32_001, 32_064, 0), (32_001, 0, 3), (128_256, 0, 0)],
)
def test_rows_match_float64(backend, dtype, vocabulary, stride, offset):
    backend.arrange(vocabulary, 0)
    targets = [*edges(vocabulary, dtype), -1, vocabulary // 2, vocabulary // 3]
    logits, targets, factor = problem(vocabulary, targets, dtype=dtype)
    factor[-2] = 0
    nll, _ = check(backend, logits, targets, factor, stride=stride, offset=offset)
    assert nll[-3] == 0  # no target
    few = slice(0, 2)  # the same places in memory: where a row begins decides the order of its sum
    again, _ = check(backend, logits[few], targets[few], factor[few], gradient=False, stride=stride, offset=offset)
    assert torch.equal(again, nll[few])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([F32, BF16]), gradient=st.booleans())
def test_any_shape_alignment_and_order_of_threads(backend, data, dtype, gradient):
    """Clusters of up to eight blocks over short rows, which a device would give to one block."""
    vocabulary, seed = data.draw(st.integers(1, 700) | st.integers(2000, 9000)), data.draw(st.integers(0, 2**32))
    backend.arrange(seed, data.draw(st.sampled_from([0, 1, 8, 40, 300])))
    targets = data.draw(st.lists(st.integers(-1, vocabulary - 1), min_size=1, max_size=4))
    logits, targets, factor = problem(vocabulary, targets, dtype=dtype, seed=seed % 1000)
    factor[data.draw(st.integers(0, len(targets) - 1))] = data.draw(st.sampled_from([0.0, 1.0, -3.0]))
    stride, offset = vocabulary + data.draw(st.integers(0, 17)), data.draw(st.integers(0, 9))
    check(backend, logits, targets, factor, gradient=gradient, stride=stride, offset=offset)


@DTYPES
@pytest.mark.parametrize("slots", [0, 8])
def test_the_far_ends_of_softmax(backend, dtype, slots):
    backend.arrange(1, slots)
    columns = 300
    logits = torch.full((5, columns), -math.inf, device="cpu")
    logits[0, ::7] = torch.linspace(-30, 40, 43, device="cpu")  # a vocabulary masked but for a few
    logits[1, [3, 299]] = torch.tensor([100.0, -100.0], device="cpu")
    logits[2, 250:] = torch.arange(50.0, device="cpu")  # whole slices of -inf
    logits[3:] = 0.0
    logits[4, 5] = 1e4
    targets = torch.tensor([294, 299, 299, 7, 5], device="cpu")
    nll, rows = check(backend, logits.to(dtype), targets, torch.tensor([1.0, 2.0, -3.0, 4.0, 5.0], device="cpu"))
    assert nll[1] == 200
    assert nll[4] == 0
    assert (rows[4] == 0).all()
    masked = torch.tensor([0, 1], device="cpu")  # targets that are themselves masked: an infinite nll
    infinite = torch.full_like(masked, math.nan, dtype=F32).to(backend.device)
    logits = logits[:2].to(backend.device, dtype)
    cuda_rows.cross_entropy_rows(
        logits, (masked + 1).to(backend.device), torch.tensor([0.0, 1.0]).to(backend.device), infinite, gradient=True
    )
    assert infinite.tolist() == [math.inf, math.inf]
    assert (logits[0] == 0).all()
    assert logits[1, 2] == -1


@DTYPES
def test_nan_propagates_and_weight_zero_stops_it(backend, dtype):
    backend.arrange(2, 8)
    for bad in (math.nan, math.inf):
        logits, targets, factor = (t.to(backend.device) for t in problem(300, [4, 9, 11, 300, -1], dtype=dtype))
        logits[:, 170], factor[1] = bad, 0
        nll = torch.zeros_like(factor)
        cuda_rows.cross_entropy_rows(logits, targets, factor, nll, gradient=True)
        assert nll.isnan().tolist() == [
            True,
            True,
            True,
            True,
            False,
        ]  # 300 is no column: nothing beside the row is read
        assert logits[[0, 2, 3]].isnan().all()
        assert (logits[[1, 4]] == 0).all()


def test_bfloat16_errs_at_most_twice_what_the_plain_path_errs(backend):
    backend.arrange(3, 0)
    logits, targets, factor = (t.to(backend.device) for t in problem(5000, [*range(0, 5000, 250)], dtype=BF16))
    nll, rows = check(backend, logits, targets, factor)
    exact, plain = exactly(logits, targets, factor), exactly(logits, targets, factor, dtype=BF16)
    for ours, theirs, true in zip((nll, rows), plain, exact, strict=True):
        assert (ours.double() - true).norm() <= 2 * (theirs.double() - true).norm() + 1e-6


@DTYPES
@pytest.mark.parametrize(("columns", "stride", "offset"), [(1, 0, 1), (17, 0, 0), (9000, 9008, 0), (9001, 0, 5)])
def test_scale(backend, dtype, columns, stride, offset):
    values, _, _ = problem(columns, [0, 0, 0], dtype=dtype)
    values[1, 0] = math.nan
    memory, rows = laid_out(values.to(backend.device), stride=stride, offset=offset)
    for factor, want in ((1.0, rows.clone()), (-0.37, (rows.float() * -0.37).to(dtype))):
        scale = torch.tensor(factor, device=backend.device)
        cuda_rows.scale_(rows, scale)
        assert torch.equal(rows.isnan(), want.isnan())
        assert torch.equal(rows.nan_to_num(), want.nan_to_num())
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(rows.shape, rows.stride(), offset).fill_(False)
    assert (memory[outside] == GUARD).all()


def test_the_plan_of_a_row(backend):
    backend.arrange(0, 0)
    assert cuda_rows.plan(128_256, BF16) == (4, 512, 64_256)  # three such blocks fit a multiprocessor's 228 KiB
    assert cuda_rows.plan(128_256, F32) == (8, 512, 64_256)
    assert cuda_rows.plan(32_000, BF16)[0] == 1
    assert cuda_rows.plan(8, BF16) == (1, 32, 32)
    for dtype, most in ((BF16, 928_761), (F32, 464_381)):
        blocks, threads, slice_bytes = cuda_rows.plan(most, dtype)
        assert (blocks, threads) == (8, 512)
        assert slice_bytes + 256 <= 227 * 1024
        with pytest.raises(RuntimeError, match="does not fit the shared memory of eight blocks"):
            cuda_rows.plan(most + 1, dtype)


@pytest.mark.parametrize(
    "without",
    ["machine.block_barrier();  // (2)", "machine.cluster_wait();   // (1)", "machine.cluster_wait();            // (3)",
     "machine.wait_for_copies();"],
)  # fmt: skip
def test_the_emulation_misses_a_barrier_that_is_left_out(tmp_path, without):
    """Else its agreement with float64 would say nothing about them."""
    sources = shutil.copytree(build.FOLDER, tmp_path / "cuda")
    body = (sources / "rows.h").read_text(encoding="utf-8")
    assert without in body
    (sources / "rows.h").write_text(body.replace(without, ""), encoding="utf-8")
    logits, targets, factor = problem(8000, [3, 7999, 5000, 6000], dtype=F32)
    with pytest.MonkeyPatch.context() as patch:
        backend = emulate(patch, compiled_emulation(tmp_path, sources))
        backend.arrange(4, 512)
        assert cuda_rows.plan(8000, F32)[:2] == (4, 64)
        with pytest.raises((AssertionError, RuntimeError)):
            check(backend, logits, targets, factor)
