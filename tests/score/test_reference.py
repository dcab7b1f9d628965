"""The scorer as a whole, with real processes and real kills."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaprior.data.shards import ShardSet, verify
from megaprior.errors import DataError, MegapriorError, UsageError
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
    folder = write_captions("pairs", captions=1000)
    ranks = start(reference, folder)
    while units_done(folder) < 2:
        time.sleep(0.002)
    assert kill(ranks)
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


def start(reference: Path, folder: Path, *, world: int = 1) -> list[multiprocessing.Process]:
    """The ranks of one scoring run, each a process of its own as a launcher starts them."""
    context = multiprocessing.get_context("forkserver")  # fresh processes that have torch loaded already
    context.set_forkserver_preload(["megaprior.score.reference", "megaprior.models.load", "megaprior.kernels.door"])
    ranks = [context.Process(target=_score, args=(reference, folder, rank, world)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def _score(reference: Path, folder: Path, rank: int, world: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the ranks meet in the ledger, not there
    score(model=reference, shards=folder, **SMALL)


def kill(ranks: list[multiprocessing.Process]) -> bool:
    """SIGKILL every rank; whether one of them was still at work."""
    for process in ranks:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join(60)
    return any(process.exitcode == -signal.SIGKILL for process in ranks)


def units_done(folder: Path) -> int:
    return len(list((folder / ".score-ref_logprob").glob("*.npy")))


def test_killed_anywhere_and_repeated_with_other_world_sizes_the_bytes_are_the_same(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs", captions=400)
    score(model=reference, shards=folder, **SMALL)
    expected = streams(folder)
    for name in expected:
        (folder / name).unlink()

    dice = random.Random(0)
    kills = 0
    for world in (1, 2, 3, 1, 2, 3, 2, 1):
        before, ranks = units_done(folder), start(reference, folder, world=world)
        end = time.monotonic() + 10
        while (
            units_done(folder) <= before and time.monotonic() < end and not (folder / "00001.ref_logprob.json").exists()
        ):
            time.sleep(0.002)
        time.sleep(dice.uniform(0.0, 0.03))
        kills += kill(ranks)
    assert kills >= 4, "most of these runs should have been killed before they ended"
    ranks = start(reference, folder, world=2)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert streams(folder) == expected
    assert verify(folder) == []


def test_killed_while_it_assembles_nothing_is_lost_or_doubled(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs", shards=4)
    ranks = start(reference, folder)
    while ranks[0].is_alive() and not (folder / "00000.ref_logprob.json").exists():
        pass
    kill(ranks)
    done = (folder / "00000.ref_logprob.bin").stat().st_mtime_ns
    score(model=reference, shards=folder, **SMALL)
    assert (folder / "00000.ref_logprob.bin").stat().st_mtime_ns == done  # a finished stream is not written again
    assert verify(folder) == []
    assert not list(folder.glob(".*"))


def test_a_worker_that_dies_ends_the_command_and_its_units_are_kept(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs", captions=1000)
    found: list[list[int]] = []

    def kill_one() -> None:
        end = time.monotonic() + 120
        while units_done(folder) < 3 and time.monotonic() < end:
            time.sleep(0.002)
        found.append(_workers())
        os.kill(found[0][1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(
        MegapriorError, match=r"process 1 of 2 was killed by SIGKILL.*are kept: repeat the command"
    ) as raised:
        score(model=reference, shards=folder, processes=2, **SMALL)
    killer.join()
    assert raised.value.exit_code == 1
    assert len(found[0]) == 2
    assert _workers() == [], "the other worker is stopped"
    kept = units_done(folder)
    assert kept >= 3
    summary = score(model=reference, shards=folder, **SMALL)
    assert 0 < summary["tokens_computed"] < summary["tokens"]
    interrupted = streams(folder)
    for name in interrupted:
        (folder / name).unlink()
    score(model=reference, shards=folder, **SMALL)
    assert streams(folder) == interrupted
    assert verify(folder) == []


def _workers() -> list[int]:
    """Process ids of this process's scorer workers, in the order of their start."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"megaprior.score.worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_ends_the_command_and_keeps_what_was_finished(
    reference: Path, write_captions: Callable[..., Path], small_disk
) -> None:
    folder = write_captions("pairs", captions=1000)
    small = folder / ".score-ref_logprob"
    small.mkdir()
    with small_disk(small, "32k"):
        with pytest.raises(DataError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\)"):
            score(model=reference, shards=folder, **SMALL)
        assert list(small.glob("*.npy"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        summary = score(model=reference, shards=folder, **SMALL)
        assert summary["tokens_computed"] < summary["tokens"]
    assert verify(folder) == []
