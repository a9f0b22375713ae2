"""Errors that are told to the user in one line, and exit statuses."""

START_AGAIN = 75
"""Exit status of a job that was asked to stop and has saved a checkpoint (EX_TEMPFAIL of sysexits.h: try again)."""


class UserError(Exception):
    """The user's input is wrong: one line saying what, where, and how to mend it. Exit status 2."""


class SharedUserError(UserError):
    """A `UserError` that all ranks find together, and rank 0 says."""


class JobError(Exception):
    """The job cannot go on, found by all ranks together: one line that rank 0 says. Exit status 1."""
