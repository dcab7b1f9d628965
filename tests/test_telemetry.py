"""Metrics survive a kill; progress is plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path

import pytest

from megaprior import telemetry
from megaprior.telemetry import MetricsLog, progress


def test_every_metrics_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"kind": "train", "step": 1, "loss": 2.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "train", "step": 1, "loss": 2.5}
    log.close()
    again = MetricsLog(tmp_path)
    again.write({"kind": "train", "step": 2, "loss": 2.25})
    again.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_run_outlives_its_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder is gone while the run goes on; its own thread notices when it next flushes."""
    log = MetricsLog(tmp_path)
    shutil.rmtree(tmp_path / "tensorboard")
    with contextlib.suppress(Exception):
        log._board.flush()
    for step in range(200):
        log.write({"kind": "train", "step": step, "loss": 1.0})
        if log._board is None:
            break
        time.sleep(0.02)
    assert log._board is None
    log.write({"kind": "train", "step": 1000, "loss": 1.0})
    log.close()
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(step + 1), 1000]
    assert "TensorBoard is off from here on" in capsys.readouterr().err


def test_a_number_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"loss": float("nan")})
    log.close()


def test_progress_off_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_LINE_EVERY_S", 0.0)
    with progress(4, "score", "captions") as bar:
        bar.advance(2, note="perplexity 9.5")
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("score: 2 of 4 (50%) captions, ")
    assert first.endswith("perplexity 9.5")


def test_ranks_other_than_zero_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    telemetry.say("hello")
    assert capsys.readouterr().err == ""
