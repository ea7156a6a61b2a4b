"""Training data as users have it: what is read, what is refused in a sentence, and what the summary says."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sd3.common.command_line import UserError
from sd3.data.check import CheckFlags, check_data
from sd3.data.facts import in_parallel
from sd3.data.summary import DataSummary
from sd3.data.training_data import DataFlags, read_class_folder, read_folder, read_training_data

TEXTS = [f"a photo of thing {number}" for number in range(4)]


def png(number: int = 0, size: int = 80) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


CELLS = [{"bytes": png(number), "path": f"{number}.png"} for number in range(4)]
BYTES = [cell["bytes"] for cell in CELLS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def dogs(tmp_path: Path, dog_dir: Path) -> Path:
    return Path(shutil.copytree(dog_dir, tmp_path / "dogs"))


def table(folder: Path, split: str = "train", **columns: object) -> Path:
    """A data set that pyarrow wrote, without the schema of `datasets`."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data" / f"{split}-00000.parquet")
    return folder


def folder_with_metadata(folder: Path, rows: int, files: int, form: str = "jsonl", key: str = "text") -> Path:
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"{number}.png").write_bytes(BYTES[number])
    names = [f"{number}.png" for number in range(rows)]
    if form == "jsonl":
        lines = [json.dumps({"file_name": name, key: text}) for name, text in zip(names, TEXTS, strict=False)]
    else:
        lines = [f"file_name,{key}", *(f"{name},{text}" for name, text in zip(names, TEXTS, strict=False))]
    (folder / f"metadata.{form}").write_text("\n".join(lines) + "\n")
    return folder


def of_dataset(folder: Path, **flags: str | None) -> DataFlags:
    return DataFlags(dataset=str(folder), **{"caption_column": "text", **flags})


def checked(data: DataFlags, resolution: int = 64, model: Path | None = None) -> tuple[list[str], DataSummary | None]:
    return check_data(CheckFlags(data, resolution, "a dog", 77, model))


def only(data: DataFlags) -> str:
    problems, summary = checked(data)
    assert summary is None
    assert len(problems) == 1, problems
    assert "\n" not in problems[0]
    return problems[0]


# ---- what is read


def large(values: list) -> pyarrow.Array:
    return pyarrow.array(values, pyarrow.large_binary() if isinstance(values[0], bytes) else pyarrow.large_string())


@pytest.mark.parametrize(
    "columns",
    [
        {"image": CELLS, "text": TEXTS},
        {"image": [{"bytes": content} for content in BYTES], "text": TEXTS},
        {"image": BYTES, "text": TEXTS},
        {"image": large(BYTES), "text": large(TEXTS)},
        {"image": CELLS, "text": [[text, "another"] for text in TEXTS]},
    ],
    ids=["struct", "struct of bytes", "bytes", "large types", "lists of captions"],
)
def test_parquet_of_any_writer(tmp_path: Path, columns: dict) -> None:
    found = read_training_data(of_dataset(table(tmp_path / "set", **columns)))
    assert [image.content() for image in found.images] == BYTES
    assert [image.caption for image in found.images] == TEXTS


def test_parquet_of_pandas(tmp_path: Path) -> None:
    import pandas

    (tmp_path / "set").mkdir()
    frame = pandas.DataFrame({"image": CELLS, "text": TEXTS}, index=[3, 1, 2, 0])
    frame.to_parquet(tmp_path / "set" / "train.parquet")
    assert [image.content() for image in read_training_data(of_dataset(tmp_path / "set")).images] == BYTES


def test_parquet_of_datasets(pokemon_dir: Path) -> None:
    found = read_training_data(of_dataset(pokemon_dir)).images
    assert len(found) == 8
    assert all(image.content() and image.caption for image in found)


@pytest.mark.parametrize("place", [".", "data", "images"])
def test_cells_that_name_files_of_the_data_set(tmp_path: Path, place: str) -> None:
    """Relative to the data set's directory or to that of the parquet file."""
    paths = [f"{place}/{number}.png" if place == "images" else f"{number}.png" for number in range(4)]
    folder = table(tmp_path / "set", image=paths, text=TEXTS)
    (folder / place).mkdir(exist_ok=True)
    for number, content in enumerate(BYTES):
        (folder / place / f"{number}.png").write_bytes(content)
    assert [image.content() for image in read_training_data(of_dataset(folder)).images] == BYTES


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_image_folder_with_metadata(tmp_path: Path, form: str) -> None:
    folder = folder_with_metadata(tmp_path / "set", 4, 4, form)
    found = read_training_data(of_dataset(folder))
    assert [image.content() for image in found.images] == BYTES
    assert [image.caption for image in found.images] == TEXTS
    assert found.left_out == []


def test_images_without_a_row_are_left_out_and_named(tmp_path: Path) -> None:
    problems, summary = checked(of_dataset(folder_with_metadata(tmp_path / "set", 3, 4)))
    assert problems == []
    assert "images: 1 left out, no row of the metadata names it (3.png)" in summary.lines()
    assert summary.as_json()["images"]["left_out"] == [{"name": "3.png", "why": "no row of the metadata names it"}]


