"""`megaprior-data quarantine` and `reindex`: what was left out, and what was damaged, put right."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megaprior.data_tools.commands.verb import Commands, add_verb
from megaprior.errors import DataError, UsageError


def add(commands: Commands) -> None:
    """Add `quarantine` and `reindex`."""
    _add_quarantine(add_verb(commands, "quarantine", _quarantine, *_QUARANTINE))
    _add_reindex(add_verb(commands, "reindex", _reindex, *_REINDEX))


_QUARANTINE = (
    "list what builds left out and why, and build it once the cause is gone",
    """\
Without --replay: the reasons of each folder, how often, and examples; of an unfinished build what it has refused so far.
Every refused sample is a line of DIR/quarantine.jsonl: its source, its key there, the reason.

With --replay OUT: the sources are read again, and what was refused is built into OUT, with the tokenizer and the options of
the build but for those given here: another column, a folder of images that was missing, a longer --max-sequence; or
nothing, after a library learnt a format or a file was repaired. Of a source that was damaged everything goes on that the build
does not hold. What is refused again is in OUT's own quarantine. Then merge the two.

examples:
  megaprior-data quarantine shards/pairs
  megaprior-data quarantine shards/* --json
  megaprior-data quarantine shards/pairs --replay shards/replayed --input pairs/*.tar
  megaprior-data quarantine shards/llava --replay shards/replayed --input llava.json --images coco/train2017
  megaprior-data merge shards/pairs shards/replayed --output shards/whole --link""",
)


def _add_quarantine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="DIR", help="shard folders")
    add("--json", action="store_true", help="print JSON: a list with an entry for each folder")
    add("--examples", type=int, default=3, metavar="N", help="shown of each reason (default: %(default)s)")
    add("--replay", type=Path, metavar="OUT", help="build what was refused into this folder, new or empty")
    add("--input", type=Path, nargs="+", metavar="PATH", help="with --replay: the inputs of the build, or some of them")
    add("--format", metavar="NAME", help="with --replay: as of build")
    add("--images", type=Path, metavar="DIR", help="with --replay: as of build")
    add("--image-column", metavar="NAME", help="with --replay: as of build")
    add("--caption-column", nargs="+", metavar="NAME", help="with --replay: as of build")
    add("--turns", choices=("one", "all"), help="with --replay: as of build")
    add("--max-sequence", type=int, metavar="N", help="with --replay: as of build")
    add("--workers", type=int, metavar="N", help="with --replay: processes (default: the usable cores)")


def _quarantine(options: argparse.Namespace) -> int:
    from megaprior.data_tools.sets.quarantining import refusals, told
    from megaprior.telemetry import printable

    if options.replay is not None:
        return _replay(options)
    found = [refusals(place, examples=options.examples) for place in options.folders]
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for one in found:
            print("\n".join(printable(line) for line in told(one).splitlines()))
    return 0


def _replay(options: argparse.Namespace) -> int:
    from megaprior.data_tools.building.workers import usable_cores
    from megaprior.data_tools.commands.screen import print_built
    from megaprior.data_tools.sets.quarantining import Replay, replay

    if len(options.folders) != 1 or not options.input:
        raise UsageError("--replay takes one DIR, and --input with the files that it was built from")
    given = {
        "format": options.format,
        "images": options.images,
        "image_column": options.image_column,
        "caption_column": tuple(options.caption_column) if options.caption_column else None,
        "turns": options.turns,
        "max_sequence": options.max_sequence,
    }
    request = Replay(
        source=options.folders[0],
        inputs=tuple(options.input),
        output=options.replay,
        changes={name: value for name, value in given.items() if value is not None},
        workers=options.workers or usable_cores(),
    )
    print_built(options.replay, replay(request))
    print(f"then: megaprior-data merge {options.folders[0]} {options.replay} --output DIR")
    return 0


_REINDEX = (
    "rebuild lost or damaged .idx files from what is left, or take a deliberate change over",
    """\
An index is rebuilt from the .bin, the manifest and the other streams, and accepted when it has the very digest that the
manifest recorded: nothing is guessed. What can be rebuilt:
  image_sizes                always: two numbers a sample
  tokens                     from a stream with an entry a token (scores, word_class); or, where each sample ends in its only
                             EOS or at --max-sequence, from the tokens themselves
  scores, word_class         from tokens
  keys                       where all are as long, or lines, or numbered captions; else only by building the shard again
  images                     where the files' own formats tell where each ends, and equal keys or none tell what is shared
  documents                  from any other stream of the shard
Whatever else is lost is said, one line a file. A changed or lost .bin is never rebuilt.

--accept takes a deliberate change over: files whose bytes are not what was written, but which fit each other, get new
digests, and the shard's manifest records it under `accepted`. Without --accept the changes are printed and nothing is written
(exit code 65). Scores of tokens that were changed do not fit any more: score again.

examples:
  megaprior-data reindex shards/pairs
  megaprior-data reindex shards/pairs --accept""",
)


def _add_reindex(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="shard folder")
    add("--accept", action="store_true", help="write new digests for files that were changed")


def _reindex(options: argparse.Namespace) -> int:
    from megaprior.data_tools.sets.reindexing import reindex

    told = reindex(options.folder, accept=options.accept)
    for line in (*told.rebuilt, *told.accepted, *told.lost):
        print(line)
    if not (told.rebuilt or told.accepted or told.lost):
        print(f"{options.folder}: every index is what was written")
    if told.rebuilt or told.accepted:
        print(f"next: megaprior-data verify {options.folder}")
    return DataError.exit_code if told.lost else 0
