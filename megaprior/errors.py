"""Errors that people read: one line that names the file, the sample, both numbers and the remedy.

The command-line programs print such an error as one line and leave with its `exit_code`; anything else is a bug of ours
and keeps its traceback.
"""


class MegapriorError(Exception):
    """Base of every error meant for a person."""

    exit_code = 1


class UsageError(MegapriorError, ValueError):
    """The command, an option or a configuration key is wrong; nothing was touched."""

    exit_code = 2


class DataError(MegapriorError, ValueError):
    """An input, a shard, a score stream or a checkpoint is not what it claims to be; it was refused before any damage."""

    exit_code = 65


class CheckpointError(DataError):
    """A checkpoint is incomplete, corrupted, or belongs to another run."""


class Requeue(MegapriorError):
    """The work stopped in good order before it was done: repeat the same command to go on (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75
