"""Errors that a user can act on: one line that says what was expected and what came."""


class InputError(ValueError):
    """Bad input: the command line prints its one line and exits with status 2."""


class CapacityError(InputError):
    """A compressed history would not fit the positions that the host was trained on."""


class MismatchError(InputError):
    """Two parts (host, tokenizer, crouter, projector) do not belong together."""
