"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input: the message names the file or key, what is wrong with it, and the fix.

    Entry points print it as a single message and exit with status 2; it never comes with a stack trace.
    """
