"""Which kinds of image files are read, and what is said of the others: known by their first bytes."""

from __future__ import annotations

# What photographs and drawings are kept in. Pillow's other readers are older, rarer and start other programs (EPS).
FORMATS = (
    "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# Kinds of files that people try: how the first bytes tell them, what they are called, and what to do with them.
CONVERT = "convert it to PNG or JPEG"
_HEIC = "convert it to JPEG, for example with `heif-convert` (libheif) or the photo program that made it"
_BRANDS = {
    b"heic": ("HEIC", _HEIC), b"heix": ("HEIC", _HEIC), b"hevc": ("HEIC", _HEIC), b"hevx": ("HEIC", _HEIC),
    b"heim": ("HEIC", _HEIC), b"heis": ("HEIC", _HEIC), b"mif1": ("HEIC", _HEIC), b"msf1": ("HEIC", _HEIC),
    b"avif": ("AVIF", CONVERT), b"avis": ("AVIF", CONVERT), b"crx ": ("CR3 (camera raw)", CONVERT),
}  # fmt: skip
_OTHER_FORMATS = (
    (b"DDS ", "DDS"), (b"qoif", "QOI"), (b"BLP", "BLP"), (b"%!PS", "EPS"), (b"%PDF", "PDF"), (b"8BPS", "PSD"),
    (b"\xff\x0a", "JPEG XL"), (b"\x00\x00\x00\x0cJXL ", "JPEG XL"), (b"v/1\x01", "OpenEXR"), (b"#?RADIANCE", "HDR"),
    (b"FUJIFILM", "RAF (camera raw)"), (b"gimp xcf", "XCF"), (b"IIU\0", "RW2 (camera raw)"),
    (b"IIRO", "ORF (camera raw)"), (b"IIRS", "ORF (camera raw)"), (b"MMOR", "ORF (camera raw)"),
    (b"II*\0\x10\0\0\0CR", "CR2 (camera raw)"), (b"II\xbc", "JPEG XR"),
)  # fmt: skip
# Of known formats: how their files begin.
_KNOWN_STARTS = (
    (b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (b"\0\0\1\0", "ICO"),
)  # fmt: skip


class ImageError(ValueError):
    """The bytes are not an image that can be used; the text is the reason, to stand in brackets."""


def refuse_other_formats(content: bytes) -> None:
    """Raise ImageError where the bytes are of a kind that is not read; the text names it."""
    head = content[:512]
    if head[4:8] == b"ftyp":
        # Generic brands come first in some files; what the image is stands among the compatible ones.
        brands = [head[8:12], *(head[place : place + 4] for place in range(16, min(len(head), 64), 4))]
        found = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
        name, advice = next((each for each in found if each[0] != "HEIC"), found[0] if found else ("", ""))
        if name:
            raise ImageError(f"it is {name}; {advice}")
    for start, name in _OTHER_FORMATS:
        if head.startswith(start):
            raise ImageError(f"it is {name}; {CONVERT}")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!--", b"<!doctype")) and b"<svg" in content[:4096]):
        raise ImageError(f"it is SVG; {CONVERT}")
    if text.startswith((b"<html", b"<!doctype html")):
        raise ImageError("it is a web page; download the image itself")
    if text.startswith(b"version ") and b"git-lfs" in text:
        raise ImageError("it is a git-lfs pointer; download the file itself")


def unidentified(content: bytes) -> str:
    """Why Pillow finds no image in the bytes."""
    for start, name in _KNOWN_STARTS:
        if content.startswith(start):
            return f"it is damaged, or a kind of {name} that cannot be read; {CONVERT}"
    return "it is not an image of a known format"
