"""SIGTERM and SIGUSR1 ask for a checkpoint at the next step boundary; what a step does is never interrupted."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_ASKED_BY = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context manager that takes both signals; a second one changes nothing. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _ASKED_BY}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
