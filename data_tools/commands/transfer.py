"""`megaprior-data transfer-scores`: one reference for shards of any tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaprior.data_tools.commands.verb import Commands, add_verb


def add(commands: Commands) -> None:
    """Add `transfer-scores`."""
    _arguments(add_verb(commands, "transfer-scores", _run, *_TEXTS))


_TEXTS = (
    "carry reference scores over to shards of the same captions made with another tokenizer",
    """\
Every log-probability of the source is spread evenly over the bytes of its token and summed over the bytes of each token
of the target, so that the total of a caption stays what the reference gave it. EOS maps to EOS.

A target caption takes the scores of the source caption that has the same key and spells the same bytes; images are not
compared, the reference never saw them. Both folders are best built from the same inputs. A target caption that was cut
takes the scores of its part. One without scores is refused, or with --unscored ntp weighted evenly (w = 1 for all its
tokens) and counted:
  missing      the source has no caption of this key
  different    it has one that spells other bytes: other text, or a tokenizer that normalises
  truncated    the source was cut before the caption ends
  unspelled    a token stands for no bytes, as that of an unknown character does
Source captions that no target asks for are left out. Interrupted, the same command goes on where it stopped.

The inputs are built once with each tokenizer (build --text does for the scored folder), the reference scores its own.

examples:
  megaprior-data transfer-scores --from shards/scored_llama3 --to shards/pairs_mistral
  megaprior-data transfer-scores --from shards/scored_llama3 --to shards/pairs_mistral --name ref_llama3 --workers 8""",
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="DIR", help="scored shard folder")
    add("--to", dest="target", type=Path, required=True, metavar="DIR", help="shard folder that gets the scores")
    add("--scores", default="ref_logprob", metavar="NAME", help="score stream to read (default: %(default)s)")
    add("--name", metavar="NAME", help="score stream to write (default: that of --scores)")
    add(
        "--unscored",
        default="refuse",
        choices=("refuse", "ntp"),
        help="captions without scores: refuse them, or weight their tokens evenly (default: %(default)s)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes; the result is the same (default: %(default)s)")


def _run(options: argparse.Namespace) -> int:
    from megaprior.data_tools.transfer.run import Request, transfer_scores

    request = Request(
        source=str(options.source),
        target=str(options.target),
        scores=options.scores,
        name=options.name or options.scores,
        unscored=options.unscored,
    )
    done = transfer_scores(request, workers=options.workers)
    left = {reason: count for reason, count in done["unscored"].items() if count}
    told = ", ".join(f"{count:,} {reason}" for reason, count in left.items())
    print(
        f"{options.target}: {done['name']!r} for {done['captions'] - sum(left.values()):,} of {done['captions']:,} captions "
        f"({done['tokens']:,} tokens); the source holds {done['source_captions']:,}"
    )
    if left:
        print(f"weighted evenly, having no scores: {told}")
    print(f"next: megaprior-data verify {options.target}")
    return 0
