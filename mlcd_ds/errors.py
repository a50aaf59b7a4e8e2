"""The one exception that a user is meant to read, and the exit statuses that go with it."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
INTERRUPTED = "interrupted; the same command goes on"
MAX_MESSAGE = 900  # characters: a screen


class UserError(ValueError):
    """Bad input: the message names the file or key, what is wrong with it, and the fix.

    Entry points print it as a single message and exit with status 2; it never comes with a stack trace.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str, limit: int = MAX_MESSAGE) -> str:
    """The message on one line, its middle left out where it is long: the place comes first, the fix last."""
    text = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    return text if len(text) <= limit else f"{text[: 2 * limit // 3]} ... {text[-limit // 3 :]}"
