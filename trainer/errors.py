"""Errors that are told to the user in one line."""


class UserError(Exception):
    """The user's input is wrong: one line saying what, where, and how to mend it. Exit status 2."""
