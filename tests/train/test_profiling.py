"""A profile on demand: where it is asked for, what it leaves, and nothing of the run changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from train_children import config, settings, train

from megaprior.errors import UsageError
from megaprior.train.profiling import profile_overrides
from megaprior.train.throughput import peak_of


def test_steps_and_ranks_are_read() -> None:
    assert profile_overrides(["steps=10:13", "ranks=all"]) == [
        "profile.first=10",
        "profile.last=13",
        "profile.ranks=all",
    ]
    assert profile_overrides([]) == []


@pytest.mark.parametrize(
    "word", ["10:13", "steps=13:10", "steps=0:2", "steps=1", "steps=a:b", "ranks=some", "steps=-1:2"]
)
def test_anything_else_says_how_it_is_written(word: str) -> None:
    with pytest.raises(UsageError, match="write --profile steps=10:13"):
        profile_overrides([word])


def test_a_profile_of_two_steps(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(settings(world, tmp_path / "plain", steps=4, save_every=4)))
    capsys.readouterr()
    values = settings(world, tmp_path / "run", steps=4, save_every=4, profile={"first": 2, "last": 3})
    train(config(values))
    folder = tmp_path / "run" / "profile"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("profile")]
    assert said == [f"profile of steps 2 to 3: {folder}/steps_2-3.rank0.txt, beside it a trace for ui.perfetto.dev"]
    with gzip.open(folder / "steps_2-3.rank0.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    updates = [e for e in events if str(e.get("name", "")).startswith("Optimizer.step")]
    assert len(updates) == 2
    table = (folder / "steps_2-3.rank0.txt").read_text()
    assert "aten::" in table
    assert "Self CPU Mem" in table
    models = [
        (tmp_path / name / "checkpoints/step_00000004/model/model.safetensors").read_bytes()
        for name in ("plain", "run")
    ]
    assert models[0] == models[1]


def test_a_run_that_ends_inside_still_writes_it(world: Path, tmp_path: Path) -> None:
    train(config(settings(world, tmp_path / "run", steps=3, save_every=3, profile={"first": 2, "last": 9})))
    assert (tmp_path / "run" / "profile" / "steps_2-3.rank0.txt").exists()


def test_peaks_are_found_by_the_beginning_of_a_name() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989.4
    assert peak_of("NVIDIA H100 PCIe") == 756.0
    assert peak_of("NVIDIA L40S") == 362.0
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_of("Some other device") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_allocations_are_kept_too(world: Path, tmp_path: Path) -> None:
    train(config(settings(world, tmp_path / "run", steps=3, save_every=3, profile={"first": 2, "last": 2})))
    assert (tmp_path / "run" / "profile" / "steps_2-2.rank0.memory.pickle").stat().st_size > 0
