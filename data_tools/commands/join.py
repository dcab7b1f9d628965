"""`megaprior-data join`: completes a build whose parts were built by a job array."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaprior.data_tools.commands.verb import Commands, add_verb

_JOIN = """\
needs neither the inputs nor the tokenizer; refuses, naming them, while parts are at work or missing. The result is, byte
for byte, that of a build in one go.

with Slurm, where build.sbatch has the line megaprior-data build ... --part $SLURM_ARRAY_TASK_ID/10, ten parts and the step
after them:
  id=$(sbatch --parsable --array=0-9 build.sbatch)
  sbatch --dependency=afterok:$id --wrap "megaprior-data join shards/pairs"

example:
  megaprior-data join shards/pairs
"""


def add(commands: Commands) -> None:
    """Add `join`."""
    parser = add_verb(commands, "join", _join, "complete a build whose parts were built with --part", _JOIN)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --output of the parts")


def _join(options: argparse.Namespace) -> int:
    from megaprior.data_tools.building.join import join
    from megaprior.data_tools.commands.screen import print_built

    print_built(options.folder, join(options.folder))
    return 0
