"""The error that scripts print without a traceback."""


class UserError(Exception):
    """An error the user can fix. Scripts print it and exit with status 1, without a traceback."""
