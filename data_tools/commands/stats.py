"""`megaprior-data stats`: lengths, images, vocabulary, duplicates, and how it all packs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megaprior.data_tools.commands.verb import Commands, add_verb
from megaprior.errors import UsageError


def add(commands: Commands) -> None:
    """Add `stats`."""
    _arguments(add_verb(commands, "stats", _run, *_TEXTS))


_TEXTS = (
    "describe shard folders: lengths, images, vocabulary, duplicates, and the rows they pack into",
    """\
Lengths, sizes, truncation and quarantine are those of every sample, from indices and manifests; nothing is decoded. Every
token is counted. Equal captions are counted among up to 4,194,304 of them and equal images among up to 131,072, chosen by
content so that equals are seen together; the table says 1 in how many. Memory does not grow with the folder, but for
--pack, which opens it as training does (4 bytes a sample, 12 with images).

--pack predicts rows by the code that training packs with: the folder as a whole (up to 1,048,576 segments), and batch by
batch as a training run of --batch samples on --ranks ranks would get them (up to 200 steps).

examples:
  megaprior-data stats shards/pairs shards/reference
  megaprior-data stats shards/pairs --vision 32:1024 16:512 --pack 8192 --batch 512 --ranks 8
  megaprior-data stats shards/pairs --pack 8192 --output stats.html
  megaprior-data stats shards/pairs --json | jq .folders[0].vocabulary.used""",
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="DIR", help="shard folders")
    add(
        "--vision",
        nargs="+",
        default=["32:1024"],
        metavar="PATCH[:LIMIT]",
        help="geometries of the encoder-free model, in pixels: patch, and the limit of the long side (default: 32:1024)",
    )
    add("--pack", type=int, metavar="TOKENS", help="predict rows of this many tokens, as data.max_tokens")
    add("--batch", type=int, default=512, metavar="N", help="as data.batch_size (default: %(default)s)")
    add("--ranks", type=int, default=1, metavar="N", help="data-parallel ranks (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--output", type=Path, metavar="FILE", help="also write a page with figures (.html) or the numbers (.json)")


def _run(options: argparse.Namespace) -> int:
    import json

    from megaprior.data_tools.stats.collect import describe, parse_vision
    from megaprior.data_tools.stats.page import page
    from megaprior.data_tools.stats.screen import print_stats
    from megaprior.files import atomic_write

    output: Path | None = options.output
    if output is not None and output.suffix not in (".html", ".json"):
        raise UsageError(f"--output {output}: ends in {output.suffix or 'nothing'}, expected .html or .json")
    vision = parse_vision(options.vision)
    pack = _packer(options)
    told = []
    for folder in options.folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        found = describe(folder, vision=vision)
        if pack is not None:
            found["packing"] = pack(folder, [None, *(vision if found["images"] else ())])
        told.append(found)
    text = json.dumps({"folders": told}, indent=1, ensure_ascii=False) + "\n"
    if output is not None:
        atomic_write(output, text if output.suffix == ".json" else page(told))
    if options.json:
        print(text, end="")
    else:
        print_stats(told)
    return 0


def _packer(options: argparse.Namespace) -> Callable[[Path, Sequence[Any]], list[dict[str, Any]]] | None:
    """What predicts rows under --pack; imported only then, being as heavy as training's loader."""
    if options.pack is None:
        return None
    from megaprior.data_tools.stats.packing_plan import Plan, predict

    plan = Plan(max_tokens=options.pack, batch_size=options.batch, ranks=options.ranks)
    return lambda folder, visions: predict(folder, plan, visions)
