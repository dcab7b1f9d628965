"""The command `megaprior-data`: everything that happens to data before training, without a network.

Every module of `_VERBS` adds its verbs by `add(commands)` and imports nothing heavy before one of them runs, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megaprior import __version__
from megaprior.data_tools.commands import build, join, look, make, repair, sets, stats, transfer
from megaprior.errors import DataError, MegapriorError

_VERBS = (
    build,  # build
    join,  # join
    look,  # verify, show
    make,  # train-tokenizer, make-scenes
    repair,  # quarantine, reindex
    sets,  # split, merge
    stats,  # stats
    transfer,  # transfer-scores
)

_STORY = """\
from raw pairs to shards, with the project's own sample:
  megaprior-data make-scenes --output scenes
  megaprior-data train-tokenizer --input scenes/text.txt.gz --output tokenizer --vocab-size 1024
  megaprior-data build --input scenes/pairs --output shards/pairs --tokenizer tokenizer
  megaprior-data verify shards/pairs
  megaprior-data show shards/pairs
every command answers --help; repeating an interrupted one resumes it.
exit codes: 0 done, 1 bug or failure, 2 usage, 65 data refused or a problem found.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a `MegapriorError` is printed as one line and becomes its exit code."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except MegapriorError as error:
        print(f"megaprior-data: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `megaprior-data show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"megaprior-data: error: {error.filename or 'input or output'}: {error.strerror}", file=sys.stderr)
        return DataError.exit_code
    except KeyboardInterrupt:
        print("megaprior-data: interrupted; repeat the command to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaprior-data",
        description="Prepare image-text pairs and text: build, verify and look at shards. Nothing is ever downloaded.",
        epilog=_STORY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megaprior-data {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _VERBS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
