"""The command `megaprior-data`: everything that happens to data before training, without a network.

Only the command that runs is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megaprior import __version__
from megaprior.errors import DataError, MegapriorError, UsageError

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

_BUILD = """\
inputs, told apart by suffix; a folder stands for the files directly inside it:
  .tar .tar.gz .tgz      WebDataset, as img2dataset writes it: KEY.jpg KEY.txt KEY.json; streamed, never extracted
  .jsonl .tsv (or .gz)   one record a line, with the image's name relative to --images; --text takes captions alone
  .txt (or .gz)          one caption a line; --documents cuts long text into windows instead

what cannot be used (broken images, blank captions, bad lines) goes to DIR/quarantine.jsonl with its reason and is
counted; nothing is dropped silently. Interrupted, the same command goes on where it stopped.

examples:
  megaprior-data build --input pairs/*.tar --output shards/pairs --tokenizer tokenizer.model
  megaprior-data build --input photos/captions.jsonl --images photos/jpg --caption-column alt_text \\
      --output shards/photos --tokenizer tokenizer.model
  megaprior-data build --input captions.txt.gz --output shards/reference --tokenizer tokenizer.model
  megaprior-data build --input wiki.jsonl --text --documents --caption-column text --output shards/text --tokenizer llama3
two halves of one set that share no image, the first for the reference, the second for the vision-language model:
  megaprior-data build --input pairs/*.tar --text --subset 0:0.5 --output shards/reference --tokenizer tokenizer.model
  megaprior-data build --input pairs/*.tar        --subset 0.5:1 --output shards/pairs     --tokenizer tokenizer.model
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="megaprior-data",
        description="Prepare image-text pairs and text: build, verify and look at shards. Nothing is ever downloaded.",
        epilog=_STORY,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"megaprior-data {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, more: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, epilog=more, formatter_class=raw)
        added.set_defaults(run=run)
        return added

    _add_build(command("build", _build, "read pairs or text and write shards", _BUILD))
    _add_verify(command("verify", _verify, *_VERIFY))
    _add_show(command("show", _show, *_SHOW))
    _add_train_tokenizer(command("train-tokenizer", _train_tokenizer, *_TRAIN_TOKENIZER))
    _add_make_scenes(command("make-scenes", _make_scenes, *_MAKE_SCENES))
    return parser


# ---------------------------------------------------------------- build


def _add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders to read")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty")
    add("--tokenizer", type=Path, required=True, metavar="FILE|FOLDER", help="tokenizer file, or folder that holds one")
    add(
        "--dry-run",
        action="store_true",
        help="show the shards that would be written and the first samples; write nothing",
    )
    add("--resume", action="store_true", help="go on with an interrupted build, as repeating its command does anyway")
    _add_reading(parser)
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that image names are relative to (default: the file's own, or images/ in it)",
    )
    add("--image-column", default="image", metavar="NAME", help="column with the image's name (default: %(default)s)")
    add(
        "--max-sequence",
        type=int,
        default=2048,
        metavar="N",
        help="tokens at most in one caption or window (default: %(default)s)",
    )
    add(
        "--subset",
        default="0:1",
        metavar="A:B",
        help="keep this fraction, chosen by image content (by text where there is none)",
    )
    add("--text", action="store_true", help="take the captions alone, without images")
    add("--documents", action="store_true", help="input is long text: cut it into consecutive windows")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--format", default="auto", choices=("auto", "webdataset", "jsonl", "tsv", "text"), help="default: by suffix")
    add(
        "--caption-column",
        metavar="NAME",
        help="column with the caption, a string or a list of them; a number counts the columns of a tsv without header "
        "from 0 (default: captions, else caption)",
    )
    add("--captions", default="all", choices=("all", "first"), help="of an image with several (default: %(default)s)")


def _build(options: argparse.Namespace) -> int:
    from megaprior.data_tools.build import build, preview
    from megaprior.data_tools.options import BuildOptions, parse_subset
    from megaprior.data_tools.screen import print_built, print_preview

    wanted = BuildOptions(
        format=options.format,
        images=options.images,
        image_column=options.image_column,
        caption_column=options.caption_column,
        captions=options.captions,
        max_sequence=options.max_sequence,
        subset=parse_subset(options.subset),
        text=options.text,
        documents=options.documents,
    )
    if options.dry_run:
        print_preview(preview(options.input, options.output, tokenizer=options.tokenizer, options=wanted))
    else:
        body = build(options.input, options.output, tokenizer=options.tokenizer, options=wanted)
        print_built(options.output, body)
    return 0


# ---------------------------------------------------------------- verify, show

_VERIFY = (
    "check every digest, count and alignment of shard folders; exit code 65 when anything is wrong",
    "example:\n  megaprior-data verify shards/pairs shards/reference",
)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="shard folders")


def _verify(options: argparse.Namespace) -> int:
    from megaprior.data.shards import verify
    from megaprior.data_tools.screen import print_verified

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
    from megaprior.data_tools.screen import print_samples

    print_samples(options.folder, count=options.n, sample=options.sample, scores=options.scores)
    return 0


# ---------------------------------------------------------------- train-tokenizer, make-scenes

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
    _add_reading(parser)


def _train_tokenizer(options: argparse.Namespace) -> int:
    from megaprior.data_tools.options import BuildOptions
    from megaprior.data_tools.vocabulary import train_tokenizer

    reading = BuildOptions(
        format=options.format, caption_column=options.caption_column, captions=options.captions, text=True
    )
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
    from megaprior.data_tools.scenes import make_scenes

    counts = {name: getattr(options, name) for name in ("pairs", "heldout", "reference", "text", "probe", "tower")}
    make_scenes(options.output, **counts, seed=options.seed)
    print(f"{options.output}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
