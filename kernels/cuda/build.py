"""nvcc: finding it, building the kernels' library, asking what they use.

Standard library only and no relative import: setup.py loads this file by its path, where torch need not be installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "weighted_cross_entropy.cu"
LIBRARY = "_cuda_sm90.so"  # beside kernels/cuda_rows.py
SWITCH = "MEGAPRIOR_BUILD_CUDA"
FLAGS = ("-O3", "-std=c++17", "-gencode", "arch=compute_90,code=sm_90")


def wanted() -> bool:
    """Whether the environment asks for the kernels to be built."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


def find_nvcc() -> str:
    """$CUDA_HOME's, else the one on PATH, else /usr/local/cuda's. RuntimeError where there is none."""
    homes = [os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"]
    for home in homes:
        if found := shutil.which("nvcc", path=None if home is None else os.path.join(home, "bin")):
            return found
    raise RuntimeError(
        "nvcc is needed for the CUDA kernels and was found neither in $CUDA_HOME/bin, nor on PATH, nor in "
        f"/usr/local/cuda/bin: install the CUDA toolkit (12.0 or later), or leave {SWITCH} unset"
    )


def nvcc_release(nvcc: str | None = None) -> str:
    """Such as "13.0.88". RuntimeError without nvcc."""
    return _found(r"release .*V([\d.]+)", _output([nvcc or find_nvcc(), "--version"]))[0]


def source_digest() -> str:
    """16 hexadecimal digits of what the library is built from."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_library(target: Path) -> None:
    """Compile into `target`, whole or not at all. RuntimeError without nvcc or where it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        _run_nvcc(find_nvcc(), "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-o", str(built))
        built.replace(target)  # never over the pages of a library that some process has loaded


def resource_report(nvcc: str | None = None) -> list[tuple[str, int, int, int]]:
    """(kernel, registers, bytes of local memory, bytes of static shared memory) of every kernel, by name."""
    with tempfile.TemporaryDirectory() as folder:
        text = _run_nvcc(nvcc or find_nvcc(), "-cubin", "-Xptxas", "-v", "-o", str(Path(folder) / "kernels.cubin"))
    report = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        report.append(
            (
                part.split("'")[0],
                int(_found(r"Used (\d+) registers", part)[0]),
                sum(
                    map(
                        int, _found(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
                    )
                ),
                int(shared[1]) if shared else 0,
            )
        )
    return sorted(report)


def _found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"nvcc's report holds no {pattern!r}: {text[:200]!r}")
    return match.groups()


def _run_nvcc(nvcc: str, *options: str) -> str:
    return _output([nvcc, *FLAGS, f'-DMEGAPRIOR_SOURCE="{source_digest()}"', *options, str(SOURCE)])


def _output(command: list[str]) -> str:
    """What it prints on both streams; RuntimeError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
