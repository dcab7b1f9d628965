"""The scorer as a whole, with real processes and real kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaprior.data.shards import ShardSet, verify
from megaprior.errors import DataError, UsageError
from megaprior.files import read_manifest, write_manifest
from megaprior.score.reference import score

SMALL = {"row_tokens": 64, "unit_tokens": 100}


def streams(folder: Path) -> dict[str, bytes]:
    """Every file of the score streams, manifests included."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.ref_logprob.*"))}


def test_streams_are_aligned_verified_and_summed_up(reference: Path, write_captions: Callable[..., Path]) -> None:
    folder = write_captions("pairs")
    summary = score(model=reference, shards=folder, **SMALL)
    assert verify(folder) == []
    assert not list(folder.glob(".score-*"))
    shards = ShardSet.open(folder, scores="ref_logprob")
    assert shards.score_kind == "logprob"
    r = np.concatenate([shards.scores(i) for i in range(len(shards))]).astype(np.float64)
    assert len(r) == summary["tokens"] == int(shards.token_counts.sum())
    assert summary["perplexity"] == pytest.approx(np.exp(-r.mean()), rel=1e-12)
    assert summary["mean_importance"] == pytest.approx((1 - np.exp(r)).mean(), rel=1e-9)
    scorer = read_manifest(folder / "00000.ref_logprob.json", format="megaprior.scores")["scorer"]
    assert scorer["dtype"] == "float32"
    assert [record["threads"] for record in scorer["records"]] == [1]


def test_complete_scores_are_kept_by_their_scorer_and_defended_against_others(
    reference: Path,
    save_reference: Callable[..., Path],
    write_captions: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_captions("pairs")
    score(model=reference, shards=folder, **SMALL)
    before = streams(folder)
    again = score(model=reference, shards=folder, row_tokens=128)
    assert again["tokens_computed"] == 0
    assert "complete already" in capsys.readouterr().err
    other = save_reference(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"pairs/00000: has scores 'ref_logprob' with fingerprint.*--name, or delete"):
        score(model=other, shards=folder, **SMALL)
    with pytest.raises(DataError, match="dtype float32, this scorer's is bfloat16"):
        score(model=reference, shards=folder, dtype="bfloat16", **SMALL)
    assert streams(folder) == before
    score(model=other, shards=folder, name="other", **SMALL)
    assert verify(folder) == []


def test_another_tokenizer_is_refused_before_the_weights_are_read(
    reference: Path, write_captions: Callable[..., Path], tmp_path: Path
) -> None:
    from megaprior.tokenizer import train_sentencepiece

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"no weights at all")
    train_sentencepiece(["some other text, and more of it"], model / "tokenizer", vocab_size=280)
    with pytest.raises(DataError, match=r"another tokenizer than that of the reference .*: the vocabulary differs"):
        score(model=model, shards=write_captions("pairs"), **SMALL)


def test_a_caption_longer_than_a_row_is_refused(reference: Path, write_captions: Callable[..., Path]) -> None:
    folder = write_captions("pairs", longest=100)
    with pytest.raises(UsageError, match=r"pairs/0000\d sample \d+ \(key key\d+\): 1?\d\d tokens, a row holds 16"):
        score(model=reference, shards=folder, row_tokens=16)


