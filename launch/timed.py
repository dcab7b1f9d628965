"""Run a command and append its wall time and peak memory to a JSON-lines file, for the report's table of stages.

    python launch/timed.py times.jsonl STAGE COMMAND [ARG ...]

Its exit code is the command's. A stage that is repeated (resumed) adds a line.
"""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import time


def main(log: str, stage: str, *command: str) -> int:
    """Run, measure, append. Peak memory is that of the largest single process, in MiB."""
    start = time.monotonic()
    code = subprocess.run(command).returncode
    line = {
        "stage": stage,
        "wall_s": round(time.monotonic() - start, 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
        "command": shlex.join(command),
    }
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
