"""Each image file is looked at once: by the launcher's check, for all ranks and later runs; what has changed, again."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from native_parts import Ranks, options
from sd3.benchmarks.data_images import photograph
from sd3.common.command_line import UserError
from sd3.common.seen import FILE_NAME, SeenFiles
from sd3.data import known_images, training_data
from sd3.data.check import CheckFlags, check_data
from sd3.data.decoding import ImageError, decode_with_changes, inspect
from sd3.data.facts import ImageFacts, facts_of
from sd3.data.known_images import look
from sd3.data.training_data import DataFlags, TrainingImage, image_of_file, read_folder
from sd3.launch.preflight import check
from sd3.native import cache as cache_module
from sd3.native import pictures as pictures_module
from sd3.native.cache import Cache
from sd3.native.pictures import Squares, View, identities, identity, instance_samples
from sd3.native.precompute import Precompute


def drawn(number: int, size: tuple[int, int] = (48, 32), form: str = "PNG", **how: object) -> bytes:
    content = io.BytesIO()
    photograph(number, size).save(content, form, **how)
    return content.getvalue()


@pytest.fixture(autouse=True)
def _old_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits until its files are old enough to be remembered."""
    monkeypatch.setattr(known_images, "YOUNG_SECONDS", -5.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(drawn(number))
    return tmp_path / "images"


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The contents that are decoded to be judged."""
    found: list[bytes] = []
    monkeypatch.setattr(known_images, "facts_of", lambda content: found.append(content) or facts_of(content))
    return found


def checked(folder: Path, tmp_path: Path) -> list[str]:
    """The problems that a check finds."""
    flags = CheckFlags(DataFlags(folder=str(folder)), 64, "a dog", 77, model=None, memory=tmp_path / "cache")
    return check_data(flags)[0]


# ---- once


def test_a_second_check_decodes_nothing(folder: Path, tmp_path: Path, looked_at: list[bytes]) -> None:
    assert checked(folder, tmp_path) == [] and len(looked_at) == 6
    first = look(read_folder(folder).images, SeenFiles(tmp_path / "cache", pytest.fail))
    assert len(looked_at) == 6
    assert first == [facts_of(file.read_bytes()) for file in sorted(folder.iterdir())]
    (folder / "new.png").write_bytes(drawn(9))
    assert checked(folder, tmp_path) == [] and looked_at[6:] == [drawn(9)]


def test_the_launchers_check_remembers_in_the_cache_directory(
    folder: Path, tmp_path: Path, tiny_model: Path, looked_at: list[bytes]
) -> None:
    settings = {
        "run_dir": str(tmp_path / "run"), "model_name": str(tiny_model), "script": "train_dreambooth_lora_sd3",
        "machine_rank": "0", "num_processors": "1", "num_machines": "1", "engine": "native", "device": "cpu",
    }  # fmt: skip
    given = [
        f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={folder}", "--instance_prompt=a dog",
        f"--output_dir={tmp_path / 'run'}", f"--precompute_dir={tmp_path / 'cache'}", "--resolution=32",
    ]  # fmt: skip
    for _ in range(2):
        problems, summary = check(settings, given)
        assert problems == [] and summary.instance.count == 6
    assert len(looked_at) == 6
    assert (tmp_path / "cache" / FILE_NAME).is_file()


@pytest.mark.parametrize("flags", [[], ["--random_flip", "--repeats=2"]])
def test_the_engine_takes_what_the_check_found(
    flags: list[str], folder: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is read to be encoded and no more; the second run reads none. The latents are those without a memory."""
    given = options(
        f"--precompute_dir={tmp_path / 'cache'}", "--resolution=32", f"--instance_data_dir={folder}", *flags
    )
    checked(folder, tmp_path)
    read: list[str] = []
    whole = training_data.file_content

    def counted(file: Path) -> Callable[[], bytes]:
        content = whole(file)
        return lambda: read.append(file.name) or content()

    monkeypatch.setattr(training_data, "file_content", counted)
    views = [view for sample in instance_samples(given) for view in sample.views]
    keys = Precompute(given, tiny_model, Ranks()).latents(views)
    assert sorted(read) == [f"{number}.png" for number in range(6)]
    read.clear()
    assert Precompute(given, tiny_model, Ranks()).latents(views) == keys
    assert read == []
    without = options(*(f"--precompute_dir={tmp_path / 'other'}", "--resolution=32"))
    assert Precompute(without, tiny_model, Ranks()).latents(views) == keys
    for key in keys:
        assert Cache(tmp_path / "cache").file(key).read_bytes() == Cache(tmp_path / "other").file(key).read_bytes()


def test_rows_of_a_table_are_remembered_with_the_table(
    tmp_path: Path, looked_at: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    (tmp_path / "set").mkdir()
    cells = [{"bytes": drawn(number), "path": None} for number in range(4)]
    table = pyarrow.table({"image": cells, "text": list("abcd")})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train-0.parquet")
    flags = CheckFlags(
        DataFlags(dataset=str(tmp_path / "set"), caption_column="text"), 64, "", 77, None, memory=tmp_path / "cache"
    )
    for _ in range(2):
        assert check_data(flags)[0] == []
        assert len(looked_at) == 4


# ---- again


def resized(file: Path) -> None:
    file.write_bytes(drawn(7, (80, 64)))


def rewritten(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-20] ^= 1  # in the pixels or their checksum
    file.write_bytes(content)


def touched(file: Path) -> None:
    file.touch()


def rewritten_with_its_time(file: Path) -> None:
    """As `cp --preserve` and archives do."""
    before = file.stat()
    rewritten(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def moved_over(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(drawn(8))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("change", [resized, rewritten, touched, rewritten_with_its_time, moved_over])
def test_a_file_that_changed_is_looked_at_again(
    change: Callable[[Path], None], folder: Path, tmp_path: Path, looked_at: list[bytes]
) -> None:
    checked(folder, tmp_path)
    looked_at.clear()
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    change(folder / "3.png")
    content = (folder / "3.png").read_bytes()
    checked(folder, tmp_path)
    assert looked_at == [content]
    seen = SeenFiles(tmp_path / "cache", pytest.fail)
    assert look([image_of_file(folder / "3.png")], seen) == [facts_of(content)]


def test_a_change_that_shows_in_neither_size_nor_times_is_not_noticed(
    folder: Path, tmp_path: Path, looked_at: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of the memory, as its docstring says: no clock of a file system does this, a wrong one may."""
    monkeypatch.setattr(known_images, "_stamp", lambda file, now: f"{os.stat(file).st_size} the same times")
    checked(folder, tmp_path)
    rewritten(folder / "3.png")
    checked(folder, tmp_path)
    assert len(looked_at) == 6


def test_a_damaged_file_is_remembered_as_such_until_it_is_another(
    folder: Path, tmp_path: Path, looked_at: list[bytes]
) -> None:
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:-200])
    (problem,) = checked(folder, tmp_path)
    assert "2.png cannot be read as an image (it is damaged" in problem
    assert checked(folder, tmp_path) == [problem] and len(looked_at) == 6
    time.sleep(0.02)
    (folder / "2.png").write_bytes(whole)
    assert checked(folder, tmp_path) == []


def test_a_file_that_cannot_be_read_is_tried_again(folder: Path, tmp_path: Path) -> None:
    reads: list[int] = []

    def unreadable() -> bytes:
        reads.append(1)
        raise UserError("a.png cannot be read (Permission denied); fix or remove it.")

    image = TrainingImage("a.png", unreadable, None, (folder / "0.png", None))
    for _ in range(2):
        (facts,) = look([image], SeenFiles(tmp_path / "cache", pytest.fail))
        assert facts.problem.startswith("a.png cannot be read")
    assert len(reads) == 2


def test_a_file_that_changed_a_moment_ago_is_not_remembered(
    folder: Path, tmp_path: Path, looked_at: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_images, "YOUNG_SECONDS", 3600.0)
    for _ in range(2):
        checked(folder, tmp_path)
    assert len(looked_at) == 12


def test_another_decoder_looks_again(
    folder: Path, tmp_path: Path, looked_at: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked(folder, tmp_path)
    monkeypatch.setattr(known_images, "RULES", "1 pillow 99")
    checked(folder, tmp_path)
    assert len(looked_at) == 12


def test_what_an_interrupted_look_found_is_kept(folder: Path, tmp_path: Path, looked_at: list[bytes]) -> None:
    def stop_after(found: object, total: int) -> object:
        assert total == 6
        for number, each in enumerate(found):
            if number == 4:
                raise KeyboardInterrupt
            yield each

    seen = SeenFiles(tmp_path / "cache", pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        look(read_folder(folder).images, seen, stop_after)
    looked_at.clear()
    checked(folder, tmp_path)
    assert len(looked_at) == 2


def test_a_damaged_memory_is_one_line_and_no_obstacle(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE_NAME).write_bytes(b"not what it was" * 100)
    assert checked(folder, tmp_path) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{FILE_NAME} cannot be used (file is not a database)" in lines[0]


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "nonsense", '["abc", 4, 4, [], null]', json.dumps(["f" * 64, 0, 4, [], None]),
     json.dumps(["f" * 64, "x", 4, [], None]), json.dumps(["f" * 64, 4, 4, 5, None]), json.dumps([3, 4, 4, [], None]),
     None, b"\xff", 7],
)  # fmt: skip
def test_a_damaged_row_counts_as_none(text: object) -> None:
    assert ImageFacts.from_text(text) is None


def test_facts_read_back() -> None:
    for facts in (ImageFacts("a" * 64, 4, 5, ("L to RGB", "b")), ImageFacts("0" * 64, problem="is \udce9 no image")):
        assert ImageFacts.from_text(facts.as_text()) == facts


# ---- the look itself


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "1"])
@pytest.mark.parametrize("size", [(300, 200), (7, 5), (1, 9)])
def test_an_image_that_is_looked_at_is_what_decoding_makes_of_it(form: str, mode: str, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    try:
        photograph(1, size).convert(mode).save(content, form, exif=exif, progressive=size[0] < 9)
    except (OSError, ValueError):
        return  # this form has no such mode
    decoded = decode_with_changes(content.getvalue())
    assert inspect(content.getvalue()) == (decoded.image.size, decoded.changes)


@pytest.mark.parametrize("form", [{"progressive": False}, {"progressive": True}, {"restart_marker_rows": 2}])
def test_a_look_refuses_what_decoding_refuses(form: dict[str, object]) -> None:
    """JPEG files cut short or with a wrong byte, which are not decoded whole to be judged."""
    whole, draw, refused = drawn(2, (200, 160), "JPEG", **form), random.Random(4), 0

    def outcome(work: Callable[[bytes], object], content: bytes) -> str:
        try:
            work(content)
        except ImageError as error:
            return str(error)
        return "an image"

    for number in range(150):
        content = bytearray(whole[: draw.randrange(len(whole))] if number % 2 else whole)
        if number % 2 == 0:
            content[draw.randrange(len(whole))] = draw.randrange(256)
        found = outcome(inspect, bytes(content))
        assert found == outcome(decode_with_changes, bytes(content))
        refused += found != "an image"
    assert 60 < refused < 150


def test_squares_are_decoded_ahead_in_their_order_and_only_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "processors", lambda: 2)
    contents = [drawn(number) for number in range(60)]
    begun: list[str] = []
    views = [
        View(f"{number}", lambda number=number: begun.append(number) or contents[number], (0.2, 0.7), flip)
        for number in range(60) for flip in (False, True)
    ]  # fmt: skip
    squares = Squares(views, 16)
    squares.announce(range(8, 120))
    found = squares.take(4)
    assert len(begun) <= 2 + 5 + 1  # images; twice as many as workers wait
    for view, pixels in zip(views[8:12], found, strict=True):
        assert (view.pixels(16) == pixels).all()
    squares.close()
    time.sleep(0.1)
    assert len(begun) <= 2 + 5 + 1 + 4


def test_an_image_that_is_none_is_named_when_its_square_is_taken() -> None:
    views = [View("a", lambda: drawn(1), None), View("b", lambda: b"nothing", None), View("c", lambda: drawn(2), None)]
    squares = Squares(views, 16)
    squares.announce([0, 1, 2])
    squares.take(1)
    with pytest.raises(UserError, match="^b cannot be read as an image"):
        squares.take(2)


def test_files_without_facts_are_hashed_as_before(folder: Path, tmp_path: Path) -> None:
    views = [View(str(file), file.read_bytes, None) for file in sorted(folder.iterdir())]
    found = identities(views, SeenFiles(tmp_path / "cache", pytest.fail))
    assert found == {view.content: identity(view.content) for view in views}


# ---- entries of the cache


def test_an_entry_that_was_found_whole_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    shapes = {"number": ()}
    keys = [f"key{number}" for number in range(5)]
    for key in keys[:4]:
        Cache(tmp_path).write(key, {"number": torch.tensor(1.0)})
    reads: list[Path] = []
    load = cache_module.load_file
    monkeypatch.setattr(cache_module, "load_file", lambda file: reads.append(file) or load(file))
    assert Cache(tmp_path).all_held(keys, shapes) == [True] * 4 + [False] and len(reads) == 4
    assert Cache(tmp_path).all_held(keys, shapes) == [True] * 4 + [False] and len(reads) == 4
    assert Cache(tmp_path).all_held(keys, {"number": (3,)}) == [False] * 5  # of another shape
    reads.clear()
    time.sleep(0.02)
    file = Cache(tmp_path).file("key2")
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert Cache(tmp_path).all_held(keys, shapes) == [True, True, False, True, False] and reads == [file]
    copied = shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    reads.clear()
    assert Cache(copied).all_held(keys[:2], shapes) == [True] * 2 and reads == []
