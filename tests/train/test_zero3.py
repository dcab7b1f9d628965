"""Whole runs on real ZeRO-3 ranks on CPU: resumes, signals, kills; and what is refused. See also test_equality.py."""

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
import yaml
from outcomes import lines, losses, model_bytes
from train_children import PARTITION_ALL, config, free_port, golden_settings, hlvlm_settings, settings

from megaprior.errors import UsageError
from megaprior.train.run import train
from megaprior.train.zero3 import refuse_unknown
from megaprior.train.zero3_config import check_extras, deepspeed_config
from megaprior.train.zero3_start import check_version, is_stale


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


def test_the_contract_is_laid_over_the_options() -> None:
    extras = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    check_extras(extras)
    merged = deepspeed_config(extras, precision="bf16", world=4, universal=True)
    assert merged["gradient_accumulation_steps"] == 1
    assert merged["train_batch_size"] == 4
    assert merged["gradient_clipping"] == 0.0
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["zero_optimization"] == {"overlap_comm": False, "stage": 3}
    assert merged["bf16"] == {"enabled": True}
    assert merged["checkpoint"] == {"load_universal": True}


@pytest.mark.parametrize(
    ("key", "value", "home"),
    [
        ("train_batch_size", 512, r"data\.batch_size"),
        ("train_micro_batch_size_per_gpu", 1, r"data\.max_tokens"),
        ("gradient_accumulation_steps", 1, r"data\.max_tokens"),
        ("gradient_clipping", 0.0, r"optim\.clip"),
        ("gradient_clipping", "auto", r"optim\.clip"),
        ("optimizer", {"type": "AdamW"}, r"optim\.lr"),
        ("scheduler", {"type": "WarmupLR"}, r"optim\.schedule"),
        ("fp16", {"enabled": "auto"}, "precision"),
        ("bf16", {"enabled": False}, "precision"),
        ("amp", {"enabled": True}, "precision"),
        ("torch_autocast", {"enabled": True}, "precision"),
        ("data_types", {"grad_accum_dtype": "bf16"}, "precision"),
        ("activation_checkpointing", {"partition_activations": True}, "activation_checkpointing=none"),
        ("compile", {"deepcompile": True}, "set compile"),
        ("zero_optimisation", {}, "did you mean 'zero_optimization'"),
        ("zero_optimization", {"stage": 0}, "1, 2 or 3"),
        ("zero_optimization", {"stage": "auto"}, "1, 2 or 3"),
        ("zero_optimization", {"stage": 2, "zero_hpz_partition_size": 8}, "needs stage 3"),
        ("zero_optimization", {"stage": 1, "zero_quantized_gradients": True}, "needs stage 3"),
        ("zero_optimization", {"stage": 2, "offload_param": {"device": "cpu"}}, "needs stage 3"),
        ("zero_optimization", {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "all or nothing"),
        ("zero_optimization", {"offload_optimizer": {"device": "nvme"}}, "'cpu' only"),
        ("zero_optimization", {"zenflow": {"topk_ratio": 0.1}}, "cannot train with it"),
        ("checkpoint", {"load_universal": True}, "finds out by itself"),
    ],
)
def test_what_has_its_home_elsewhere_is_refused_by_name(
    world: Path, tmp_path: Path, key: str, value: Any, home: str
) -> None:
    """Equal values and "auto" too: there is one place to look."""
    (tmp_path / "zero.json").write_text(json.dumps({key: value}))
    for zero in ({key: value}, str(tmp_path / "zero.json")):
        with pytest.raises(UsageError, match=rf"zero\.{key}.*{home}") as caught:
            train(config(settings(world, tmp_path / "run", engine="zero3", zero=zero)))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_partitioned_parts_need_stage_3(world: Path, tmp_path: Path) -> None:
    values = hlvlm_settings(world, tmp_path, tmp_path / "run", model={"frozen": "partitioned"})
    with pytest.raises(UsageError, match=r"frozen=partitioned.*stage is 2.*replicated"):
        train(config({**values, "engine": "zero3", "zero": {"zero_optimization": {"stage": 2}}}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"engine": "zero3"}, "under ZeRO-3.*stage 1 or 2"),
        ({"activation_checkpointing": "selective"}, "use full or none"),
        ({"stage": "clip", "weighting": {"kind": "ntp"}}, "has none"),
    ],
)
def test_compiling_is_refused_where_it_cannot_work(
    world: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    values = settings(world, tmp_path / "run", compile=True, **changes)
    values["data"]["text"] = []
    with pytest.raises(UsageError, match=f"compile=true.*{why}"):
        train(config(values))


def test_deepspeeds_own_complaint_is_one_line() -> None:
    extras = {"zero_optimization": {"overlap_com": True}}
    with pytest.raises(
        UsageError, match=r"zero\.zero_optimization\.overlap_com: DeepSpeed says: .*not permitted"
    ) as caught:
        refuse_unknown(extras["zero_optimization"])
    assert "\n" not in str(caught.value)


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
