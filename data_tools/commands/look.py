"""`megaprior-data verify` and `show`: whether shards are whole, and what is in them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaprior.data_tools.commands.verb import Commands, add_verb
from megaprior.errors import DataError, UsageError


def add(commands: Commands) -> None:
    """Add `verify` and `show`."""
    _add_verify(add_verb(commands, "verify", _verify, *_VERIFY))
    _add_show(add_verb(commands, "show", _show, *_SHOW))


_VERIFY = (
    "check every digest, count and alignment of shard folders; exit code 65 when anything is wrong",
    "example:\n  megaprior-data verify shards/pairs shards/reference",
)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="shard folders")


def _verify(options: argparse.Namespace) -> int:
    from megaprior.data.shards import verify
    from megaprior.data_tools.commands.screen import print_verified

    for folder in options.folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
    found = {folder: verify(folder) for folder in options.folders}
    print_verified(found)
    return DataError.exit_code if any(found.values()) else 0


_SHOW = (
    "print samples: key, image, caption by tokens; scored captions coloured by importance w",
    """\
w = 1 - p, where p is what the reference model gave the token (alpha = 1). Where there is no colour, a small digit after
each token gives the tenths of w: 0 predictable, 9 surprising.

examples:
  megaprior-data show shards/pairs -n 5
  megaprior-data show shards/pairs --sample 117 --scores ref_logprob""",
)


def _add_show(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="shard folder")
    add("-n", type=int, default=3, metavar="N", help="number of samples, evenly spaced (default: %(default)s)")
    add("--sample", type=int, metavar="I", help="this sample only, counted from 0")
    add("--scores", metavar="NAME", help="score stream to colour by (default: ref_logprob where the shards have it)")


def _show(options: argparse.Namespace) -> int:
    from megaprior.data_tools.commands.screen import print_samples

    print_samples(options.folder, count=options.n, sample=options.sample, scores=options.scores)
    return 0
