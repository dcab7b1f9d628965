"""The process that shows a run's metrics.jsonl in Weights & Biases: `python -m megaprior.wandb_feed`, started by trackers.py.

The order comes as one JSON line on standard input; when that ends, the run is over: what is left is shown, and the process
ends, also when the run was killed. Whatever wandb raises becomes one line on standard error.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_EVERY_S = 1.0
_FINISH_S = 110  # after the run's end: a library that still waits for a network then is left behind

# Read when wandb is imported: no crash reports, no code, no statistics of the machine, nothing in the home folder.
_QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__DISABLE_META": "true",
    "WANDB__DISABLE_MACHINE_INFO": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
}


def main() -> int:
    """Follow one log to its end; 0 also when wandb failed, which costs the run nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(sys.stdin.buffer.readline())
    log = Path(order["log"])
    os.environ.update(_QUIET)
    for kind in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        os.environ.setdefault(f"WANDB_{kind}_DIR", str(log.parent / "wandb" / kind.lower()))
    try:
        show(order, log)
    except Exception as error:  # whatever a foreign library meets
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"Weights & Biases is off from here on ({reason}); {log} is complete without it", file=sys.stderr)
    sys.stderr.flush()
    os._exit(0)  # not by way of wandb's own exit handlers, which wait for a network


def show(order: dict[str, Any], log: Path) -> None:
    """Begin or continue the W&B run, and log every line from byte `offset` of the log on."""
    import wandb

    run = wandb.init(
        project=order["project"],
        id=order["id"],
        name=order["name"],
        dir=str(log.parent),
        mode=order["mode"],
        resume="allow" if order["mode"] == "online" else None,
        config=order["config"],
    )
    last = 0
    for values in lines(log, order["offset"]):
        # wandb counts forwards only; a line about an earlier step, a save that took its time, is shown where the run is.
        last = max(last, int(values.get("step", last)))
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        run.log({f"{values.get('kind', 'run')}/{name}": value for name, value in numbers.items()}, step=last)
    run.finish()


def lines(log: Path, offset: int) -> Iterator[dict[str, Any]]:
    """The whole lines of the log from byte `offset` on, as they are written, until standard input ends."""
    over = False
    with open(log, "rb") as file:
        file.seek(offset)
        rest = b""
        while True:
            *whole, rest = (rest + file.read()).split(b"\n")
            for line in whole:
                try:
                    yield json.loads(line)
                except ValueError:  # cut short by a full disk or a kill
                    continue
            if over:
                return
            ready, _, _ = select.select([sys.stdin], [], [], _EVERY_S)
            if ready:  # nothing more is ever sent
                over = True
                signal.alarm(_FINISH_S)


if __name__ == "__main__":
    sys.exit(main())
