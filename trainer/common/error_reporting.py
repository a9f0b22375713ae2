"""How a command ends: every error that a user can cause is one line on stderr and an exit status."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import click

from trainer.common.credentials import redacted
from trainer.common.errors import PATH_ERRORS, BrokenModel, UserError, one_line, os_reason

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


@contextmanager
def report_errors() -> Iterator[None]:
    """Run a command in the `with` block; an error that a user can cause ends the process with one line on stderr."""
    _repair_streams()
    try:
        yield
        sys.stdout.flush()  # here, where an error can still be reported
    except UserError as error:
        _exit(str(error), error.status)
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command: the message is its help
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _exit(_click_message(error), 2)
    except BrokenModel as error:
        _exit(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # as in `unipool recipes | head -1`
        _discard_stdout()
        sys.exit(1)  # as click does where it catches this itself
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_ERRORS:
            raise
        _discard_stdout()
        where = "" if error.filename is None else f"{error.filename}: "
        _exit(f"{where}{os_reason(error)}", 2 if where and error.errno in PATH_ERRORS else 1)


def end_process(status: int) -> NoReturn:
    """End a rank of a job as `sys.exit` would, but without taking the interpreter apart.

    Threads of torch's process groups outlive the groups. One that drops the last reference to a tensor needs the GIL,
    and if the interpreter is being taken apart by then, the process ends with SIGABRT instead of its status.
    """
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and not mpi.Is_finalized():  # which it would do in what is left out here
        mpi.Finalize()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or on a full disk
            stream.flush()
    os._exit(status)


def _click_message(error: click.ClickException) -> str:
    """Return click's message; of a missing argument in one line, with the help that describes it."""
    message = error.format_message()
    if isinstance(error, click.MissingParameter) and error.ctx is not None:
        return f"{' '.join(message.split()).removesuffix('.')}. See {error.ctx.command_path} --help."
    return message


def _exit(line: str, status: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {one_line(redacted(line))}", file=sys.stderr)
    sys.exit(status)


def _repair_streams() -> None:
    """Open closed streams on the null device, and print "?" for characters that stdout's encoding lacks."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    with suppress(AttributeError):  # stdout may have been replaced by another object
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def _discard_stdout() -> None:
    """Send what is still buffered nowhere, instead of failing once more when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
