"""Errors that are told to the user in one line, and exit statuses."""

START_AGAIN = 75
"""Exit status of a job that was asked to stop and has saved a checkpoint (EX_TEMPFAIL of sysexits.h: try again)."""

DIVERGED = 1
"""Exit status of a job that has done all its steps and whose validation loss is not finite."""


class UserError(Exception):
    """The user's input is wrong: one line saying what, where, and how to mend it. Exit status 2."""


class SharedUserError(UserError):
    """A `UserError` that all ranks find together, and rank 0 says."""


class JobError(Exception):
    """The job cannot go on, found by all ranks together: one line that rank 0 says. Exit status 1."""


class BrokenModel(Exception):
    """A model computes numbers that are not finite, so that what was measured says nothing: one line. Exit status 1."""
