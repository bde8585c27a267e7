"""The failures a user can meet, each with the process exit code it ends in.

Every message names the key or file, the value seen and the fix. Code that finds a slip of our own uses `assert`.
"""


class SwinScaleError(Exception):
    """Base of all errors that reach the user as one message without a traceback."""

    exit_code = 1


class UserError(SwinScaleError, ValueError):
    """The user's input is wrong: config key, command-line argument, model name, image size."""

    exit_code = 2


class DataError(SwinScaleError):
    """Shards, manifests, indices or images cannot be used."""

    exit_code = 3


class CheckpointError(SwinScaleError):
    """A checkpoint or weight file is damaged, hostile, or does not fit."""

    exit_code = 4


class DivergedError(SwinScaleError):
    """Training produced non-finite values, or skipped more steps in a row than its budget allows."""

    exit_code = 5


class PeerLostError(SwinScaleError):
    """Another rank died or hung, or this one's GPU failed; the job should be started again."""

    exit_code = 6


EXIT_PREEMPTED = 75
"""Preempted and saved: run the same command again (EX_TEMPFAIL of sysexits.h)."""


class PreemptedError(SwinScaleError):
    """The run ends because it was asked to, with its state saved; the same command goes on from there."""

    exit_code = EXIT_PREEMPTED
