"""JSON files of others, read without trust. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path, what: str = "a JSON object") -> dict[str, Any]:
    """The object in a JSON file, `what` it is for a message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or cannot be read; the text goes behind its name.
    """
    if file.exists() and not file.is_file():  # opening a named pipe would wait for its other end
        raise ValueError("is not a file")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("is not JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"is not {what}")
    return found
