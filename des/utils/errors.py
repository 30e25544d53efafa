"""The error that scripts print without a traceback."""


class UserError(Exception):
    """Something the user can mend, said in one sentence; scripts print it and exit with 1, without a traceback."""
