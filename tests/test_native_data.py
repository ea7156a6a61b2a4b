"""Data: the order of the samples, the squares cut from the pictures, and batches that hold what the cache does."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from PIL.ImageOps import exif_transpose
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import crop

from native_parts import Ranks, loader, options
from sd3.common.command_line import UserError
from sd3.native import data as data_module
from sd3.native.cache import Cache
from sd3.native.data import Items, Loader, Samples, names_at
from sd3.native.pictures import View, identity, instance_samples
from sd3.native.precompute import Precompute
from sd3.native.step import Batch
from sd3.native.stream import Stream

# ---- the order


@pytest.mark.parametrize(
    ("length", "batch_size", "accumulation", "ranks"), [(5, 2, 1, 1), (7, 2, 3, 2), (3, 4, 1, 2), (12, 3, 2, 2)]
)
def test_ranks_share_out_the_stream_in_full_batches(
    length: int, batch_size: int, accumulation: int, ranks: int
) -> None:
    stream, steps = Stream(1, length, batch_size, accumulation, ranks), 9
    shares = [list(stream.batches(0, rank, steps)) for rank in range(ranks)]
    for share in shares:
        assert [len(batch) for batch in share] == [batch_size] * (steps * accumulation)
    for step in range(steps):
        of_step = slice(step * accumulation, (step + 1) * accumulation)
        positions = [position for share in shares for batch in share[of_step] for position in batch]
        # Each position once, and none of another step: whichever the ranks are.
        first = step * stream.samples_a_step
        assert sorted(positions) == list(range(first, first + stream.samples_a_step))


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    stream, length = Stream(1, 50, 4, 1, 1), 50
    epochs = [[stream.sample(position) for position in range(e * length, (e + 1) * length)] for e in range(4)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(length))]}) == 5
    other = Stream(2, 50, 4, 1, 1)
    assert [other.sample(position) for position in range(length)] != epochs[0]
    # How the samples are dealt out changes nothing about which they are.
    dealt = Stream(1, 50, 3, 2, 5)
    assert [dealt.sample(position) for position in range(4 * length)] == sum(epochs, [])


def test_the_order_is_not_the_same_places_in_each_epoch() -> None:
    """Over many epochs each sample comes first about equally often."""
    stream = Stream(0, 4, 1, 1, 1)
    firsts = Counter(stream.sample(4 * epoch) for epoch in range(800))
    assert all(firsts[number] == pytest.approx(200, abs=50) for number in range(4))


@pytest.mark.parametrize("rank", [0, 1])
def test_it_goes_on_from_a_position(rank: int) -> None:
    stream = Stream(3, 7, 2, 3, 2)
    whole = list(stream.batches(0, rank, 10))
    assert list(stream.batches(4 * stream.samples_a_step, rank, 6)) == whole[4 * 3 :]


@pytest.mark.parametrize(("length", "steps"), [(23, 2), (24, 2), (25, 3), (5, 1)])
def test_steps_an_epoch(length: int, steps: int) -> None:
    assert Stream(0, length, 3, 2, 2).steps_an_epoch == steps


# ---- the squares

SHAPES = [(97, 61), (61, 97), (64, 200), (311, 64), (33, 21), (64, 64), (129, 128)]


def painted(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A picture that no turn, mirroring or shift leaves as it is."""
    width, height = size
    image = Image.radial_gradient("L").resize(size)
    image = Image.merge("RGB", (image, Image.linear_gradient("L").resize(size), image.rotate(90)))
    ImageDraw.Draw(image).polygon([(0, 0), (width // 2, 0), (0, height // 3)], fill=(255, 20, 90))
    return image.convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **settings)
    return content.getvalue()


def view(content: bytes, crop: tuple[float, float] | None = None, flip: bool = False) -> View:
    return View("picture", lambda: content, crop, flip)


def pinned(content: bytes, place: tuple[int, int] | None = None, flip: bool = False) -> torch.Tensor:
    """The square as the pinned scripts cut it, at `place` (top, left) of the scaled picture, or in the middle."""
    image = exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode != "RGB":
        image = image.convert("RGB")
    image = transforms.Resize(64, interpolation=transforms.InterpolationMode.BILINEAR)(image)
    image = transforms.CenterCrop(64)(image) if place is None else crop(image, *place, 64, 64)
    if flip:
        image = transforms.RandomHorizontalFlip(p=1.0)(image)
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(image)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", SHAPES)
def test_squares_from_the_middle_are_the_pinned_scripts(size: tuple[int, int], flip: bool) -> None:
    content = encoded(painted(size))
    square = view(content, flip=flip).pixels(64)
    assert (square.shape, square.dtype) == ((3, 64, 64), torch.float32)
    assert torch.equal(square, pinned(content, flip=flip))
    assert not torch.equal(square, pinned(content, flip=not flip))


@pytest.mark.parametrize("size", SHAPES)
def test_drawn_squares_reach_every_place_that_the_pinned_crop_does(size: tuple[int, int]) -> None:
    content = encoded(painted(size))
    scaled = transforms.Resize(64)(painted(size))
    room = max(scaled.size) - 64  # RandomCrop draws the place along the longer side from 0 to this
    for share in (0.0, 0.3, 0.5, 1 - 1e-7):
        place = min(int(share * (room + 1)), room)
        top, left = (place, 0) if scaled.height > scaled.width else (0, place)
        assert torch.equal(view(content, (share, share)).pixels(64), pinned(content, (top, left)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(painted((97, 61)), "JPEG", exif=exif, quality=95)
    assert torch.equal(view(content).pixels(64), pinned(content))
    plain = encoded(painted((97, 61)), "JPEG", quality=95)
    assert torch.equal(view(content).pixels(64), pinned(plain)) == (orientation == 1)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    content = encoded(painted((97, 61), mode), "TIFF" if mode == "CMYK" else "PNG")
    assert torch.equal(view(content).pixels(64), pinned(content))


def test_what_is_transparent_becomes_white() -> None:
    """The pinned scripts show the colour below, which the picture's author may never have seen."""
    image = painted((64, 64), "RGBA")
    image.paste((10, 20, 30, 0), (0, 0, 32, 64))
    square = view(encoded(image)).pixels(64)
    assert (square[:, :, :32] == 1).all()
    assert torch.equal(square[:, :, 32:], pinned(encoded(painted((64, 64))))[:, :, 32:])


def test_a_file_that_is_no_picture_is_named() -> None:
    with pytest.raises(UserError, match="^picture cannot be read as an image"):
        view(b"GIF89a but not really").pixels(64)


# ---- the samples


def crops(*flags: str) -> list[tuple[float, float] | None]:
    return [sample.views[0].crop for sample in instance_samples(options(*flags))]


def test_crops_are_drawn_once_by_the_seed(dog_dir: Path) -> None:
    data = f"--instance_data_dir={dog_dir}"
    drawn = crops(data, "--seed=1", "--repeats=40")
    assert drawn == crops(data, "--seed=1", "--repeats=40")
    assert len(set(drawn)) == 200 and not set(drawn) & set(crops(data, "--seed=2", "--repeats=40"))
    assert crops(data, "--seed=1", "--center_crop") == [None] * 5
    for axis in zip(*drawn, strict=True):  # uniform from 0 to 1: deviations of mean and square's mean are 0.020, 0.021
        assert 0 <= min(axis) < 0.05 and 0.95 < max(axis) < 1
        assert sum(axis) / 200 == pytest.approx(1 / 2, abs=0.08)
        assert sum(place**2 for place in axis) / 200 == pytest.approx(1 / 3, abs=0.08)


def test_mirrored_views_lie_at_the_same_place(dog_dir: Path) -> None:
    for sample in instance_samples(options(f"--instance_data_dir={dog_dir}", "--random_flip")):
        plain, mirrored = sample.views
        assert (plain.crop, plain.flip, mirrored.flip) == (mirrored.crop, False, True)
        assert torch.equal(mirrored.pixels(64), plain.pixels(64).flip(-1))


def test_hidden_files_are_no_pictures_and_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_bytes(b"x")
    with pytest.raises(UserError, match=f"{tmp_path} has no images"):
        instance_samples(options(f"--instance_data_dir={tmp_path}"))
    for name in ("b.png", "a.png"):
        painted((64, 64)).save(tmp_path / name)
    found = instance_samples(options(f"--instance_data_dir={tmp_path}", "--repeats=2"))
    assert [Path(one.views[0].name).name for one in found] == ["a.png", "a.png", "b.png", "b.png"]
    assert {one.caption for one in found} == {"a dog"}


class Names:
    """Stands in for Precompute: a view's key is its name, and an m where it is mirrored."""

    def latents(self, views: list[View]) -> list[str]:
        return [Path(view.name).stem + "m" * view.flip for view in views]


class Entries:
    """Stands in for the cache: an entry is its key."""

    def read(self, key: str) -> dict[str, str]:
        return {"mean": key, "logvar": key}


def named(folder: Path, names: str) -> Path:
    folder.mkdir()
    for name in names:
        painted((64, 64)).save(folder / f"{name}.png")
    return folder


def shown(given: argparse.Namespace, positions: range) -> list[list[str]]:
    """Names of the pictures at these positions of the stream."""
    items = Items(given, Names())
    samples = Samples(items, Stream(given.seed, len(items), 1, 1, 1), Entries())
    return [[mean for mean, _, _ in samples[position][1]] for position in positions]


def test_flips_are_drawn_for_each_showing(tmp_path: Path) -> None:
    data = (f"--instance_data_dir={named(tmp_path / 'a', 'abcd')}", "--seed=5")
    given = options(*data, "--random_flip")
    showings = shown(given, range(2000))
    assert showings == shown(given, range(2000))
    counts = Counter(name for (name,) in showings)
    assert all(counts[name] == pytest.approx(250, abs=60) for name in ("a", "am", "b", "bm", "c", "cm", "d", "dm"))
    flips = [name.endswith("m") for (name,) in showings]
    assert sum(one == other for one, other in zip(flips, flips[4:], strict=False)) == pytest.approx(1000, abs=100)
    given.seed = 6
    assert [name.endswith("m") for (name,) in shown(given, range(2000))] != flips
    assert not any(name.endswith("m") for (name,) in shown(options(*data), range(50)))


@pytest.mark.parametrize(("instance", "classes"), [("abc", "pqrst"), ("abcde", "pq"), ("ab", "pq")])
def test_the_smaller_half_is_gone_through_again(instance: str, classes: str, tmp_path: Path) -> None:
    given = options(
        f"--instance_data_dir={named(tmp_path / 'a', instance)}", f"--class_data_dir={named(tmp_path / 'b', classes)}",
        "--with_prior_preservation", "--class_prompt=a thing", "--random_flip", "--seed=0",
    )  # fmt: skip
    longer = max(len(instance), len(classes))
    assert len(Items(given, Names())) == longer
    epoch = [[name.removesuffix("m") for name in pair] for pair in shown(given, range(longer))]
    for half, names in enumerate((instance, classes)):
        counts = Counter(pair[half] for pair in epoch)
        assert set(counts) == set(names) and max(counts.values()) - min(counts.values()) <= 1
    assert not any(pair[1].endswith("m") for pair in shown(given, range(60)))  # class pictures are never mirrored


def test_no_more_class_pictures_than_asked_for(tmp_path: Path) -> None:
    given = options(
        f"--instance_data_dir={named(tmp_path / 'a', 'a')}", f"--class_data_dir={named(tmp_path / 'b', 'pqrs')}",
        "--with_prior_preservation", "--class_prompt=a thing", "--num_class_images=3",
    )  # fmt: skip
    assert [item.name[-5] for item in Items(given, Names()).halves[1]] == ["p", "q", "r"]


def test_pictures_are_named_for_messages(tmp_path: Path) -> None:
    items = Items(options(f"--instance_data_dir={named(tmp_path / 'a', 'abc')}"), Names())
    stream = Stream(0, 3, 1, 1, 1)
    assert names_at(items, stream, range(2, 4)) == [f"{'abc'[stream.sample(position)]}.png" for position in (2, 3)]


def test_the_signature_knows_pictures_and_captions(tmp_path: Path) -> None:
    data = f"--instance_data_dir={named(tmp_path / 'a', 'abc')}"
    signature = Items(options(data), Names()).signature()
    assert Items(options(data), Names()).signature() == signature
    assert Items(options(data, "--instance_prompt=a cat"), Names()).signature() != signature
    (tmp_path / "a" / "c.png").rename(tmp_path / "a" / "d.png")
    assert Items(options(data), Names()).signature() != signature


# ---- the batches


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory, pokemon_dir: Path) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("data")
    flags = (f"--dataset_name={pokemon_dir}", "--caption_column=text", f"--cache_dir={folder / 'datasets'}")
    return (*flags, f"--precompute_dir={folder / 'cache'}", "--resolution=32", "--train_batch_size=3", "--seed=4")


@pytest.fixture
def feed(captioned: tuple[str, ...], tiny_model: Path) -> Callable[..., Loader]:
    return lambda *flags: loader(options(*captioned, *flags), tiny_model)


def assert_same_batches(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.positions == b.positions
        for x, y in zip((a.mean, a.logvar, *a.text), (b.mean, b.logvar, *b.text), strict=True):
            assert torch.equal(x, y)


def test_batches_hold_each_picture_with_its_own_caption(feed: Callable, pokemon_dir: Path, tiny_model: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, transformer=None)
    rows = pyarrow.parquet.read_table(next(pokemon_dir.glob("data/*.parquet"))).to_pylist()
    resize = transforms.Resize(32, transforms.InterpolationMode.BILINEAR)
    expected = []
    with torch.no_grad():
        for row in rows:
            pixels = transforms.ToTensor()(resize(Image.open(io.BytesIO(row["image"]["bytes"])))) * 2 - 1
            latent = pipeline.vae.encode(pixels[None]).latent_dist
            text = [row["text"]]
            prompt, _, pooled, _ = pipeline.encode_prompt(
                text, text, text, do_classifier_free_guidance=False, max_sequence_length=77
            )
            expected.append((latent.mean[0], latent.logvar[0], prompt[0], pooled[0]))
    feed = feed()
    seen = []
    for batch in feed.batches(0, 0, 6):
        for row, position in enumerate(batch.positions):
            number = feed.samples.stream.sample(position)
            seen.append(number)
            for found, one in zip((batch.mean, batch.logvar, *batch.text), expected[number], strict=True):
                torch.testing.assert_close(found[row], one, rtol=1e-4, atol=1e-5)
    assert sorted(seen[:8]) == list(range(8)) and len(seen) == 18
    # The comparison would notice another picture's.
    for column in zip(*expected, strict=True):
        assert not torch.allclose(column[0], column[1], rtol=1e-4, atol=1e-5)


def test_a_file_is_read_once_for_all_its_views(tiny_model: Path, tmp_path: Path) -> None:
    """However often it is repeated, in each place and mirrored; then once more for all of its squares."""
    read: list[str] = []

    def content_of(name: str) -> Callable[[], bytes]:
        return lambda: read.append(name) or encoded(painted((40, 33) if name == "a" else (33, 40)))

    contents = {name: content_of(name) for name in "ab"}
    views = [
        View(name, content, (place, place), flip)
        for name, content in contents.items() for place in (0.1, 0.9) for flip in (False, True)
    ]  # fmt: skip
    given = options(f"--precompute_dir={tmp_path}", "--resolution=32")
    keys = Precompute(given, tiny_model, Ranks()).latents(views)
    assert len(set(keys)) == 8 and sorted(read) == ["a"] * 2 + ["b"] * 2
    read.clear()
    assert Precompute(given, tiny_model, Ranks()).latents(views) == keys
    assert sorted(read) == ["a", "b"]


def mapped(folder: Path) -> int:
    """Bytes of this process's memory that are pages of files in the folder."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    spans = [line[0].split("-") for line in lines if len(line) > 5 and line[5].startswith(f"{folder}/")]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def test_what_was_read_is_the_files_pages_and_little_of_it_is_kept(tmp_path: Path) -> None:
    """Each rank and each of its loader processes has a cache of its own; the pages are everyone's."""
    cache, keys, size = Cache(tmp_path), [f"{number:02}" for number in range(40)], 4 << 20
    cache.write(keys[0], {"mean": torch.ones(size // 4)})
    for key in keys[1:]:
        cache.file(key).parent.mkdir()
        os.link(cache.file(keys[0]), cache.file(key))
    entry = cache.read(keys[0])
    assert size <= mapped(tmp_path) < 1.1 * size and entry["mean"].sum() == size // 4
    for key in keys:
        assert cache.read(key)["mean"][-1] == 1
    assert size < mapped(tmp_path) < 80 << 20


@pytest.mark.parametrize("more", [("--random_flip",), ("--train_text_encoder",)])
def test_loader_processes_change_nothing(feed: Callable, more: tuple[str, ...]) -> None:
    alone = list(feed(*more, "--gradient_accumulation_steps=2").batches(6, 0, 3))
    assert [batch.positions for batch in alone] == [list(range(first, first + 3)) for first in range(6, 24, 3)]
    workers = feed(*more, "--gradient_accumulation_steps=2", "--dataloader_num_workers=2").batches(6, 0, 3)
    assert_same_batches(alone, list(workers))


def test_a_batch_with_prior_preservation_has_its_class_pictures_last(feed: Callable, dog_dir: Path) -> None:
    prior = ("--with_prior_preservation", f"--class_data_dir={dog_dir}", "--class_prompt=a dog", "--center_crop")
    whole = feed(*prior)
    (batch,) = whole.batches(0, 0, 1)
    assert batch.mean.shape[0] == batch.text[0].shape[0] == 6 and len(batch.positions) == 3
    items = whole.samples.items
    for row, position in enumerate(batch.positions):
        number = whole.samples.stream.sample(position)
        halves = items.halves[0][number % 8], items.halves[1][number % 5]
        for place, item in zip((row, row + 3), halves, strict=True):
            entry = whole.samples.cache.read(item.latents[0])
            assert torch.equal(batch.mean[place], entry["mean"])
            assert torch.equal(batch.text[0][place], whole.texts[item.caption][0])
    assert batch.text[1][3:].unique(dim=0).shape[0] == 1
    assert not torch.equal(batch.text[1][0], batch.text[1][3])


@pytest.mark.parametrize("more", [(), ("--train_text_encoder",)])
def test_few_captions_are_sent_once_and_change_nothing(
    feed: Callable, dog_dir: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = ("--with_prior_preservation", f"--class_data_dir={dog_dir}", "--class_prompt=a dog", "--center_crop")
    plain, asked = Loader._texts, []

    def texts(self: Loader, captions: list[str]) -> list[torch.Tensor]:
        asked.append(list(captions))
        return plain(self, captions)

    monkeypatch.setattr(Loader, "_texts", texts)
    found = {}
    for few in (100, 0):
        monkeypatch.setattr(data_module, "FEW", few)
        fed = feed(*prior, *more)
        found[few] = list(fed.batches(0, 0, 6))
        assert (asked == [fed.samples.items.captions]) == (few == 100) and len(asked) == (1 if few else 6)
        asked.clear()
    assert_same_batches(found[100], found[0])


@pytest.mark.parametrize(("device", "pinned", "named"), [("npu", True, "npu"), ("cuda", True, ""), ("cpu", False, "")])
def test_batches_for_an_accelerator_are_pinned(
    device: str, pinned: bool, named: str, feed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(data_module, "DataLoader", lambda *_, **settings: given.update(settings) or [])
    fed = feed()
    fed.device = types.SimpleNamespace(type=device)
    assert list(fed.batches(0, 0, 1)) == []
    assert (given["pin_memory"], given["pin_memory_device"]) == (pinned, named)
    assert set(given) <= set(inspect.signature(DataLoader).parameters)


def rows_of(folder: Path, **columns: list) -> tuple[str, ...]:
    """Flags of a data set with these columns."""
    (folder / "set").mkdir()
    features = datasets.Features({"picture": datasets.Image(), "says": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "set" / "train.parquet")
    return f"--dataset_name={folder / 'set'}", f"--cache_dir={folder / 'datasets'}", "--image_column=picture"


def test_a_row_without_picture_or_words_is_named(tmp_path: Path) -> None:
    given = rows_of(tmp_path, picture=[painted((64, 64)), None], says=[1, 2])
    with pytest.raises(UserError, match="set, row 0 has the caption 1, expected text; see --caption_column"):
        instance_samples(options(*given, "--caption_column=says"))
    with pytest.raises(UserError, match="set, row 1 has no image"):
        instance_samples(options(*given))


def test_a_picture_that_the_rows_name_and_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    painted((64, 64)).save(tmp_path / "set" / "a.png")
    rows = [{"file_name": name, "text": "a dog"} for name in ("a.png", "b.png")]
    (tmp_path / "set" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="b.png"):
        for sample in instance_samples(options(f"--dataset_name={tmp_path / 'set'}", f"--cache_dir={tmp_path / 'c'}")):
            sample.views[0].content()


def test_a_square_picture_has_one_square(tmp_path: Path) -> None:
    """However often it is shown, it is encoded once; one with room to cut is not."""
    for name, size in (("square", (64, 64)), ("wide", (96, 64))):
        content = encoded(painted(size))
        keys = {view(content, crop).key(64, *identity(lambda content=content: content)) for crop in ((0.1, 0.9), None)}
        assert len(keys) == {"square": 1, "wide": 2}[name]
    square = encoded(painted((64, 64)))
    assert torch.equal(view(square, (0.1, 0.9)).pixels(32), view(square).pixels(32))


def test_a_data_sets_columns_and_blank_captions(tmp_path: Path) -> None:
    features = datasets.Features({"picture": datasets.Image(), "says": datasets.Value("string")})
    rows = {"picture": [painted((64, 64))] * 3, "says": ["one", "  ", None]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    given = (f"--dataset_name={tmp_path / 'set'}", f"--cache_dir={tmp_path / 'datasets'}", "--image_column=picture")
    assert [one.caption for one in instance_samples(options(*given))] == ["a dog"] * 3
    found = [one.caption for one in instance_samples(options(*given, "--caption_column=says", "--repeats=2"))]
    assert found == ["one", "one"] + ["a dog"] * 4
    for flag in ("--caption_column=text", "--image_column=image"):
        with pytest.raises(UserError, match=f"{flag} is not a column of .*; its columns are picture, says"):
            instance_samples(options(*given, flag))
