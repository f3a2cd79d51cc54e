"""The two exceptions that are not bugs of the program: a mistake in the input, and an interrupt."""


class UserError(Exception):
    """Bad input: a missing folder, a mask value outside the classes, a truncated checkpoint, and the like.

    The message is one line that names what was given (with the path), what is expected, and what to do.
    ``python -m train`` prints it as ``error: ...`` and exits with status 2, without a traceback.
    """


class Interrupted(Exception):
    """The training was interrupted and has written its checkpoint; the message says how to go on.

    Args:
        message: for the user.
        status: exit status of the program, 128 + the number of the signal.
    """

    def __init__(self, message: str, status: int = 130) -> None:
        super().__init__(message)
        self.status = status


def reason(error: Exception) -> str:
    """First line of the message of ``error``, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
