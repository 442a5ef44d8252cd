"""The one exception for mistakes of the user: bad flags, missing files, broken data."""


class UserError(ValueError):
    """Says in one line what was given, what is allowed and what to do. The command line prints it and exits with 2."""
