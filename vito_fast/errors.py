"""Exceptions shared by all packages."""


class UserError(Exception):
    """A mistake of the user: a wrong path, key, value or file.

    The message is one line that names the offending value and the remedy. The command line prints it as ``error: ...``
    and exits with status 2, without a traceback.
    """
