"""Decoding of image files: transparency on white, deep grey scaled, everything else refused in a sentence."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd3.common.command_line import UserError
from sd3.data.decoding import ImageError, decode, decode_with_changes, image_size

RED, GREEN, WHITE = (200, 30, 30), (0, 255, 0), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **settings)
    return content.getvalue()


def cutout(mode: str = "RGBA") -> Image.Image:
    """Red and opaque in the upper left quarter, elsewhere green under full transparency."""
    pixels = np.zeros((40, 30, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[:20, :15] = (*RED, 255)
    return Image.fromarray(pixels).convert(mode)


def corners(content: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    image = decode(content)
    assert image.mode == "RGB"
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(
    colour_type: int, values: np.ndarray, key: tuple[int, ...] = (), size: tuple[int, int] | None = None
) -> bytes:
    """A PNG of 16-bit channels [H, W, C], which Pillow cannot write; `key`: the colour declared transparent.

    `size`: height and width that the header claims, else the true ones.
    """
    height, width = size or values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    extra = png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def quantized() -> Image.Image:
    return cutout().convert("RGB").quantize(8)


def keyed(mode: str, form: str = "PNG") -> bytes:
    """A file without alpha that declares the colour of its lower right corner transparent."""
    image = quantized() if mode == "P" else cutout("RGB").convert(mode)
    return encoded(image, form, transparency=image.getpixel((29, 39)))


@pytest.mark.parametrize(
    "content",
    [
        encoded(cutout()), encoded(cutout(), "TIFF"), encoded(cutout(), "TGA"), encoded(cutout(), "ICO"),
        encoded(cutout(), "WEBP", lossless=True), keyed("RGB"), keyed("P"), keyed("P", "GIF"),
    ],
    ids=["png", "tiff", "tga", "ico", "webp", "tRNS of RGB", "tRNS of palette", "gif"],
)  # fmt: skip
def test_transparency_of_colour_lies_on_white(content: bytes) -> None:
    assert corners(content) == (RED, WHITE)
    (change,) = decode_with_changes(content).changes
    assert "transparency on white" in change


@pytest.mark.parametrize("content", [encoded(cutout("LA")), keyed("L"), keyed("1"), encoded(cutout("LA"), "TIFF")])
def test_transparency_of_grey_lies_on_white(content: bytes) -> None:
    first, last = corners(content)
    assert max(first) < 100
    assert last == WHITE


def test_half_transparent_is_mixed_with_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert corners(encoded(image))[0] == (127, 127, 127)


def test_an_opaque_alpha_alters_no_pixel() -> None:
    image = cutout("RGB")
    content = encoded(image.convert("RGBA"))
    assert decode(content).tobytes() == image.tobytes()
    assert decode_with_changes(content).changes == ("RGBA to RGB",)


def test_transparency_of_16_bit_channels() -> None:
    values = np.zeros((4, 4, 3))
    values[..., 0], values[0, 0] = 0x1234, 0x8000
    assert corners(deep_png(2, values, key=(0x1234, 0, 0))) == ((128, 128, 128), WHITE)
    values = np.zeros((4, 4, 4))
    values[0, 0] = (0xFFFF, 0, 0, 0xFFFF)
    assert corners(deep_png(6, values)) == ((255, 0, 0), WHITE)
    assert decode_with_changes(deep_png(6, values)).changes[0] == "16-bit colour to 8 bits"


def deep_sgi(channels: int) -> bytes:
    """A 4x4 SGI image of 16-bit channels."""
    head = struct.pack(">hbbHHHHll", 474, 0, 2, 3 if channels > 1 else 2, 4, 4, channels, 0, 65535).ljust(512, b"\0")
    return head + b"\x12\x34" * (16 * channels)


def deep_jpeg2000() -> bytes:
    """A JPEG 2000 image whose header says that its three channels have 16 bits."""
    content = bytearray(encoded(Image.new("RGB", (16, 16), RED), "JPEG2000"))
    depths = content.find(b"\xff\x4f\xff\x51") + 42  # of each channel, less 1, at every third byte
    assert content[depths : depths + 9 : 3] == b"\7\7\7"
    content[depths : depths + 9 : 3] = b"\17\17\17"
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        deep_png(2, np.zeros((4, 4, 3))), b"P6 4 4 65535\n" + b"\x12\x34" * 48, b"P6 4 4 1023\n" + b"\1\x34" * 48,
        b"P3 2 1 1023\n1 2 3 4 5 6\n", deep_sgi(3), deep_sgi(1), deep_jpeg2000(),
    ],
    ids=["png", "ppm", "ppm of 10 bits", "plain ppm", "sgi", "sgi grey", "jpeg 2000"],
)  # fmt: skip
def test_the_loss_of_more_than_8_bits_is_told(content: bytes) -> None:
    assert decode_with_changes(content).changes[0] == "16-bit colour to 8 bits"


def test_16_bits_for_a_whole_pixel_lose_nothing() -> None:
    """A BMP of 5, 6 and 5 bits."""
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    head = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0) + masks
    content = b"BM" + struct.pack("<IHHI", 14 + len(head) + 32, 0, 0, 14 + len(head)) + head + b"\x00\xf8" * 16
    assert corners(content)[0] == (255, 0, 0)
    assert decode_with_changes(content).changes == ()


def deep_grey(dtype: str = "uint16") -> np.ndarray:
    levels = np.full((40, 30), 128, dtype)
    levels[:20, :15] = 60
    return levels * 257


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(deep_grey())),
        encoded(Image.fromarray(deep_grey()), "TIFF"),
        encoded(Image.frombytes("I;16B", (30, 40), deep_grey(">u2").tobytes()), "TIFF"),
        encoded(Image.fromarray(deep_grey("int32")), "TIFF"),
        encoded(Image.fromarray(deep_grey("int32")), "PPM"),
        encoded(Image.fromarray((deep_grey() / 65535).astype("float32")), "TIFF"),
    ],
    ids=["png", "tiff", "tiff big-endian", "tiff 32 bit", "pgm", "float"],
)
def test_deep_grey_is_scaled(content: bytes) -> None:
    assert corners(content) == ((60, 60, 60), (128, 128, 128))
    assert "scaled to 8 bits" in decode_with_changes(content).changes[0]


def test_deep_grey_with_a_transparent_level() -> None:
    assert corners(encoded(Image.fromarray(deep_grey()), transparency=128 * 257)) == ((60, 60, 60), WHITE)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (deep_grey("int32") * 9, "32-bit values run from 138780 to 296064"),
        (-deep_grey("int32"), "32-bit values run from -32896 to -15420"),
        (deep_grey().astype("float32"), "float values run from 15420 to 32896, not from 0 to 1"),
        (deep_grey().astype("float32") * np.nan, "float values run from nan"),
        (deep_grey().astype("float32") / 65535 - 0.4, "not from 0 to 1"),
    ],
)
def test_values_without_a_scale_are_refused(values: np.ndarray, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, (0, 0, 255))]
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **lossless)
    assert corners(content)[0] == RED
    assert decode_with_changes(content).changes[0] == "first of several frames"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_are_converted_and_it_is_told(mode: str) -> None:
    image = cutout("RGB").convert(mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(content).tobytes() == image.convert("RGB").tobytes()
    assert decode_with_changes(content).changes == (f"{mode} to RGB",)


def test_plain_rgb_stays_as_it_is() -> None:
    image = cutout("RGB")
    decoded = decode_with_changes(encoded(image))
    assert (decoded.image.tobytes(), decoded.changes) == (image.tobytes(), ())


@pytest.mark.parametrize(("orientation", "size"), [(1, (30, 40)), (3, (30, 40)), (6, (40, 30)), (8, (40, 30))])
def test_photographs_are_turned_upright(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(cutout("RGB"), "JPEG", exif=exif)
    assert decode(content).size == image_size(content) == size


HEIC = b"\0\0\0\x18ftyp" + b"mif1\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello", "not an image of a known format"),
        (HEIC, "HEIC.*heif-convert"),
        (encoded(cutout("RGB"), "AVIF"), "AVIF.*PNG or JPEG"),
        (encoded(cutout(), "DDS"), "DDS.*PNG or JPEG"),
        (b"qoif" + bytes(100), "QOI"),
        (b"BLP2" + bytes(100), "BLP"),
        (encoded(cutout("RGB"), "EPS"), "EPS"),
        (b'<?xml version="1.0"?>\n<svg/>', "SVG"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://" b"git-lfs.example/spec/v1\noid sha256:00", "git-lfs pointer"),
    ],
)
def test_other_files_are_named(content: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said) as refused:
        decode(content)
    assert "\n" not in str(refused.value)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ImageError, match="more than 100 million pixels"):
        decode(encoded(Image.new("1", (20_000, 20_000))))
    with pytest.raises(ImageError, match="more than 100 million pixels, 11000x10000"):
        decode(encoded(Image.new("1", (11_000, 10_000))))
    with pytest.raises(ImageError, match="more than 100 million pixels"):
        decode(deep_png(0, np.broadcast_to(np.zeros(1), (1, 1 << 20, 1)), size=(1 << 20, 1 << 20)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "TGA", "PPM", "JPEG2000", "PCX"])
def test_a_damaged_file_is_one_sentence_or_an_image(form: str) -> None:
    """Cut off, overwritten and lengthened files of every format: whatever Pillow raises becomes one reason."""
    whole = encoded(cutout("RGB"), form)
    draw = random.Random(form)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        cut = draw.choice([len(content), draw.randrange(len(content))])
        try:
            assert decode(bytes(content[:cut])).mode == "RGB"
        except ImageError as error:
            assert str(error)
            assert "\n" not in str(error)


def test_images_to_start_from_and_to_be_judged_are_decoded_alike(tmp_path: Path) -> None:
    """Image-to-image, evaluation and the native engine read a file to the same pixels, and refuse the same files."""
    from sd3.evaluation import images
    from sd3.inference.start_image import read_image
    from sd3.native.pictures import View

    for number, content in enumerate((encoded(cutout()), encoded(Image.fromarray(deep_grey())))):
        file = tmp_path / f"{number}.png"
        file.write_bytes(content)
        expected = decode(content)
        assert read_image(str(file))[0].tobytes() == expected.tobytes()
        assert images.decode("x", content).tobytes() == expected.tobytes()
        square = (View("x", file.read_bytes, None).pixels(30) + 1) * 127.5
        assert square[:, 0, 0].round().tolist() == list(expected.resize((30, 40)).getpixel((0, 5)))
    (tmp_path / "photo.heic").write_bytes(HEIC)
    for refuses in (
        lambda: read_image(str(tmp_path / "photo.heic")),
        lambda: images.decode("x", HEIC),
        lambda: View("x", lambda: HEIC, None).pixels(30),
    ):
        with pytest.raises(UserError, match="HEIC; convert it to JPEG"):
            refuses()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_key_of_shallow_grey_is_transparent(depth: int) -> None:
    value = (1 << depth) // 2
    row = sum(value << shift for shift in range(0, 8, depth))
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes([0, *[row] * depth]))) + png_chunk(b"IEND", b"")
    start = b"\x89PNG\r\n\x1a\n" + head
    assert corners(start + png_chunk(b"tRNS", struct.pack(">H", value)) + pixels) == (WHITE, WHITE)
    assert corners(start + pixels)[0] == ((1 << depth) // 2 * 255 // ((1 << depth) - 1),) * 3


@pytest.mark.parametrize("form", ["BMP", "PCX"])
def test_rows_of_162_bytes_are_not_16_bit_colour(form: str) -> None:
    image = Image.new("RGB", (54, 4), RED)
    assert decode_with_changes(encoded(image, form)).changes == ()


def test_colour_of_16_bits_is_told_in_every_format() -> None:
    ppm = b"P6 2 1 65535\n" + struct.pack(">6H", *[32768] * 6)
    assert decode_with_changes(ppm).changes == ("16-bit colour to 8 bits",)
    assert decode_with_changes(deep_png(2, np.full((2, 2, 3), 32768))).changes == ("16-bit colour to 8 bits",)


def test_long_texts_in_a_png_are_no_obstacle() -> None:
    head, rest = (whole := encoded(cutout("RGB")))[:33], whole[33:]
    text = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))
    assert decode(head + text + rest).size == (30, 40)
    with pytest.raises(ImageError, match="damaged"):  # 100 MB in a file of 100 kB
        decode(head + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000))) + rest)


def test_damage_of_a_known_kind_names_the_kind() -> None:
    for content, name in ((encoded(cutout())[:33], "PNG"), (b"GIF89a" + bytes(3), "GIF"), (b"II*\0\x08\0", "TIFF")):
        with pytest.raises(ImageError, match=f"damaged, or a kind of {name} that cannot be read"):
            decode(content)


def test_a_png_without_its_palette_is_damaged() -> None:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(3))) + png_chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="its palette is missing"):
        decode(b"\x89PNG\r\n\x1a\n" + head + pixels)
