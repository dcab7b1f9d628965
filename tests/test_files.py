"""Whole or absent: every promise of megaprior.files, with real kills and a real full disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import xxhash

from megaprior.errors import DataError
from megaprior.files import (
    BLOCK_BYTES,
    atomic_file,
    atomic_folder,
    atomic_write,
    block_digests,
    digest_json,
    owner_lock,
    read_manifest,
    write_manifest,
)


def test_block_digests_are_xxh3_128_of_each_64_mib(tmp_path: Path) -> None:
    path = tmp_path / "data"
    first, second = b"\x01" * BLOCK_BYTES, b"\x02" * 5
    path.write_bytes(first + second)
    assert block_digests(path) == [xxhash.xxh3_128_hexdigest(first), xxhash.xxh3_128_hexdigest(second)]
    path.write_bytes(first)
    assert block_digests(path) == [xxhash.xxh3_128_hexdigest(first)]
    path.write_bytes(b"")
    assert block_digests(path) == []


def test_digest_json_ignores_the_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": [2, "é"]}) == digest_json({"b": [2, "é"], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json({"a": float("nan")})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    script = textwrap.dedent(f"""
        import os, signal
        from megaprior.files import atomic_file
        with atomic_file({str(path)!r}) as file:
            file.write(b"half"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "step_1"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "part").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "part").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "part").read_text() == "x"
    with pytest.raises(DataError, match="never overwritten"), atomic_folder(target):
        pass


def test_a_full_disk_is_named_with_the_bytes(tmp_path: Path, small_disk) -> None:
    with small_disk(tmp_path, "64k"):
        atomic_write(tmp_path / "old", b"intact")
        with pytest.raises(DataError, match=r"disk full \(1,000,000 bytes needed, [\d,]+ bytes free\)"):
            atomic_write(tmp_path / "new", b"x" * 1_000_000)
        assert os.listdir(tmp_path) == ["old"]
        assert (tmp_path / "old").read_bytes() == b"intact"


def test_a_manifest_vouches_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_manifest(path, {"format": "f", "version": 1, "n": 3})
    assert read_manifest(path, format="f")["n"] == 3
    body = json.loads(path.read_text())
    for change, message in [
        ({"n": 4}, "digest"),
        ({"format": "g"}, "format is 'g', expected 'f'"),
        ({"version": 2}, "version 2, this program reads version 1"),
    ]:
        path.write_text(json.dumps({**body, **change}))
        with pytest.raises(DataError, match=message):
            read_manifest(path, format="f")
    for garbage in (b"", b"<html>", b"\xff\xfe", b"[1]"):
        path.write_bytes(garbage)
        with pytest.raises(DataError, match=r"m\.json"):
            read_manifest(path, format="f")
    path.unlink()
    with pytest.raises(DataError, match="no manifest"):
        read_manifest(path, format="f")


def test_one_owner_wins_and_is_named_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, time
        from megaprior.files import owner_lock
        with owner_lock({str(tmp_path)!r}):
            print("held", flush=True); time.sleep(60)
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=rf"in use by .* pid {owner.pid}"), owner_lock(tmp_path):
            pass
    finally:
        owner.kill()
        owner.wait()
    with owner_lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_told_from_a_held_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"\.lock: cannot be locked \(Function not implemented\); .* -o flock"):
        with owner_lock(tmp_path):
            pass
