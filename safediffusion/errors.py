"""What a user can mend: one sentence, no traceback. The command prints it on stderr and exits with code 2."""


class UserError(Exception):
    """Bad input, a missing file, an impossible combination. The message says what is wrong and how to mend it."""
