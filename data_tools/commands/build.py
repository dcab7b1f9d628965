"""`megaprior-data build`: its arguments, its help, and how it is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprior.data_tools.commands.verb import Commands, add_verb
from megaprior.errors import UsageError

if TYPE_CHECKING:
    from megaprior.data_tools.options import BuildOptions

_BUILD = """\
inputs, told apart by suffix, then by their first bytes; a folder stands for the files directly inside it:
  .tar .tar.gz .tgz      WebDataset, as img2dataset writes it: KEY.jpg KEY.txt KEY.json; streamed, never extracted
  .parquet               image bytes, Hugging Face's {bytes, path}, or names relative to --images; only needed columns are read
  a saved data set       what `datasets` writes with save_to_disk (.arrow); --split chooses one of several
  .jsonl                 a record a line: captions, LLaVA conversations, or messages with images as base64 (SOLO)
  .json                  an array of such records, streamed: LLaVA's files
  .csv .tsv              with a header line; csv may have line ends inside quotes; image names are relative to --images
  .txt                   one caption a line; --documents cuts long text into windows instead
all but parquet and arrow also packed, as .gz, .zst or .lz4. A list of URLs is refused with the img2dataset command that
fetches them: nothing is ever downloaded here. docs/formats.md has the exact shapes.

what cannot be used (broken images, blank captions, bad lines) goes to DIR/quarantine.jsonl with its reason and is
counted; nothing is dropped silently. Interrupted or killed, the same command goes on where it stopped; SIGTERM and SIGUSR1
end it with exit code 75, which asks to be repeated.

examples:
  megaprior-data build --input pairs/*.tar --output shards/pairs --tokenizer tokenizer.model
  megaprior-data build --input photos/captions.jsonl --images photos/jpg --caption-column alt_text \\
      --output shards/photos --tokenizer tokenizer.model
  megaprior-data build --input blip_laion_cc_sbu_558k.json --images images --output shards/llava --tokenizer tokenizer.model
  megaprior-data build --input data/train-*.parquet --caption-column capsfusion laion_2b --captions first \\
      --output shards/capsfusion --tokenizer tokenizer.model
  megaprior-data build --input captions.txt.gz --output shards/reference --tokenizer tokenizer.model
  megaprior-data build --input wiki.jsonl --text --documents --caption-column text --output shards/text --tokenizer llama3
with every core of one machine (the default), over many with MPI, or as a Slurm array of ten parts; the bytes are the same:
  megaprior-data build --input pairs/*.tar --output shards/pairs --tokenizer tokenizer.model --workers 16
  mpirun -n 64 megaprior-data build --input pairs/*.tar --output shards/pairs --tokenizer tokenizer.model
  sbatch --array=0-9 -c 16 build.sbatch; its script has the line
      megaprior-data build --input pairs/*.tar --output shards/pairs --tokenizer tokenizer.model --part $SLURM_ARRAY_TASK_ID/10
  megaprior-data join shards/pairs                            once all ten are done
two halves of one set that share no image, the first for the reference, the second for the vision-language model:
  megaprior-data build --input pairs/*.tar --text --subset 0:0.5 --output shards/reference --tokenizer tokenizer.model
  megaprior-data build --input pairs/*.tar        --subset 0.5:1 --output shards/pairs     --tokenizer tokenizer.model
"""


def add(commands: Commands) -> None:
    """Add `build`."""
    _add_build(add_verb(commands, "build", _build, "read pairs or text and write shards", _BUILD))


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
    _add_scaling(parser)
    add_reading(parser)
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that image names are relative to (default: the file's own, or images/ in it)",
    )
    add(
        "--image-column",
        default="image",
        metavar="NAME",
        help="column with the image or its name (default: %(default)s, else images, jpg, png, webp, file_name)",
    )
    add(
        "--check",
        default="whole",
        choices=("whole", "header"),
        help="how much of an image is read before it is taken: all of it, or its header, which is up to twice as fast and lets "
        "images through that break off later; training drops those, counted (default: %(default)s)",
    )
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


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: the usable cores; under mpirun -n R, 1 for each of the R ranks)",
    )
    add(
        "--part",
        metavar="I/N",
        help="write only shards I, I+N, I+2N, ... of the plan, counted from 0 like --array=0-9 and $SLURM_PROCID; parts run "
        "at the same time, on any machines that share DIR; `join` completes the build",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Which samples of an input are read, and how: what every verb that reads inputs asks."""
    add = parser.add_argument
    formats = ("auto", "webdataset", "parquet", "arrow", "jsonl", "csv", "tsv", "json", "text")
    add("--format", default="auto", choices=formats, help="default: by suffix, then by the first bytes")
    add("--split", metavar="NAME", help="split of a Hugging Face folder, such as train")
    add(
        "--caption-column",
        nargs="+",
        metavar="NAME",
        help="column with the caption, a string or a list of them; several columns give several captions of one image; a "
        "number counts the columns of a table without header from 0 (default: captions, else caption, conversations, messages)",
    )
    add(
        "--captions",
        default="all",
        choices=("all", "first", "random"),
        help="of an image with several: each a sample of its own, the first that is usable (in the order of "
        "--caption-column), or one drawn by a hash of them (default: %(default)s)",
    )
    add(
        "--turns",
        default="one",
        choices=("one", "all"),
        help="of a conversation: its only answer is the caption, and one with several goes to quarantine; or all turns, with "
        "loss on the answers (default: %(default)s)",
    )


def reading_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_reading` asked, as fields of BuildOptions."""
    named = options.caption_column
    return {
        "format": options.format,
        "split": options.split,
        "caption_column": tuple(named) if named else None,
        "captions": options.captions,
        "turns": options.turns,
    }


def _build(options: argparse.Namespace) -> int:
    from megaprior.data_tools.building.build import preview
    from megaprior.data_tools.commands.screen import print_preview
    from megaprior.data_tools.options import BuildOptions, parse_subset

    wanted = BuildOptions(
        **reading_options(options),
        images=options.images,
        image_column=options.image_column,
        check=options.check,
        max_sequence=options.max_sequence,
        subset=parse_subset(options.subset),
        text=options.text,
        documents=options.documents,
    )
    if options.dry_run:
        print_preview(preview(options.input, options.output, tokenizer=options.tokenizer, options=wanted))
        return 0
    return _run(options, wanted)


def _run(options: argparse.Namespace, wanted: BuildOptions) -> int:
    from megaprior.data_tools.building.build import build, build_part
    from megaprior.data_tools.building.parts import parse_part
    from megaprior.data_tools.building.ranks import build_on_ranks, launched_ranks
    from megaprior.data_tools.building.workers import usable_cores
    from megaprior.data_tools.commands.screen import print_built, print_part

    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers {options.workers}: at least 1")
    tokenizer, workers = options.tokenizer, options.workers or usable_cores()
    if options.part is not None:
        part = parse_part(options.part)
        print_part(
            options.output,
            build_part(options.input, options.output, part=part, tokenizer=tokenizer, options=wanted, workers=workers),
        )
        return 0
    if launched_ranks() > 1:
        workers = options.workers or 1
        body = build_on_ranks(options.input, options.output, tokenizer=tokenizer, options=wanted, workers=workers)
    else:
        body = build(options.input, options.output, tokenizer=tokenizer, options=wanted, workers=workers)
    if body is not None:
        print_built(options.output, body)
    return 0
