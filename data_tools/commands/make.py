"""`megaprior-data train-tokenizer` and `make-scenes`: a vocabulary from captions, and the project's own sample."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaprior.data_tools.commands.build import add_reading, reading_options
from megaprior.data_tools.commands.verb import Commands, add_verb


def add(commands: Commands) -> None:
    """Add `train-tokenizer` and `make-scenes`."""
    _add_train_tokenizer(add_verb(commands, "train-tokenizer", _train_tokenizer, *_TRAIN_TOKENIZER))
    _add_make_scenes(add_verb(commands, "make-scenes", _make_scenes, *_MAKE_SCENES))


_TRAIN_TOKENIZER = (
    "train a SentencePiece tokenizer (BPE, byte fallback) with ids reserved for the vision roles",
    """\
reads the same inputs as build, captions alone; the same inputs give the same tokenizer, byte for byte.

example:
  megaprior-data train-tokenizer --input pairs/*.tar captions.txt.gz --output tokenizer --vocab-size 8000""",
)


def _add_train_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders to read")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder for tokenizer.model")
    add("--vocab-size", type=int, required=True, metavar="N", help="ids, control and byte tokens included")
    add_reading(parser)


def _train_tokenizer(options: argparse.Namespace) -> int:
    from megaprior.data_tools.options import BuildOptions
    from megaprior.data_tools.vocabulary import train_tokenizer

    reading = BuildOptions(**reading_options(options), text=True)
    tokenizer = train_tokenizer(options.input, options.output, vocab_size=options.vocab_size, options=reading)
    print(f"{options.output}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:16]}")
    return 0


_MAKE_SCENES = (
    "render the project's own sample: scenes of shapes with web-like captions and the truth about every word",
    """\
writes pairs/, heldout/, tower/ (WebDataset tars), reference.txt.gz, text.txt.gz and probe/; one seed gives the same bytes.

example:
  megaprior-data make-scenes --output scenes --pairs 4000 --seed 1""",
)


def _add_make_scenes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the sample; it must not exist")
    add("--pairs", type=int, default=4000, metavar="N", help="training pairs (default: %(default)s)")
    add("--heldout", type=int, default=500, metavar="N", help="held-out pairs (default: %(default)s)")
    add(
        "--reference",
        type=int,
        default=8000,
        metavar="N",
        help="captions of other scenes for the reference (default: %(default)s)",
    )
    add(
        "--text", type=int, default=8000, metavar="N", help="lines of plain text for the text LM (default: %(default)s)"
    )
    add(
        "--probe",
        type=int,
        default=600,
        metavar="N",
        help="true and false statements to tell apart (default: %(default)s)",
    )
    add("--tower", type=int, default=6000, metavar="N", help="pairs for a small vision tower (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="default: %(default)s")


def _make_scenes(options: argparse.Namespace) -> int:
    from megaprior.data_tools.scenes.make import make_scenes

    counts = {name: getattr(options, name) for name in ("pairs", "heldout", "reference", "text", "probe", "tower")}
    make_scenes(options.output, **counts, seed=options.seed)
    print(f"{options.output}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    return 0
