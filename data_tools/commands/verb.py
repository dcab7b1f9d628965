"""How a verb of `megaprior-data` is added: its name, what runs, one line of help, and examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], help: str, more: str
) -> argparse.ArgumentParser:
    """A parser for `megaprior-data NAME`; `run` gets the parsed options and returns the exit code (None is 0)."""
    raw = argparse.RawDescriptionHelpFormatter
    added = commands.add_parser(name, help=help, description=help, epilog=more, formatter_class=raw)
    added.set_defaults(run=run)
    return added
