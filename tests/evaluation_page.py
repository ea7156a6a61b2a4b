"""A report's HTML as a tree, so that tests can say what is where."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Element:
    """A tag with its attributes and what is in it."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.inside: list[Element | str] = []

    def walk(self) -> Iterator[Element]:
        """All elements below this one, in the order of the text."""
        for each in self.inside:
            if isinstance(each, Element):
                yield each
                yield from each.walk()

    def all(self, tag: str = "", cls: str = "") -> list[Element]:
        """Those below with this tag and this class, where they are given."""
        return [
            each
            for each in self.walk()
            if tag in ("", each.tag) and (not cls or cls in each.attributes.get("class", "").split())
        ]

    def one(self, tag: str = "", cls: str = "") -> Element:
        """The only one."""
        (found,) = self.all(tag, cls)
        return found

    @property
    def text(self) -> str:
        """What is shown, with single spaces."""
        return " ".join(self._raw().split())

    def _raw(self) -> str:
        return "".join(each if isinstance(each, str) else each._raw() for each in self.inside)

    @property
    def style(self) -> dict[str, str]:
        """Properties of the style attribute."""
        pieces = (piece.partition(":") for piece in self.attributes.get("style", "").split(";") if piece)
        return {name.strip(): value.strip() for name, _, value in pieces}

    @property
    def picture(self) -> Image.Image:
        """What an image with a data: address shows."""
        head, _, content = self.attributes["src"].partition(",")
        assert head in ("data:image/jpeg;base64", "data:image/png;base64")
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        image.load()
        return image


class Page(HTMLParser):
    """Reads a page, all of whose tags have to be closed where they should; `root` is the tree."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].inside.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].inside.append(data)