def test_a_resume_on_other_hardware_is_refused_unless_asked_for(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs")
    killed(reference, folder, processes=1, after=lambda units: units >= 2)
    ledger = folder / ".score-ref_logprob"
    (record,) = ledger.glob("record-*.json")
    body = read_manifest(record, format="megaprior.score_record")
    record.unlink()
    body["record"]["device"] = "another CPU"
    write_manifest(ledger / "record-0.json", body)
    with pytest.raises(DataError, match="device: 'another CPU' then"):
        score(model=reference, shards=folder, **SMALL)
    score(model=reference, shards=folder, allow_other_hardware=True, **SMALL)
    scorer = read_manifest(folder / "00000.ref_logprob.json", format="megaprior.scores")["scorer"]
    assert len(scorer["records"]) == 2
    assert verify(folder) == []


# ---------------------------------------------------------------- kills


def killed(reference: Path, folder: Path, *, processes: int, after: Callable[[int], bool]) -> int:
    """Start a scorer as a process of its own and SIGKILL it once `after(units finished)` holds; its exit code."""
    context = multiprocessing.get_context("forkserver")  # a fresh process that has torch loaded already
    context.set_forkserver_preload(["megaprior.score.reference", "megaprior.models.load", "megaprior.kernels.door"])
    target = context.Process(target=_score, args=(reference, folder, processes))
    target.start()
    assert target.pid is not None
    ledger = folder / ".score-ref_logprob"
    while target.is_alive() and not after(len(list(ledger.glob("*.npy")))):
        time.sleep(0.002)
    os.kill(target.pid, signal.SIGKILL)
    target.join(60)
    assert target.exitcode is not None
    return target.exitcode


def _score(reference: Path, folder: Path, processes: int) -> None:
    score(model=reference, shards=folder, processes=processes, **SMALL)


def test_killed_anywhere_and_repeated_with_other_world_sizes_the_bytes_are_the_same(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    undisturbed = write_captions("undisturbed")
    score(model=reference, shards=undisturbed, **SMALL)
    expected = streams(undisturbed)

    folder = write_captions("killed")
    # Same content, so the same build id: the folder's name is in messages only.
    for path in folder.iterdir():
        if path.is_file():
            path.write_bytes((undisturbed / path.name).read_bytes())
    dice = random.Random(0)
    kills = 0
    for _ in range(8):
        start, wait = time.monotonic(), dice.uniform(0.0, 0.6)
        code = killed(reference, folder, processes=1, after=lambda _, end=start + wait: time.monotonic() > end)
        kills += code == -signal.SIGKILL
    assert kills >= 4, "most of these runs should have been killed before they ended"
    score(model=reference, shards=folder, processes=2, **SMALL)
    assert streams(folder) == expected
    assert verify(folder) == []


def test_killed_while_it_assembles_nothing_is_lost_or_doubled(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs", shards=4)
    seen = []

    def first_stream_done(_: int) -> bool:
        seen.append((folder / "00000.ref_logprob.json").exists())
        return seen[-1]

    killed(reference, folder, processes=1, after=first_stream_done)
    done = (folder / "00000.ref_logprob.bin").stat().st_mtime_ns
    score(model=reference, shards=folder, **SMALL)
    assert (folder / "00000.ref_logprob.bin").stat().st_mtime_ns == done  # a finished stream is not written again
    assert verify(folder) == []
    assert not list(folder.glob(".*"))


def test_a_worker_that_dies_ends_the_command_and_its_units_are_kept(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs", captions=3000)
    command = [sys.executable, "-c", _CALL, json.dumps([str(reference), str(folder)])]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ledger = folder / ".score-ref_logprob"
    while parent.poll() is None and len(list(ledger.glob("*.npy"))) < 3:
        time.sleep(0.005)
    workers = _children(parent.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 1
    assert "scorer process 1 of 2 was killed by SIGKILL" in said
    assert "are kept: repeat the command" in said
    assert not Path(f"/proc/{workers[0]}").exists(), "the other worker is stopped"
    kept = {path.name: path.stat().st_mtime_ns for path in ledger.glob("*.npy")}
    assert len(kept) >= 3
    summary = score(model=reference, shards=folder, **SMALL)
    assert 0 < summary["tokens_computed"] < summary["tokens"]
    assert verify(folder) == []


_CALL = f"""
import json, sys
from megaprior.errors import MegapriorError
from megaprior.score.reference import score
model, shards = json.loads(sys.argv[1])
try:
    score(model=model, shards=shards, processes=2, **{SMALL})
except MegapriorError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def _children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, in the order of their start."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


# ---------------------------------------------------------------- under a launcher


def test_ranks_of_a_launcher_share_the_work_and_the_bytes_are_the_same(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    expected_folder = write_captions("pairs")
    score(model=reference, shards=expected_folder, **SMALL)
    expected = streams(expected_folder)
    for path in expected_folder.glob("*.ref_logprob.*"):
        path.unlink()
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    call = _CALL.replace("processes=2, ", "")
    arguments = [sys.executable, "-c", call, json.dumps([str(reference), str(expected_folder)])]
    ranks = [
        subprocess.Popen(arguments, env={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("1", "0")
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert streams(expected_folder) == expected


# ---------------------------------------------------------------- a full disk


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_command_and_keeps_what_was_finished(
    reference: Path, write_captions: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_captions("pairs", captions=2000)
    small = folder / ".score-ref_logprob"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(DataError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\)"):
            score(model=reference, shards=folder, **SMALL)
        assert list(small.glob("*.npy"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        summary = score(model=reference, shards=folder, **SMALL)
        assert summary["tokens_computed"] < summary["tokens"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert verify(folder) == []
