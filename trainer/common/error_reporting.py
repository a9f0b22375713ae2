"""How a command ends: streams that anything can be printed to; one line and a status for what goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import click

from trainer.common.credentials import redacted
from trainer.common.errors import BrokenModel, UserError, one_line
from trainer.common.text_file import reason

_OF_A_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ELOOP}
_OF_A_PATH |= {errno.EACCES, errno.EPERM, errno.EROFS}
"""What an option, an argument or a key that names a file or a folder may be wrong by."""

_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


@contextmanager
def told() -> Iterator[None]:
    """Runs a command inside the `with`; an error that a user can cause ends the process with one line on stderr."""
    _open_streams()
    try:
        yield
        sys.stdout.flush()  # here, where an error can be told
    except (UserError, click.ClickException) as error:
        _end(error.format_message() if isinstance(error, click.ClickException) else str(error), 2)
    except BrokenModel as error:
        _end(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # as of `unipool recipes | head -1`
        _forget_stdout()
        sys.exit(1)  # as click does where it meets this itself
    except OSError as error:
        if error.filename is None and error.errno not in _OF_A_DISK:
            raise
        _forget_stdout()
        where = "" if error.filename is None else f"{error.filename}: "
        _end(f"{where}{reason(error)}", 2 if where and error.errno in _OF_A_PATH else 1)


def _end(line: str, status: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {one_line(redacted(line))}", file=sys.stderr)
    sys.exit(status)


def _open_streams() -> None:
    """Streams that are closed lead nowhere; for a character that stdout's encoding lacks there is a question mark."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    with suppress(AttributeError):  # a stand-in for stdout
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def _forget_stdout() -> None:
    """What is still buffered goes nowhere, instead of failing once more when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
