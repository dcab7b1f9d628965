"""The CUDA kernels' compiler, library and binding, as far as they go without a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megaprior.kernels import cuda_rows
from megaprior.kernels.cuda import build

ROOT = Path(__file__).resolve().parents[2]
F32, BF16 = torch.float32, torch.bfloat16
KERNELS = ["cross_entropy_rows_bf16", "cross_entropy_rows_fp32", "scale_bf16", "scale_fp32"]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        return build.find_nvcc()
    except RuntimeError:
        pytest.skip("needs nvcc")


@pytest.fixture
def built(nvcc, tmp_path, monkeypatch) -> Path:
    """The library, where the binding looks for it."""
    target = tmp_path / "kernels" / build.LIBRARY
    build.build_library(target)
    monkeypatch.setattr(cuda_rows, "LIBRARY", target)
    monkeypatch.setattr(cuda_rows, "_library", cuda_rows._library.__wrapped__)
    return target


def test_nothing_spills_and_three_blocks_fit(nvcc):
    report = cuda_rows.compile_report(nvcc)
    assert [name for name, *_ in report] == KERNELS
    for name, registers, local, shared in report:
        assert local == 0, name
        threads, blocks = (512, 3) if "rows" in name else (256, 4)
        assert 0 < registers <= 65_536 // (threads * blocks) // 8 * 8, name  # the device allots them by eights
        assert shared <= 256
    assert re.fullmatch(r"\d+\.\d+\.\d+", cuda_rows.nvcc_release(nvcc))


def test_without_nvcc_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    for call in (
        cuda_rows.compile_report,
        cuda_rows.nvcc_release,
        lambda: build.build_library(tmp_path / "library.so"),
    ):
        with pytest.raises(RuntimeError, match=r"^nvcc is needed .*install the CUDA toolkit.*$"):
            call()
    with pytest.raises(RuntimeError, match=r"/nowhere/nvcc cannot be run"):
        cuda_rows.compile_report("/nowhere/nvcc")


def test_nvcc_is_sought_in_order(monkeypatch, tmp_path):
    places = [tmp_path / name / "bin" for name in ("home", "path")]
    for place in places:
        place.mkdir(parents=True)
        (place / "nvcc").write_text("#!/bin/sh\n", encoding="utf-8")
        (place / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(places[1]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(places[0] / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert build.find_nvcc() == str(places[1] / "nvcc")


def test_importing_loads_nothing():
    script = (
        "import torch, megaprior.kernels.cuda_rows as c; assert c._library.cache_info().misses == 0; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_why_it_cannot_run(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_rows, "LIBRARY", tmp_path / build.LIBRARY)
    monkeypatch.setattr(cuda_rows, "_library", cuda_rows._library.__wrapped__)
    assert cuda_rows.unavailable(CPU, F32) == (
        "the CUDA kernels are not built: reinstall with MEGAPRIOR_BUILD_CUDA=1 (needs nvcc)"
    )
    cuda_rows.LIBRARY.write_bytes(b"no library")
    assert "the tensors are on the CPU" in cuda_rows.unavailable(CPU, F32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "compute capability 8.0" in cuda_rows.unavailable(GPU, F32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "float64" in cuda_rows.unavailable(GPU, torch.float64)
    assert re.search(r"cannot be loaded .*reinstall", cuda_rows.unavailable(GPU, F32))


def test_the_library_answers(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert cuda_rows.unavailable(GPU, BF16) is None
    assert cuda_rows.plan(128_256, BF16) == (4, 512, 64_256)
    assert os.listdir(built.parent) == [build.LIBRARY]
    monkeypatch.setattr(build, "source_digest", lambda: "other sources")
    assert re.search(r"built from other sources: reinstall", cuda_rows.unavailable(GPU, BF16))


def test_the_library_needs_no_torch_and_no_cuda_library(built):
    script = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).megaprior_plan)"
    subprocess.run([sys.executable, "-I", "-c", script, str(built)], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a CUDA device to be absent")
def test_an_error_of_cuda_becomes_one_line(built, monkeypatch):
    library = cuda_rows._library()
    monkeypatch.setattr(cuda_rows, "_library", lambda: library)
    monkeypatch.setattr(cuda_rows, "_stream", lambda device: nullcontext(0))
    arguments = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2)
    for call in (
        lambda: cuda_rows.cross_entropy_rows(*arguments, gradient=True),
        lambda: cuda_rows.scale_(arguments[0], torch.tensor(2.0)),
    ):
        with pytest.raises(RuntimeError, match=r"^the CUDA kernel could not be run: \w.* \(code \d+\)$"):
            call()


def test_arguments_are_checked(monkeypatch):
    def unreached():
        raise AssertionError("the library is not asked")

    monkeypatch.setattr(cuda_rows, "_library", unreached)
    logits, targets, floats = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    right = logits, targets, floats, floats
    for at, wrong in (
        (0, logits[0]), (0, logits.double()), (0, logits.t()), (0, logits[:1].expand(4, 8)), (0, logits[:, ::2]),
        (1, targets.int()), (1, targets[1:]), (2, floats.double()), (2, floats[:, None]), (3, floats[:1].expand(4)),
        (1, targets.to("meta")), (3, floats.to("meta")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            cuda_rows.cross_entropy_rows(*right[:at], wrong, *right[at + 1 :], gradient=True)
    for values, scale in (
        (logits.t(), floats[0]),
        (logits, floats),
        (logits, targets[0]),
        (logits, floats[0].to("meta")),
    ):
        with pytest.raises(ValueError, match="must"):
            cuda_rows.scale_(values, scale)
    cuda_rows.cross_entropy_rows(
        logits[:0], targets[:0], floats[:0], floats[:0], gradient=True
    )  # no rows: nothing to do
    cuda_rows.scale_(logits[:0], floats[0])


def make_wheel(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", target, source]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_a_wheel_holds_the_library_only_where_it_is_asked_for(nvcc, tmp_path):
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "docs", "benchmarks", build.LIBRARY)
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=left_out)
    for switch, tag in (("0", "any"), ("1", "linux_")):
        made = make_wheel(source, tmp_path / switch, **{build.SWITCH: switch})
        assert made.returncode == 0, made.stderr
        (wheel,) = (tmp_path / switch).glob("megaprior-*-py3-none-*.whl")
        assert tag in wheel.name
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if "kernels/" in name]
            assert "megaprior/kernels/cuda/weighted_cross_entropy.cu" in names
            assert "megaprior/kernels/cuda/rows.h" in names
            assert (f"megaprior/kernels/{build.LIBRARY}" in names) == (switch == "1")
            archive.extractall(tmp_path / switch / "site")
    installed = ctypes.CDLL(str(tmp_path / "1" / "site" / "megaprior" / "kernels" / build.LIBRARY))
    installed.megaprior_source.restype = ctypes.c_char_p
    assert installed.megaprior_source().decode() == build.source_digest()
