"""What the libraries raise at files of a pipeline that are damaged or do not fit together, as one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sd3.common.command_line import UserError

LONGEST_REASON = 400


@contextlib.contextmanager
def damage_as_user_error(part: Path) -> Iterator[None]:
    """Raise UserError that names the folder `part` for whatever is raised while something is loaded from it."""
    try:
        yield
    except UserError:
        raise
    # A configuration of the wrong kind fails wherever a value of it is used; tokenizers raises plain Exceptions.
    except Exception as error:
        if any(word in str(error).lower() for word in ("out of memory", "allocat")):
            raise
        raise UserError(f"{part} cannot be loaded ({_short(error)}); download it again.") from None


def _short(error: Exception) -> str:
    """In one line; the names of weights are on lines behind the first."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "…"
