"""Exit statuses, and errors that are reported in one line."""

import difflib
import errno
import unicodedata
from collections.abc import Sequence

START_AGAIN = 75
"""Exit status of a job that was asked to stop and has saved a checkpoint (EX_TEMPFAIL of sysexits.h: try again)."""

DIVERGED = 3
"""Exit status of a job that its lock ended, or whose validation loss is not finite when all steps are done.

Nothing starts such a job again, because it would end in the same way.
"""

PATH_ERRORS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ELOOP}
PATH_ERRORS |= {errno.EACCES, errno.EPERM, errno.EROFS}
"""Errors of the system that the path in an option, an argument or a recipe's key may cause."""

_LONGEST = 2000
"""Characters of the longest message: a message may repeat what the user wrote, which may be long."""


class UserError(Exception):
    """The user's input is wrong. One line says what is wrong, where, and how to fix it.

    Attributes:
        status: The exit status.
    """

    status = 2

    def __init__(self, message: str):
        super().__init__(one_line(message))


class SharedUserError(UserError):
    """A `UserError` that all ranks find together and rank 0 reports."""


class Unavailable(UserError):
    """What the input names cannot be had now, as when the network is down. The same command may succeed later."""

    status = 1


class JobError(Exception):
    """The job cannot continue. All ranks find this together, and rank 0 reports it in one line. Exit status 1."""


class BrokenModel(Exception):
    """A model's outputs are not finite, so a measurement of it means nothing. One line. Exit status 1."""


def one_line(text: object, longest: int = _LONGEST) -> str:
    """Return a text, or an exception's message, as one line that any terminal can show.

    Characters that cannot be printed are escaped as Python does; an exception's line breaks become spaces. What exceeds
    `longest` characters is cut from the middle: a message says at its beginning what is wrong, and at its end how to
    fix it.
    """
    if isinstance(text, BaseException):
        text = " ".join(str(text).split()) or type(text).__name__
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return line if len(line) <= longest else f"{line[: longest // 2]}...{line[3 - longest // 2 :]}"


def short_line(text: object) -> str:
    """Return a name, or a library's message, as one line of at most 300 characters."""
    return one_line(text, 300)


def known_names(name: str, known: Sequence[str]) -> str:
    """Return the hint that ends a message about an unknown name: the known names that are close to it, or all."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean: {', '.join(close)}" if close else f"known are: {', '.join(known)}"


def breaks_lines(character: str) -> bool:
    """Whether a character is a control character, half of a surrogate pair, or ends a line."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def is_of_content(error: BaseException) -> bool:
    """Whether reading has failed because a file is missing or holds something else, not because it cannot be read now.

    What pyarrow finds in a file may be an OSError too, without a number.
    """
    return not isinstance(error, OSError) or error.errno in (None, errno.ENOENT)


def os_reason(error: OSError) -> str:
    """Return why a file cannot be read or written, in a few words."""
    return error.strerror.lower() if error.strerror else one_line(error)
