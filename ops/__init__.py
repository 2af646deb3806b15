"""How it is run: the `muniment` command, the worker, migrations, the bench."""


class OperatorError(Exception):
    """What an operator can mend. The command ends with its message, and without a traceback."""
