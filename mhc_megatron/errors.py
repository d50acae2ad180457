"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Bad input; the message names the offending value and the remedy.

    The command line prints it as one line, without a traceback, and exits with status 2.
    """
