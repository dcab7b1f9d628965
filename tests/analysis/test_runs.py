from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megaprior.analysis.runs import caption_loss, read_run
from megaprior.data.shards import ShardSet
from megaprior.errors import DataError


@pytest.fixture
def heldout(tmp_path: Path, write_pairs: Callable[..., Path]) -> ShardSet:
    return ShardSet.open(
        write_pairs(tmp_path / "heldout", ["a red square", "one"], images=[0, 1]), scores="ref_logprob"
    )


def line(model: Path, digest: str, accuracy: float, checkpoint: str = "step_00000040") -> dict:
    probe = {"accuracy": accuracy}
    return {
        "format": "megaprior.result",
        "model": str(model),
        "checkpoint": checkpoint,
        "digest": digest,
        "probe": probe,
    }


def test_a_run_is_read_with_its_own_losses_and_probe(
    tmp_path: Path, write_run: Callable[..., Path], heldout: ShardSet
) -> None:
    folder = write_run(tmp_path / "run", kind="prior", seed=7, heldout=heldout)
    results = [line(folder, "digest-prior", 0.8), line(folder, "digest-ntp", 0.1)]
    run = read_run(folder, results=results, build_id=heldout.build_id)
    assert run.seed == 7
    assert len(run.train) == 40  # the half-written line is none
    assert [e["step"] for e in run.evals] == [20, 40]
    assert run.losses is not None
    assert len(run.losses.nll) == heldout.token_counts.sum()
    assert run.probe == {"accuracy": 0.8}  # by digest, though a later line has the same name


def test_losses_of_an_earlier_checkpoint_or_other_shards_are_left_out(
    tmp_path: Path, write_run: Callable[..., Path], heldout: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", heldout=heldout)
    assert read_run(folder, results=[], build_id="another").losses is None
    (folder / "latest").write_text("step_00000080\n")
    assert read_run(folder, results=[], build_id=heldout.build_id).losses is None
    assert "is of step_00000040, the run is at step_00000080; run `megaprior evaluate` again" in capsys.readouterr().err


def test_without_losses_the_probe_is_found_by_name_and_step(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    folder = write_run(tmp_path / "run")
    results = [line(folder, "x", 0.5), line(folder, "y", 0.9, checkpoint="step_00000020"), {"other": 1}]
    assert read_run(folder, results=results, build_id=None).probe == {"accuracy": 0.5}


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json: not readable .*finish the run first"):
        read_run(tmp_path, results=[], build_id=None)


def test_the_loss_of_captions_leaves_the_text_mix_out() -> None:
    mixed = {
        "ntp_loss": 3.0,
        "source0_share": 0.3,
        "source0_ntp_loss": 2.0,
        "source1_share": 0.1,
        "source1_ntp_loss": 4.0,
        "source2_share": 0.6,
        "source2_ntp_loss": 9.0,
    }
    assert caption_loss(mixed, 2) == pytest.approx((0.3 * 2 + 0.1 * 4) / 0.4)
    assert caption_loss({"ntp_loss": 3.0}, 1) == 3.0
