"""Errors a user can meet. Each message says where, what was received, what was expected and what to do.

The exit code is what ``bamboo-md`` returns for that error; anything that is not a ``BambooError`` is a bug (code 1).
"""

import difflib
from collections.abc import Iterable


class BambooError(Exception):
    """Base class of all errors meant for the user."""

    exit_code = 2


class InputError(BambooError):
    """Something the user gave is wrong: a file, a key, a value, a structure."""


class LockedError(InputError):
    """Another process works in a folder."""


class ModelFileError(InputError):
    """A model file is damaged, foreign, or of a newer format."""


class UnknownElementError(BambooError):
    """The model was not trained on an element of the structure."""

    exit_code = 3


class GuardError(BambooError):
    """A guard stopped the simulation."""

    exit_code = 4


class ConvergenceError(BambooError):
    """An iteration used up its budget before it reached its tolerance."""

    exit_code = 4


class CheckpointedStop(BambooError):
    """The run stopped with a checkpoint; the same command continues it."""

    exit_code = 75


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of the known words, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
