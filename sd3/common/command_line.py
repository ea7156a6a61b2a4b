"""How the Python scripts refuse: in one sentence on standard error, with a status that says whose turn it is."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Bad input or something missing; the text is one sentence: the value, what was expected, what to do."""

    def __init__(self, text: str, status: int = 2) -> None:
        """`status` is the exit status: 2 for bad input, 3 for something that set-up provides."""
        super().__init__(text)
        self.status = status


class Parser(argparse.ArgumentParser):
    """A parser whose errors are sentences, without the usage, and that takes no abbreviations."""

    def __init__(self, **settings: object) -> None:
        """As argparse's, see there."""
        super().__init__(allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see --help.")


def one_line(text: str) -> str:
    """The text with characters that move the cursor, colour a terminal or cannot be encoded in Python's spelling.

    Names of files may hold any of them.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def positive(text: str) -> int:
    """The number of an option that must be 1 or more.

    Raises:
        ValueError: it is no number, which argparse tells.
        argparse.ArgumentTypeError: it is less.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def seed(text: str) -> int:
    """The number of a --seed: 0 to 4294967295, so that seeds made of it fit torch's 64 bits.

    Raises:
        ValueError: it is no number, which argparse tells.
        argparse.ArgumentTypeError: it is another.
    """
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is no seed from 0 to {2**32 - 1}")
    return number


def status_of(work: Callable[[], None]) -> int:
    """Do what a command is for; returns its exit status, and says on standard error why it is not 0.

    That is a UserError's own, and 2 where a file cannot be read or written.
    """
    try:
        work()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def make_output_dir(folder: Path) -> None:
    """Make the directory that --output-dir names, if it is not there.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir={folder} cannot be made ({error.strerror}); name another directory.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir={folder} cannot be written; name a directory that you may write.")
