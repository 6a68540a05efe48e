"""Errors that a user can cause. The command line turns each into one line and an exit code."""


class NestlingError(ValueError):
    """A user's input cannot be used; the message names it, shows the value and says the remedy."""

    exit_code = 1


class UsageError(NestlingError):
    """A flag, a recipe key or a path on the command line is wrong."""

    exit_code = 2


def is_panic(error: BaseException) -> bool:
    """Return whether the error is a panic of a library in Rust (tokenizers), which is no `Exception`."""
    return type(error).__name__ == "PanicException"
