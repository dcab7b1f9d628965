"""Print every skipped test of a pytest log; fail on one whose reason is not allowed.

    python tests/check_skips.py LOG tests/allowed_skips.txt

Each line of the allowed file is a text that the reason must contain; `#` starts a comment.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(log: str, allowed_file: str) -> int:
    """0 when each `SKIPPED` line of the log is allowed."""
    lines = Path(allowed_file).read_text(encoding="utf-8").splitlines()
    allowed = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    skipped = re.findall(r"^SKIPPED .*$", Path(log).read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
    surprises = [line for line in skipped if not any(text in line for text in allowed)]
    for line in skipped:
        print(("NOT ALLOWED: " if line in surprises else "allowed: ") + line)
    print(f"{len(skipped)} skipped lines, {len(surprises)} not allowed")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
