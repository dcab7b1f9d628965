"""Row kernels in CUDA C++ for compute capability 9.0 (H100, H200): kernels/cuda, called through ctypes.

n rows, V vocabulary. The library is optional: `MEGAPRIOR_BUILD_CUDA=1 pip install .` builds it. Importing this module loads
nothing and needs no device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .cuda import build

LIBRARY = Path(__file__).with_name(build.LIBRARY)
REMEDY = f"reinstall with {build.SWITCH}=1 (needs nvcc)"
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the codes of the C interface
CAPABILITY = (9, 0)

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES = {
    # logits, dtype, rows, vocabulary, row stride, targets, factor, nll, gradient, stream
    "megaprior_cross_entropy_rows": (
        _pointer, _int, _long, _long, _long, _pointer, _pointer, _pointer, _int, _pointer
    ),
    # values, dtype, rows, columns, row stride, scale, stream
    "megaprior_scale": (_pointer, _int, _long, _long, _long, _pointer, _pointer),
    # vocabulary, dtype, three values
    "megaprior_plan": (_long, _int, ctypes.POINTER(ctypes.c_int64)),
}  # fmt: skip


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these kernels can run on tensors of that device and dtype, else why not and what to do about it."""
    if not LIBRARY.exists():
        return f"the CUDA kernels are not built: {REMEDY}"
    if device.type != "cuda":
        return f"the tensors are on the {device.type.upper()}: the CUDA kernels need them on an NVIDIA GPU"
    if torch.version.hip is not None:
        return "this torch drives AMD GPUs: the CUDA kernels need an NVIDIA GPU of compute capability 9.0"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return (
            f"the device has compute capability {capability[0]}.{capability[1]}: the CUDA kernels are built for 9.0 "
            "(H100, H200); use 'triton'"
        )
    if dtype not in DTYPES:
        return f"{dtype} is not for the CUDA kernels: they take float32 and bfloat16"
    try:
        _library()
    except RuntimeError as error:
        return str(error)
    return None


def cross_entropy_rows(logits: Tensor, targets: Tensor, factor: Tensor, nll: Tensor, *, gradient: bool) -> None:
    """Write the nll of every row and, with `gradient`, turn the row into the gradient of factor * nll, in place.

    One read and at most one write of the logits; on the current stream, without waiting.

    Args:
        logits: (n, V) float32 or bfloat16, neighbours in a row adjacent in memory; rows may be padded and may begin
            anywhere. Padding is neither read nor written.
        targets: (n,) int64. Below 0: no target, so nll 0 and a gradient of zeros. V or above makes the row NaN.
        factor: (n,) float32; read only with `gradient`. 0 gives a gradient of exact zeros whatever the row holds.
        nll: (n,) float32, written.

    Raises:
        ValueError: other shapes, dtypes or strides, or tensors of different devices.
        RuntimeError: CUDA reports an error, or a row is larger than a cluster's shared memory (1.7 MiB).
    """
    rows, vocabulary = _check_matrix("logits", logits)
    for name, vector, dtype in (("targets", targets, torch.int64), ("factor", factor, torch.float32),
                                ("nll", nll, torch.float32)):  # fmt: skip
        if vector.shape != (rows,) or vector.dtype != dtype or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be ({rows},) {dtype}, contiguous, not {vector.dtype} of {tuple(vector.shape)}"
            )
        _check_device(name, vector, logits)
    if not rows:
        return
    _launch(
        "megaprior_cross_entropy_rows", logits, rows, vocabulary,
        targets.data_ptr(), factor.data_ptr(), nll.data_ptr(), int(gradient),
    )  # fmt: skip


def scale_(values: Tensor, scale: Tensor) -> None:
    """values *= scale in place, on the current stream, without waiting; nothing is read or written where scale is 1.

    values: (n, V) float32 or bfloat16, as logits above.  scale: one float32 on the same device.
    Raises as `cross_entropy_rows`.
    """
    rows, columns = _check_matrix("values", values)
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(f"scale must be one float32, not {scale.dtype} of {tuple(scale.shape)}")
    _check_device("scale", scale, values)
    if rows and columns:
        _launch("megaprior_scale", values, rows, columns, scale.data_ptr())


def plan(vocabulary: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(blocks of a cluster, threads of a block, bytes of a block's slice) of a row; needs the library, not a device."""
    values = (ctypes.c_int64 * 3)()
    _check(_library().megaprior_plan(vocabulary, DTYPES[dtype], values))
    return values[0], values[1], values[2]


def compile_report(nvcc: str | None = None) -> list[tuple[str, int, int, int]]:
    """Compile the kernels into a temporary folder and say what each uses.

    Args:
        nvcc: the compiler; None looks in $CUDA_HOME/bin, on PATH and in /usr/local/cuda/bin.

    Returns:
        (kernel, registers per thread, bytes of local memory, bytes of static shared memory) of every kernel, by name; the
        name ends in the dtype. Local memory is stack and spills together: 0 means that nothing is spilled. The slice of
        the row comes on top of the shared memory, see `plan`.

    Raises:
        RuntimeError: no nvcc, or it fails.
    """
    return build.resource_report(nvcc)


def nvcc_release(nvcc: str | None = None) -> str:
    """The release of the compiler that `compile_report` would use, such as "13.0.88". RuntimeError without one."""
    return build.nvcc_release(nvcc)


def _launch(function: str, matrix: Tensor, rows: int, columns: int, *arguments: int) -> None:
    stride = matrix.stride(0) if rows > 1 else columns  # of a single row torch may say anything
    call = getattr(_library(), function)
    with _stream(matrix.device) as stream:
        _check(call(matrix.data_ptr(), DTYPES[matrix.dtype], rows, columns, stride, *arguments, stream))


@contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    """The device made current, and the handle of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _library() -> ctypes.CDLL:
    """RuntimeError where it is missing, does not load, or was built from other sources than those beside it."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise RuntimeError(f"the CUDA kernels cannot be loaded ({error}): {REMEDY}") from error
    source = library.megaprior_source  # before anything else: an older build may lack what is asked of it
    source.argtypes, source.restype = (), ctypes.c_char_p
    if source().decode() != build.source_digest():
        raise RuntimeError(f"the CUDA kernels were built from other sources: {REMEDY}")
    declare(library)
    return library


def declare(library: ctypes.CDLL) -> None:
    """Give the library's functions their C signatures."""
    for name, signature in SIGNATURES.items():
        getattr(library, name).argtypes = signature
        getattr(library, name).restype = ctypes.c_int
    library.megaprior_error.argtypes, library.megaprior_error.restype = (ctypes.c_int,), ctypes.c_char_p


def _check(code: int) -> None:
    if code:
        raise RuntimeError(
            f"the CUDA kernel could not be run: {_library().megaprior_error(code).decode()} (code {code})"
        )


def _check_matrix(name: str, matrix: Tensor) -> tuple[int, int]:
    if matrix.ndim != 2 or matrix.dtype not in DTYPES:
        raise ValueError(f"{name} must be (n, V) float32 or bfloat16, not {matrix.dtype} of {tuple(matrix.shape)}")
    rows, columns = matrix.shape
    if (columns > 1 and matrix.stride(1) != 1) or (rows > 1 and matrix.stride(0) < columns):
        raise ValueError(
            f"{name} must have rows of adjacent elements that do not overlap, not strides {matrix.stride()}"
        )
    return rows, columns


def _check_device(name: str, tensor: Tensor, matrix: Tensor) -> None:
    if tensor.device != matrix.device:
        raise ValueError(f"{name} is on {tensor.device} and the rows are on {matrix.device}: they must be together")
