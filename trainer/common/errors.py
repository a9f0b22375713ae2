"""Errors that are told to the user in one line, and exit statuses."""

import unicodedata

START_AGAIN = 75
"""Exit status of a job that was asked to stop and has saved a checkpoint (EX_TEMPFAIL of sysexits.h: try again)."""

DIVERGED = 1
"""Exit status of a job that has done all its steps and whose validation loss is not finite."""

_LONGEST = 2000
"""Characters of a message: what a user has written may be repeated in it, and may be long."""


class UserError(Exception):
    """The user's input is wrong: one line saying what, where, and how to mend it. Exit status 2."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class SharedUserError(UserError):
    """A `UserError` that all ranks find together, and rank 0 says."""


class JobError(Exception):
    """The job cannot go on, found by all ranks together: one line that rank 0 says. Exit status 1."""


class BrokenModel(Exception):
    """A model computes numbers that are not finite, so that what was measured says nothing: one line. Exit status 1."""


def one_line(text: str) -> str:
    """The text on one line that any terminal shows: what is no character for it is escaped as Python does."""
    shown = "".join(ascii(c)[1:-1] if unprintable(c) else c for c in text)
    # What is wrong stands at the beginning of a message, and how to mend it at the end.
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]}...{shown[3 - _LONGEST // 2 :]}"


def unprintable(character: str) -> bool:
    """Whether it is a control character, half of a surrogate pair, or ends a line."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
