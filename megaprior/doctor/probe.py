"""What could hang or crash is done in a process of its own, which is given up after a while.

A folder on a server that is gone blocks whoever touches it, beyond the reach of any signal; a driver, a name server or a
peer may never answer; a broken library ends its process without an exception.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaprior.errors import MegapriorError

# name -> module of this room; its function `look(*arguments)` runs in the process and returns plain values
PROBES = {"torch": "device", "meet": "meeting", "names": "network", "folder": "folders", "config": "planned"}


class Silent(Exception):
    """A probe did not answer; the text says how it ended."""


class Probe:
    """`PROBES[name].look(*arguments)` under way in another process."""

    def __init__(
        self, name: str, *arguments: Any, timeout_s: float, environment: Mapping[str, str | None] | None = None
    ) -> None:
        """`environment` holds changes to this process's; None removes a variable."""
        env = {k: v for k, v in {**os.environ, **(environment or {})}.items() if v is not None}
        self._timeout_s, self._until = timeout_s, time.monotonic() + timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="megaprior-doctor-", ignore_cleanup_errors=True)
        self._answer, self._errors = Path(self._folder.name) / "answer", Path(self._folder.name) / "errors"
        command = [sys.executable, "-m", "megaprior.doctor.probe", name, str(self._answer), json.dumps(arguments)]
        with open(self._errors, "wb") as errors:
            # Files in the place of pipes: a grandchild that lives on cannot keep them open.
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
            )

    def answer(self) -> Any:
        """What `look` returned.

        Raises:
            MegapriorError: `look` raised one.
            Silent: it raised something else, crashed, or took too long.
        """
        try:
            code = self._process.wait(max(self._until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self.end()
            raise Silent(f"no answer within {self._timeout_s:.0f} s") from None
        try:
            body = json.loads(self._answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise Silent(self._last_words() or f"its process ended with exit code {code}") from None
        finally:
            self._folder.cleanup()
        if "error" in body:
            raise MegapriorError(body["error"])
        return body["answer"]

    def end(self) -> None:
        """Kill it, without waiting for what cannot be killed."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._folder.cleanup()

    def _last_words(self) -> str:
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else ""


def main(name: str, answer: str, arguments: str) -> None:
    """The probe's process."""
    module = importlib.import_module(f"megaprior.doctor.{PROBES[name]}")
    try:
        body = {"answer": module.look(*json.loads(arguments))}
    except MegapriorError as error:
        body = {"error": str(error)}
    Path(answer).write_text(json.dumps(body), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # the answer is on disk; a library's exit handlers might wait for what is broken
