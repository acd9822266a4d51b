"""The one exception for what a user can mend: ``InputError``."""


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    Scripts print it on stderr and exit with code 2 (``utils.cli.run``).
    """
