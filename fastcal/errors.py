"""The one exception type for what a user can put right."""


class FastcalError(Exception):
    """Something in the input, the settings or the environment stops the work.

    Its text is one line that names the thing and says what to do about it.
    """
