"""The one exception for bad input."""


class UserError(Exception):
    """Bad input. The message is one line that names the thing, the value and what would be right.

    Commands print it without a traceback and leave with exit code 2 (`plm.command.run`); every other exception is our
    own bug and keeps its traceback.
    """
