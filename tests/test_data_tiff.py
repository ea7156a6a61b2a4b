"""TIFF files by their tags: what Pillow passes on as black, inverted or a preview is put right or refused."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest

from sd3.data.decoding import ImageError, decode, decode_with_changes, image_size
from sd3.data.facts import facts_of

WIDTH, HEIGHT = 8, 2
FORMATS = {1: "B", 3: "H", 4: "I"}  # of struct, by the numbers that TIFF has for types


Tags = Mapping[int, tuple[int, list[int]]]  # type and values by number


def tiff(bits: list[int], photometric: int, data: bytes, tags: Tags | None = None) -> bytes:
    """One strip, little-endian."""
    entries = {
        256: (4, [WIDTH]), 257: (4, [HEIGHT]), 258: (3, bits), 259: (3, [1]), 262: (3, [photometric]), 273: (4, [0]),
        277: (3, [len(bits)]), 278: (4, [HEIGHT]), 279: (4, [len(data)]), **(tags or {}),
    }  # fmt: skip
    packed = {tag: struct.pack(f"<{len(values)}{FORMATS[kind]}", *values) for tag, (kind, values) in entries.items()}
    end = 8 + 2 + 12 * len(entries) + 4
    long = {tag: content for tag, content in packed.items() if len(content) > 4}
    directory, more = struct.pack("<H", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        content = packed[tag]
        if tag in long:
            content, more = struct.pack("<I", end + len(more)), more + content
        elif tag == 273:
            content = struct.pack("<I", end + sum(map(len, long.values())))
        directory += struct.pack("<HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + more + data


def grey(content: bytes) -> int:
    image = decode(content)
    assert image.size == (WIDTH, HEIGHT)
    (level,) = {level for levels in image.getextrema() for level in levels}
    return level


@pytest.mark.parametrize(("value", "level"), [(4095, 255), (2048, 128), (0, 0)])
def test_grey_of_12_bits_is_scaled_by_its_own_white(value: int, level: int) -> None:
    pair = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
    content = tiff([12], 1, pair * (WIDTH * HEIGHT // 2))
    assert grey(content) == level
    assert decode_with_changes(content).changes == ("12-bit grey scaled to 8 bits",)


@pytest.mark.parametrize("value", [0, 65535])
def test_deep_grey_whose_white_is_zero_is_turned_over(value: int) -> None:
    assert grey(tiff([16], 0, struct.pack("<H", value) * 16)) == 255 - value // 257
    assert grey(tiff([16], 1, struct.pack("<H", value) * 16)) == value // 257
    floats = {339: (3, [3])}
    assert grey(tiff([32], 0, struct.pack("<f", value / 65535) * 16, floats)) == 255 - value // 257


def test_palette_of_8_bits_is_not_black() -> None:
    colours = [200] * 256 + [30] * 256 + [10] * 256
    for factor in (1, 257):
        content = tiff([8], 3, bytes(16), {320: (3, [value * factor for value in colours])})
        assert decode(content).getpixel((0, 0)) == (200, 30, 10)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({254: (4, [1])}, "its first image is a preview, as in camera raw files; convert it to PNG or JPEG"),
        ({254: (4, [1]), 50706: (1, [1, 4, 0, 0])}, "it is DNG (camera raw); convert it to PNG or JPEG"),
        ({339: (3, [2])}, "its values are signed 8-bit numbers; convert it to PNG or JPEG"),
    ],
)
def test_refused_for_what_the_tags_say(tags: Tags, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        decode(tiff([8], 1, bytes(16), tags))
    assert str(error.value) == reason


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_and_turn_of_a_rotated_tiff(orientation: int) -> None:
    content = tiff([8], 1, bytes(range(16)), {274: (3, [orientation])})
    found = decode_with_changes(content)
    assert image_size(content) == found.image.size == ((8, 2) if orientation < 5 else (2, 8))
    assert (facts_of(content).width, facts_of(content).height) == found.image.size
    assert ("turned upright as its EXIF data say" in found.changes) == (orientation > 1)


@pytest.mark.parametrize("start", [b"II*\0\x10\0\0\0CR\2\0", b"IIU\0\x18\0\0\0", b"IIRO\x08\0\0\0"])
def test_camera_raw_is_named(start: bytes) -> None:
    with pytest.raises(ImageError, match=r"camera raw\); convert it"):
        decode(start + bytes(600))
