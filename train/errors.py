"""The one exception that stands for a mistake in the input, not in the program."""


class UserError(Exception):
    """Bad input: a missing folder, a mask value outside the classes, a truncated checkpoint, and the like.

    The message is one line that names what was given (with the path), what is expected, and what to do.
    ``python -m train`` prints it as ``error: ...`` and exits with status 2, without a traceback.
    """