@pytest.mark.parametrize(
    ("captions", "found"),
    [
        (["a", None, "  ", "b"], ["a", None, None, "b"]),
        ([["a", "b"], [], [None, "x"], ["", "y"]], ["a", None, None, None]),
        ([None, None, None, ""], [None] * 4),
    ],
)
def test_rows_without_a_caption_take_the_instance_prompt(tmp_path: Path, captions: list, found: list) -> None:
    data = of_dataset(table(tmp_path / "set", image=CELLS, text=captions))
    assert [image.caption for image in read_training_data(data).images] == found
    count = found.count(None)
    (line,) = [line for line in checked(data)[1].lines() if line.startswith("captions")]
    assert line.startswith(f"captions: {count} of 4 images have none and take --instance_prompt (")


def test_another_split_is_taken_by_name(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", "validation", image=CELLS, text=TEXTS)
    assert "--dataset_split=train is not a split of" in only(of_dataset(folder))
    assert "which has validation; give one of them" in only(of_dataset(folder))
    assert len(read_training_data(of_dataset(folder, split="validation")).images) == 4


def test_no_caption_column_means_one_prompt_for_all(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", picture=CELLS, text=TEXTS)
    _, summary = checked(of_dataset(folder, caption_column=None, image_column=None))
    assert summary.lines() == ["4 images, 1 caption"]


# ---- what is refused


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [1, 2, 3, 4], "text": TEXTS}, "--image_column=image of .* expected images"),
        ({"image": [[cell] for cell in CELLS], "text": TEXTS}, "--image_column=image of .* expected images"),
        ({"image": CELLS, "text": [1, 2, 3, 4]}, "row 0 has the caption 1, expected text"),
        ({"image": [CELLS[0], None, *CELLS[2:]], "text": TEXTS}, "row 1 has no image; fix or remove the row"),
        ({"image": [b"", *BYTES[1:]], "text": TEXTS}, "row 0 has no image"),
        ({"image": ["/dev/zero"] * 4, "text": TEXTS}, "row 0 names /dev/zero, which is not there"),
        ({"image": [str(Path(__file__))] * 4, "text": TEXTS}, "which is outside"),
        ({"image": ["../secret.png"] * 4, "text": TEXTS}, "which is outside"),
        ({"image": ["a\0b.png"] * 4, "text": TEXTS}, "row 0 has no image"),
        ({"image": [""] * 4, "text": TEXTS}, "row 0 has no image"),
        ({"image": ["https://localhost/a.png"] * 4, "text": TEXTS}, "row 0 names the address https://localhost/a.png"),
        ({"image": [], "text": []}, "has no images"),
        ({"jpg": CELLS, "text": TEXTS}, "--image_column=image is not a column of .*; its columns are jpg, text"),
        ({"image": CELLS, "caption": TEXTS}, "--caption_column=text is not a column of .*; its columns are image"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_trained_on(tmp_path: Path, columns: dict, said: str) -> None:
    (tmp_path / "secret.png").write_bytes(BYTES[0])
    with pytest.raises(UserError, match=said):
        read_training_data(of_dataset(table(tmp_path / "set", **columns)))


def test_a_row_without_its_image_is_named(tmp_path: Path) -> None:
    assert "row 3 names" in (problem := only(of_dataset(folder_with_metadata(tmp_path / "set", 4, 3))))
    assert "3.png, which is not there" in problem


def test_a_link_out_of_the_data_set_is_not_followed(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", image=["link.png"] * 4, text=TEXTS)
    (tmp_path / "secret.png").write_bytes(BYTES[0])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert "outside" in only(of_dataset(folder))


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [(b"broken", "row 99 has an image that cannot be read"), (BYTES[0][:200], "row 99 has an image that cannot be")],
)
def test_a_damaged_image_is_named_wherever_it_stands(tmp_path: Path, spoiled: bytes, said: str) -> None:
    folder = table(tmp_path / "set", image=[*[BYTES[0]] * 99, spoiled], text=["t"] * 100)
    assert said in only(of_dataset(folder))


def test_files_that_are_not_a_data_set(tmp_path: Path, dog_dir: Path) -> None:
    assert f"use --input_dir={dog_dir}" in only(of_dataset(dog_dir))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.parquet").write_bytes(b"no parquet")
    assert "cannot be read as parquet" in only(of_dataset(tmp_path / "set"))
    assert "is a file" in only(of_dataset(tmp_path / "set" / "a.parquet"))
    assert "neither a directory nor a hub name" in only(of_dataset(Path("./no/such/set")))
    broken = folder_with_metadata(tmp_path / "broken", 4, 4)
    (broken / "metadata.jsonl").write_text('{"file_name": "0.png", "text"')
    assert "cannot be loaded" in only(of_dataset(broken))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "notes.txt").write_text("a dog"), "notes.txt cannot be read as an image"),
        (lambda folder: (folder / "more").mkdir(), "contains folders (more)"),
        (lambda folder: (folder / "cut.png").write_bytes(next(folder.glob("*.png")).read_bytes()[:200]), "cut.png"),
        (lambda folder: Image.new("1", (20_000, 20_000)).save(folder / "huge.png"), "more than 100 million"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "is empty"),
        (lambda folder: shutil.rmtree(folder), "is not a directory"),
        (lambda folder: [(folder / f"{n}.gif").write_bytes(b"GIF") for n in range(7)], "and 2 more; fix or remove"),
    ],
)
def test_folders_that_cannot_be_trained_on(dogs: Path, spoil, said: str) -> None:
    spoil(dogs)
    assert said in only(DataFlags(folder=str(dogs)))


