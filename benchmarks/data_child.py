"""Processes that benchmarks.data measures from outside, and the environments that its peers get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# One thread each: what is compared is the work done on one core, and libraries must not help themselves to others.
# And nothing is fetched.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Failed(Exception):
    """A process ended with an error; the text is the last line that it wrote."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a process and its children took: seconds of processor and of the clock, and what it printed."""

    cpu_s: float
    wall_s: float
    output: str


def environment(paths: Sequence[Path] = ()) -> dict[str, str]:
    """This process's, with one thread for every library and `paths` where Python looks for packages, before its own."""
    found = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **ONE_THREAD, **({"PYTHONPATH": found} if found else {})}


def run(command: Sequence[str | Path], *, paths: Sequence[Path] = (), cwd: Path = ROOT) -> Spent:
    """Run a process to its end.

    Raises:
        Failed: its exit status is not 0.
    """
    import time

    with tempfile.TemporaryFile() as kept, tempfile.TemporaryFile() as told:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, env=environment(paths), stdout=kept, stderr=told
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        kept.seek(0)
        told.seek(0)
        output, errors = kept.read().decode("utf-8", "replace"), told.read().decode("utf-8", "replace")
    if process.returncode:
        raise Failed(_last_line(errors) or f"exit status {process.returncode}")
    return Spent(cpu_s=usage.ru_utime + usage.ru_stime, wall_s=wall, output=output)


def run_json(module: str, arguments: Mapping[str, Any], *, paths: Sequence[Path] = ()) -> dict[str, Any]:
    """Run one of our modules with `arguments` as JSON; what its last line says, as JSON too."""
    done = run([sys.executable, "-m", module, json.dumps(arguments)], paths=paths)
    return json.loads(done.output.strip().splitlines()[-1])


class Helper:
    """A process that stays: one JSON line in, one JSON line out."""

    def __init__(self, script: Path, arguments: Mapping[str, Any], *, paths: Sequence[Path] = ()) -> None:
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(arguments)],
            cwd=ROOT,
            env=environment([ROOT, *paths]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            text=True,
        )
        self.hello = self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to one question.

        Raises:
            Failed: the process ended instead.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print what they like
                return json.loads(line)
        self._process.wait()
        self._told.seek(0)
        text = _last_line(self._told.read().decode("utf-8", "replace"))
        raise Failed(text or f"exit status {self._process.returncode}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._told.close()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
