"""`megaprior-data split` and `merge`: disjoint parts of a build, and one build of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaprior.data_tools.commands.verb import Commands, add_verb
from megaprior.errors import UsageError


def add(commands: Commands) -> None:
    """Add `split` and `merge`."""
    _add_split(add_verb(commands, "split", _split, *_SPLIT))
    _add_merge(add_verb(commands, "merge", _merge, *_MERGE))


_SPLIT = (
    "cut a build into disjoint parts that share no image, nor two that look alike",
    """\
Equal images fall on one side, and so do images that look alike: copies that were encoded, scaled or lit anew. Two
images look alike when their pHash (64 bits) differs in at most --near-duplicates bits and their dHash in at most 6 more;
whatever a chain of such pairs connects is one group, and a group is never cut. That is for photographs: drawings on plain
ground look alike soon, so watch the largest group that --dry-run tells, and ask for fewer bits. Text is kept together by
equal captions (a long text by the whole document). A subset's size comes to within one group of what was asked.

Each subset is a build of its own: verify, train on, split again. Score streams that every shard has go along: a score
belongs to a caption's tokens, whatever else is in the folder. What goes where follows from contents, sizes, --near-duplicates
and --seed alone; the same command goes on after a kill. What no subset takes is left in the source, which is not changed.

examples:
  megaprior-data split shards/all --into reference=5M training=3M --output shards/split
  megaprior-data split shards/all --into training=0.98 held_out=rest --output shards/split --dry-run
  megaprior-data split shards/captions --into a=0.5 b=0.5 --output shards/halves --near-duplicates 0
  megaprior-data verify shards/split/reference shards/split/training""",
)


def _add_split(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SHARDS", help="shard folder to split; it stays as it is")
    add(
        "--into",
        nargs="+",
        required=True,
        metavar="NAME=SIZE",
        help="samples (3000000, 3M), a fraction with a point (0.25), or rest",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the subsets' folders")
    add(
        "--near-duplicates",
        type=int,
        default=6,
        metavar="BITS",
        help="how far two images that look alike may be apart; 0: equal files alone (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="another seed, other subsets (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes (default: the usable cores); the result is the same")
    add("--dry-run", action="store_true", help="read and hash everything, say what the subsets would be, write nothing")


def _split(options: argparse.Namespace) -> int:
    from megaprior.data_tools.sets.sides import parse_subsets
    from megaprior.data_tools.sets.splitting import Request, split

    request = Request(
        source=options.source,
        output=options.output,
        subsets=parse_subsets(options.into),
        near_bits=options.near_duplicates,
        seed=options.seed,
        workers=_workers(options),
    )
    body = split(request, dry_run=options.dry_run)
    for subset in body["subsets"]:
        print(f"{options.output / subset['name']}: {subset['samples']:,} samples ({subset['wanted']:,} asked for)")
    if body["left"]:
        print(f"left in the source: {body['left']:,} samples")
    print(
        f"{body['groups']:,} groups of {body['units']:,} images or documents ({body['equal']:,} equal to another, "
        f"{body['near']:,} joined by their looks); the largest has {body['largest_group']:,} of {body['samples']:,} samples"
    )
    if body["featureless"]:
        print(f"{body['featureless']:,} images have no contrast or cannot be decoded: compared by their files alone")
    if options.dry_run:
        print("nothing was written (--dry-run)")
    else:
        print(f"next: megaprior-data verify {' '.join(str(options.output / s['name']) for s in body['subsets'])}")
    return 0


_MERGE = (
    "make one build of several that have one tokenizer and kind",
    """\
The shards of all folders, in the order given, numbered anew; their bytes are read against their digests and copied. --link
makes hard links instead: no space, no reading, the same disk; a file is then the same in both folders, so never edit one in
place (no command here does). Score streams go along where every shard of every folder has them by one scorer. Keys stay as
they are, also where folders share some: a shard's manifest says where it comes from. --prefix-keys writes FOLDER/KEY.

--deduplicate drops a sample whose image and caption (bytes and tokens) both came before; an image with another caption
stays. Refused: another tokenizer, another kind, and the same samples twice (one build in two folders).

examples:
  megaprior-data merge shards/cc3m shards/laion --output shards/all
  megaprior-data merge shards/pairs shards/replayed --output shards/whole --link
  megaprior-data merge shards/a shards/b --output shards/ab --deduplicate --workers 8""",
)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="DIR", help="shard folders, at least two; they stay as they are")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the merged build, new or empty")
    add("--link", action="store_true", help="hard links instead of copies")
    add("--deduplicate", action="store_true", help="keep the first of samples with equal image and equal caption")
    add("--prefix-keys", action="store_true", help="put the folder's name before each key")
    add("--workers", type=int, metavar="N", help="processes (default: the usable cores); the result is the same")


def _merge(options: argparse.Namespace) -> int:
    from megaprior.data_tools.commands.screen import print_built
    from megaprior.data_tools.sets.merging import Request, merge

    request = Request(
        folders=tuple(options.folders),
        output=options.output,
        link=options.link,
        deduplicate=options.deduplicate,
        prefix_keys=options.prefix_keys,
        workers=_workers(options),
    )
    print_built(options.output, merge(request))
    return 0


def _workers(options: argparse.Namespace) -> int:
    from megaprior.data_tools.building.workers import usable_cores

    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers {options.workers}: at least 1")
    return options.workers or usable_cores()
