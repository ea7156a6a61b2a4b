"""Pages that people open in a browser: one HTML file each, which holds everything it shows."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def data_address(content: bytes, kind: str) -> str:
    """A data: address that holds the file `content` itself; `kind` is its media type, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def render(template: Path, **values: object) -> str:
    """The HTML of `template`, which extends page.html.jinja of this directory; all that is filled in is escaped."""
    folders = (template.parent, Path(__file__).parent)
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(**values)
