"""Two real ZeRO-3 ranks on CPU against the plain engine: gradients, losses, checkpoints, resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_children import (
    PARTITION_ALL,
    SIZES,
    config,
    free_port,
    golden_settings,
    settings,
    uneven_data,
)

from megaprior.data.samples import Batch
from megaprior.errors import UsageError
from megaprior.train import assembly
from megaprior.train.zero3 import check_version, deepspeed_config, is_stale


def lines(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def model_bytes(out: Path, step: int) -> bytes:
    return (out / "checkpoints" / f"step_{step:08d}" / "model" / "model.safetensors").read_bytes()


def rows_of_rank(values: dict[str, Any], *, rank: int) -> list[Batch]:
    """All rows of one of two ranks in 20 steps."""
    cfg = config(values)
    tokenizer = assembly.open_tokenizer(cfg)
    spec = assembly.vision_spec(assembly.build_model(cfg, tokenizer))
    loader = assembly.open_loader(cfg, tokenizer, spec, rank=rank, world=2)
    rows = [row for step in range(20) for row in loader.batch(step).micro]
    loader.close()
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "impl"), [(False, "auto"), (False, "triton"), (True, "triton")])
def test_first_gradients_and_twenty_losses_equal_the_plain_engine(
    world: Path, tmp_path: Path, launch: Callable[..., list[int]], spawn: Callable[..., Any], tied: bool, impl: str
) -> None:
    """With "triton" the ranks' loss is that of the Triton kernels on a partitioned head, the one process's the plain form."""
    values = settings(
        world,
        tmp_path / "local",
        steps=20,
        save_every=20,
        eval_every=10,
        data=uneven_data(world, tmp_path),
        model={"llama": {**SIZES, "tie_word_embeddings": tied}, "patch": 16, "limit": 32},
        activation_checkpointing="full" if tied else "none",
    )
    single = spawn(values, {"gradients": str(tmp_path / "local.pt")})
    single.join(120)
    assert single.exitcode == 0
    both = {**values, "out": str(tmp_path / "both")}
    fault, environment = {"gradients": str(tmp_path / "both.pt")}, {"MEGAPRIOR_LOSS_IMPL": impl}
    assert launch(both, fault=fault, environment=environment) == [0, 0]

    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("local", "both"))
    assert first.keys() == second.keys()
    assert len(first) == (22 if not tied else 21)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-5, msg=name)
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "local"), rel=0, abs=1e-5)
    for kind, key in (("train", "grad_norm"), ("train", "source1_ntp_loss"), ("eval", "heldout_ntp_above")):
        one, other = ([line[key] for line in lines(tmp_path / name, kind)] for name in ("local", "both"))
        assert other == pytest.approx(one, rel=1e-5)
    # What the comparison is worth: different numbers of rows, rows without an image, and dummies without anything.
    assert len({line["micro_steps"] for line in lines(tmp_path / "both")}) >= 2
    rows = rows_of_rank(values, rank=0) + rows_of_rank(values, rank=1)
    assert any(len(row.targets) and not len(row.patches) for row in rows)
    assert any(not len(row.targets) for row in rows)
    # AdamW divides by the gradient's size, so rounding shows most where gradients vanish: 5e-5 of 0.46 was the worst seen.
    for name, tensor in load_file(tmp_path / "local/checkpoints/step_00000020/model/model.safetensors").items():
        other = load_file(tmp_path / "both/checkpoints/step_00000020/model/model.safetensors")[name]
        torch.testing.assert_close(other, tensor, rtol=0, atol=3e-4, msg=name)


@pytest.mark.slow
def test_resumed_on_two_ranks_bit_for_bit_and_on_one_and_three_with_the_same_samples(
    world: Path, tmp_path: Path, launch: Callable[..., list[int]]
) -> None:
    values = settings(world, tmp_path / "straight", steps=6, save_every=3, eval_every=3)
    assert launch(values) == [0, 0]
    straight = tmp_path / "straight"
    for name, ranks in (("two", 2), ("one", 1), ("three", 3)):
        out = shutil.copytree(straight, tmp_path / name)
        shutil.rmtree(out / "checkpoints" / "step_00000006")
        assert launch({**values, "out": str(out)}, world=ranks) == [0] * ranks
        assert [line["denominator"] for line in lines(out)] == [line["denominator"] for line in lines(straight)]
        if ranks == 2:
            assert losses(out) == losses(straight)
            assert model_bytes(out, 6) == model_bytes(straight, 6)
        else:  # AdamW's state came through whole: a wrong moment, step or decay shows in the second loss after it
            assert losses(out) == pytest.approx(losses(straight), rel=0, abs=2e-6)
        assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]


@pytest.mark.slow
def test_killed_stopped_and_poisoned(world: Path, tmp_path: Path, launch: Callable[..., list[int]]) -> None:
    values = settings(world, tmp_path / "run", steps=6, save_every=2)
    # A signal to one rank stops both after the same step.
    codes = launch(values, fault={"rows": 3, "signal": "SIGUSR1", "only_rank": 1})
    assert codes == [75, 75]
    newest = int((tmp_path / "run" / "latest").read_text().removeprefix("step_"))
    assert newest == lines(tmp_path / "run")[-1]["step"]
    # One rank is killed in the middle of a step: the other ends too, and says which.
    codes = launch(values, fault={"rows": 3, "only_rank": 1})
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1
    said = (tmp_path / "run.rank0.err").read_text()
    assert "rank 0 lost contact with the others during step" in said
    assert "rank 1 does not answer" in said
    # Repeated, it goes on.
    assert launch(values) == [0, 0]
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 7))
    # A NaN on one rank stops both before the update.
    poisoned = {**values, "out": str(tmp_path / "poisoned"), "save_every": 1}
    codes = launch(poisoned, fault={"rows": 3, "poison": True, "only_rank": 1})
    assert codes == [1, 1]
    assert "nothing was updated" in (tmp_path / "poisoned.rank0.err").read_text()


@pytest.mark.slow
def test_bf16_trains_like_fp32_at_first(world: Path, tmp_path: Path, launch: Callable[..., list[int]]) -> None:
    values = golden_settings(world, tmp_path / "run", "ulvlm_prior") | {"precision": "bf16"}
    assert launch(values) == [0, 0]
    golden = json.loads((Path(__file__).parent / "golden" / "ulvlm_prior.json").read_text())["loss"]
    assert losses(tmp_path / "run") == pytest.approx(golden, rel=2e-2)
    assert losses(tmp_path / "run") != pytest.approx(golden, rel=1e-5)


def test_the_contract_cannot_be_configured_away() -> None:
    merged = deepspeed_config(
        {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True},
        precision="bf16",
        world=4,
        universal=True,
    )
    assert merged["gradient_accumulation_steps"] == 1
    assert merged["train_batch_size"] == 4
    assert merged["gradient_clipping"] == 0.0
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["zero_optimization"] == {"overlap_comm": False, "stage": 3}
    assert merged["bf16"] == {"enabled": True}
    assert merged["checkpoint"] == {"load_universal": True}
    for wrong in ({"gradient_clipping": 1.0}, {"gradient_accumulation_steps": 4}, {"zero_optimization": {"stage": 2}}):
        with pytest.raises(UsageError, match="remove it"):
            deepspeed_config(wrong, precision="fp32", world=1, universal=False)


@pytest.mark.slow
def test_the_deepspeed_launcher_runs_the_command_line(world: Path, tmp_path: Path) -> None:
    values = settings(world, tmp_path / "run", steps=4, engine="zero3", zero=PARTITION_ALL)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    bin_folder = Path(sys.executable).parent
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "megaprior.cli", "train"]
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(bin_folder / command[0]), *command[1:], str(tmp_path / "run.yaml"), "save_every=4"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert (manifest["engine"], manifest["world"]) == ("zero3", 2)


def test_this_deepspeed_is_new_enough() -> None:
    check_version()


def test_an_older_one_is_refused_with_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deepspeed-0.19.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"DeepSpeed 0\.19\.2 is older than 0\.19\.3.*pip install"):
        check_version()


def test_a_lock_of_a_killed_build_is_told_from_a_living_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    assert is_stale(lock)
    lock.touch()
    threading.Timer(0.3, lock.unlink).start()
    assert not is_stale(lock)
