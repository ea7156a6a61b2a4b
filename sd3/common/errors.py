"""What a user did wrong, told apart from a bug. Standard library only."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or something missing; the text is one sentence: the value, what was expected, what to do."""

    def __init__(self, text: str, status: int = 2) -> None:
        """`status` is the exit status: 2 for bad input, 3 for something that set-up provides."""
        super().__init__(text)
        self.status = status
