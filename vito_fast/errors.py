"""Errors that are the user's to mend."""


class UserError(Exception):
    """A mistake of the user's (a wrong path, key, value or file). The message is one line that names the offending
    value
    and says what to do; the command line prints it as ``error: ...`` and exits with status 2, without a traceback."""