# ---- the summary


def test_everything_that_is_altered_or_left_out_is_in_the_summary(dogs: Path, tiny_model: Path) -> None:
    (dogs / ".DS_Store").write_bytes(b"x")
    (dogs / "Thumbs.db").write_bytes(b"x")
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(dogs / "cutout.png")
    Image.fromarray(np.full((40, 40), 9000, np.uint16)).save(dogs / "deep.png")
    long = CheckFlags(DataFlags(folder=str(dogs)), 64, "word " * 100, 77, tiny_model)
    problems, summary = check_data(long)
    assert problems == []
    lines = summary.lines()
    assert lines[0] == "7 images, 1 caption"
    assert "images: 1 of 7 smaller than 64 pixels, enlarged (deep.png)" in lines
    assert "images: 1 of 7 converted: RGBA with transparency on white (cutout.png)" in lines
    assert "images: 1 of 7 converted: 16-bit grey scaled to 8 bits (deep.png)" in lines
    assert "images: 2 left out, a hidden or system file (.DS_Store, Thumbs.db)" in lines
    assert "longer than CLIP's 77 tokens" in lines[-1]
    kept = summary.as_json()
    assert kept["images"]["converted"]["RGBA with transparency on white"] == ["cutout.png"]
    assert {cut["encoder"] for cut in kept["cut_captions"]} >= {"T5"}


def test_of_many_names_a_line_shows_three_and_the_file_all(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("L", (80, 80)).save(tmp_path / f"{number}.png")
    _, summary = checked(DataFlags(folder=str(tmp_path)))
    assert "images: 5 of 5 converted: L to RGB (0.png, 1.png, 2.png and 2 more)" in summary.lines()
    assert len(summary.as_json()["images"]["converted"]["L to RGB"]) == 5


def test_a_folder_of_thousands_of_files_is_read_in_no_time(tmp_path: Path) -> None:
    """Of 4,000 files each was once looked for in a set of all, made anew: 16 million steps."""
    for number in range(4000):
        (tmp_path / f"{number:04d}.png").touch()
    (tmp_path / "link.png").symlink_to("0000.png")
    (tmp_path / ".hidden").touch()
    since = time.process_time()
    data = read_folder(tmp_path)
    classes = read_class_folder(tmp_path, 3000)
    assert time.process_time() - since < 1.5
    assert [image.name for image in data.images] == sorted(map(str, tmp_path.glob("*.png")))
    assert data.left_out == [(".hidden", "a hidden or system file")]
    assert (len(classes.images), len(classes.left_out)) == (3000, 1002)


@pytest.mark.parametrize("name", ["sub", "gone.png", "loop.png"])
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    {
        "sub": (tmp_path / "sub").mkdir, "gone.png": lambda: (tmp_path / "gone.png").symlink_to("nowhere"),
        "loop.png": lambda: (tmp_path / "loop.png").symlink_to("loop.png"),
    }[name]()  # fmt: skip
    kind = "folders" if name == "sub" else "what is not a file, such as broken links or pipes"
    with pytest.raises(UserError, match=rf"contains {kind} \({name}\); it must contain only images"):
        read_folder(tmp_path)


def test_work_in_parallel_keeps_its_order_and_waits_for_its_taker() -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        return -number

    results = in_parallel(work, range(1000), workers=3)
    assert next(results) == 0
    assert len(begun) <= 12
    assert list(results) == [-number for number in range(1, 1000)]


def test_an_error_in_parallel_work_ends_it() -> None:
    def work(number: int) -> float:
        return 1 / (50 - number)

    with pytest.raises(ZeroDivisionError):
        list(in_parallel(work, range(10_000)))


def test_a_random_data_set_reads_back(tmp_path: Path) -> None:
    draw = random.Random(3)
    letters = [65, 0x4E00, 0x1F600, 32]
    texts = ["".join(chr(draw.choice(letters)) for _ in range(draw.randrange(1, 9))) for _ in range(40)]
    found = read_training_data(of_dataset(table(tmp_path / "set", image=BYTES * 10, text=texts))).images
    assert [image.caption for image in found] == [text if text.strip() else None for text in texts]
