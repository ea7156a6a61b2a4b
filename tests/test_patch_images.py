"""How the scripts read images and captions: the symptom without each patch, and none with all."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from patching import IMAGE_SIZE as SIZE
from patching import data_set, noise, train
from sd3.common.command_line import UserError
from sd3.native.pictures import View

pytestmark = pytest.mark.upstream


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


def grey_16_bit() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE))


def keyed() -> Image.Image:
    image = noise("RGB").quantize(8)
    image.info["transparency"] = 3
    return image


UNLIKE_BEFORE = {
    "cutout.png": lambda: noise("RGBA"), "grey-alpha.png": lambda: noise("LA"), "deep.png": grey_16_bit,
    "palette.png": keyed, "cutout.webp": lambda: noise("RGBA"), "deep.tiff": grey_16_bit,
}  # fmt: skip
AS_BEFORE = {
    "plain.png": lambda: noise("RGB"), "plain.jpg": lambda: noise("RGB"), "grey.png": lambda: noise("L"),
    "palette.gif": lambda: noise("RGB").quantize(32), "print.jpg": lambda: noise("CMYK"),
}  # fmt: skip


def save(image: Image.Image, path: Path) -> None:
    keyed_palette = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(path, **({"lossless": True} if path.suffix == ".webp" else {}), **keyed_palette)


@pytest.mark.parametrize("name", [*UNLIKE_BEFORE, *AS_BEFORE])
def test_0027_images_become_what_the_native_engine_trains_on(tmp_path: Path, name: str) -> None:
    save({**UNLIKE_BEFORE, **AS_BEFORE}[name](), tmp_path / name)
    file = tmp_path / name
    native = View(name, file.read_bytes, None).pixels(SIZE)
    assert torch.equal(data_set("lora", folder=tmp_path).pixel_values[0], native)
    without = data_set("lora", "0027", folder=tmp_path).pixel_values[0]
    assert torch.equal(without, native) == (name in AS_BEFORE)


def test_0027_an_image_on_its_side_is_turned_as_before(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise("RGB").save(tmp_path / "turned.jpg", exif=exif)
    sets = [data_set("full", without, folder=tmp_path).pixel_values[0] for without in ("0027", None)]
    assert torch.equal(*sets)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0027_class_images_and_rows_of_a_data_set_are_decoded_alike(tmp_path: Path, kind: str) -> None:
    for folder in ("instance", "class", "parquet"):
        (tmp_path / folder).mkdir()
    save(noise("RGBA"), tmp_path / "class" / "cutout.png")
    save(noise("RGBA"), tmp_path / "instance" / "cutout.png")
    content = (tmp_path / "class" / "cutout.png").read_bytes()
    save(noise("RGBA"), tmp_path / "parquet" / "cutout.png")
    rows = {"image": [{"bytes": content, "path": None}, {"bytes": None, "path": "cutout.png"}]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "parquet" / "train.parquet")
    native = View("", lambda: content, None).pixels(SIZE)
    made = data_set(kind, folder=tmp_path / "instance", class_data_root=tmp_path / "class")
    assert torch.equal(made[0]["class_images"], native)
    named = data_set(kind, dataset_name=str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(named) == 2
    assert torch.equal(named.pixel_values[0], native)
    assert torch.equal(named.pixel_values[1], native)


def plain_parquet(folder: Path, column: str, split: str = "train") -> None:
    """A table that pyarrow wrote, without the schema of the datasets library."""
    content = io.BytesIO()
    noise("RGB").save(content, "PNG")
    (folder / "a.png").write_bytes(content.getvalue())
    struct = {"bytes": content.getvalue(), "path": None}
    cells = {"struct": [struct], "bytes": [content.getvalue()], "path": ["a.png"]}[column]
    table = pyarrow.table({"image": cells, "text": ["one"]})
    pyarrow.parquet.write_table(table, folder / f"{split}-00000.parquet")


@pytest.mark.parametrize("column", ["struct", "bytes", "path"])
def test_0027_tables_of_other_writers_are_read(tmp_path: Path, column: str) -> None:
    (tmp_path / "data").mkdir()
    plain_parquet(tmp_path / "data", column)
    given = {"dataset_name": str(tmp_path / "data"), "caption_column": "text", "cache_dir": str(tmp_path / "cache")}
    native = View("", (tmp_path / "data" / "a.png").read_bytes, None).pixels(SIZE)
    item = data_set("lora", **given)[0]
    assert item["instance_prompt"] == "one"
    assert torch.equal(item["instance_images"], native)
    with pytest.raises((TypeError, AttributeError)):
        data_set("lora", "0027", **given)


@pytest.mark.parametrize("metadata", ["csv", "jsonl"])
def test_0027_image_folders_have_captions(tmp_path: Path, metadata: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    noise("RGBA").save(folder / "a.png")
    rows = {"csv": "file_name,text\na.png,one\n", "jsonl": '{"file_name": "a.png", "text": "one"}\n'}
    (folder / f"metadata.{metadata}").write_text(rows[metadata])
    made = data_set("full", dataset_name=str(folder), caption_column="text", cache_dir=str(tmp_path / "cache"))
    assert made[0]["instance_prompt"] == "one"
    assert torch.equal(made.pixel_values[0], View("", (folder / "a.png").read_bytes, None).pixels(SIZE))


def test_0027_another_split_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    plain_parquet(tmp_path / "data", "bytes", "test")
    given = {"dataset_name": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    assert len(data_set("lora", dataset_split="test", **given)) == 1
    with pytest.raises(UserError, match="--dataset_split=train is not a split of .*, which has test"):
        data_set("lora", **given)


def test_0027_files_of_desktops_are_left_out_and_the_others_come_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.png"):
        noise("RGB", ord(name[0])).save(tmp_path / name)
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    made = data_set("lora", folder=tmp_path, repeats=2)
    native = [View("", (tmp_path / f"{name}.png").read_bytes, None).pixels(SIZE) for name in "aabbcc"]
    assert all(torch.equal(made.pixel_values[place], pixels) for place, pixels in enumerate(native))


def broken(kind: str, path: Path) -> None:
    content = io.BytesIO()
    noise("RGB").save(content, "PNG")
    path.write_bytes(
        {"cut": content.getvalue()[:-200], "empty": b"", "text": b"not an image", "web page": b"<html>"}[kind]
    )


@pytest.mark.parametrize("what", ["cut", "empty", "text", "web page"])
def test_0027_what_is_no_image_is_named(tmp_path: Path, what: str) -> None:
    broken(what, tmp_path / "a.png")
    with pytest.raises(UserError, match=r"/a.png cannot be read as an image \(.*\); fix or remove it.$"):
        data_set("lora", folder=tmp_path)


def test_0027_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    rows = {"image": [None]}
    features = datasets.Features({"image": datasets.Image()})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(UserError, match=r"/data, row 0 has no image; fix or remove the row.$"):
        data_set("lora", dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "without"), [(1, "0023"), (1, None), (2, None)])
def test_0023_and_0027_a_damaged_class_image_ends_the_run_with_a_sentence(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, ranks: int, without: str | None
) -> None:
    """Read by a process that loads images, while another rank trains on."""
    (tmp_path / "class").mkdir()
    broken("cut", tmp_path / "class" / "a.png")
    arguments = ("--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=1", "--max_train_steps=2")
    arguments = (*arguments, f"--class_data_dir={tmp_path / 'class'}", "--dataloader_num_workers=1")
    data = [f"--instance_data_dir={dog_dir}"]
    run = train("full", tmp_path / "out", tiny_model, data, *arguments, ranks=ranks, without=without)
    assert run.status not in (0, None)
    sentences = [line for line in run.log.splitlines() if line.startswith(f"{tmp_path / 'class' / 'a.png'} cannot be")]
    assert bool(sentences) == (without is None), run.log


@pytest.mark.parametrize("without", ["0027", None])
def test_0027_more_images_than_a_process_may_open(tmp_path: Path, without: str | None) -> None:
    for number in range(140):
        Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(tmp_path / f"{number}.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        if without:
            with pytest.raises(OSError, match="Too many open files"):
                data_set("lora", without, folder=tmp_path)
        else:
            assert len(data_set("lora", folder=tmp_path)) == 140
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0028_the_values_are_kept_in_8_bits_and_given_in_the_same_bits(
    tmp_path: Path, kind: str, center_crop: bool
) -> None:
    for number in range(3):
        noise("RGB", number).save(tmp_path / f"{number}.png")
    sets = []
    for without in ("0028", None):
        torch.manual_seed(5)
        sets.append(data_set(kind, without, folder=tmp_path, center_crop=center_crop, repeats=2))
    before, after = sets
    assert len(before) == len(after) == len(after.pixel_values) == 6
    for number in range(6):
        assert after.pixel_values[number].dtype == torch.float32
        assert torch.equal(before.pixel_values[number], after.pixel_values[number])
        assert torch.equal(before[number]["instance_images"], after[number]["instance_images"])
    assert len(list(after.pixel_values)) == 6
    assert before.pixel_values[0].element_size() == 4
    assert {square.dtype for square in after.pixel_values.squares} == {np.dtype(np.uint8)}


def captioned(folder: Path, captions: list) -> dict[str, object]:
    """A parquet file of images, each with what stands for its caption."""
    (folder / "data").mkdir()
    images = [noise("RGB", number) for number in range(len(captions))]
    made = datasets.Dataset.from_dict({"image": images, "text": captions}).cast_column("image", datasets.Image())
    made.to_parquet(folder / "data" / "train.parquet")
    return {"dataset_name": str(folder / "data"), "caption_column": "text", "cache_dir": str(folder / "cache")}


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([["one", "two"], ["three", "four"]], ["one", "three"]),
        ([["one"], ["two"]], ["one", "two"]),
        ([["one", "two", "three"], []], ["one", None]),
        (["one", "two"], ["one", "two"]),
        (["one", "  \n"], ["one", None]),
        ([None, "two"], [None, "two"]),
        ([None, ["", "two"]], [None, None]),
    ],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0027_the_first_of_several_captions_is_taken(
    tmp_path: Path, kind: str, captions: list, expected: list[str | None]
) -> None:
    given = captioned(tmp_path, captions)
    prompts = [data_set(kind, **given)[row]["instance_prompt"] for row in range(2)]
    assert prompts == [caption or "a photo of sks dog" for caption in expected]


def test_0027_without_it_lists_reach_the_tokenizers(tmp_path: Path) -> None:
    given = captioned(tmp_path, [["one", "two"], ["three", "four"]])
    assert data_set("lora", "0027", **given)[0]["instance_prompt"] == ["one", "two"]


@pytest.mark.parametrize("captions", [[1, 2], [[1], [2]], [{"text": "one"}, {"text": "two"}]])
def test_0027_a_caption_that_is_no_text_is_refused(tmp_path: Path, captions: list) -> None:
    with pytest.raises(UserError, match=r"/data, row 0 has the caption .*, expected text; see --caption_column.$"):
        data_set("lora", **captioned(tmp_path, captions))


@pytest.mark.long
@pytest.mark.parametrize("without", ["0029", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0029_validation_has_the_text_length_of_the_training(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, without: str | None
) -> None:
    arguments = ("--validation_prompt=a dog", "--num_validation_images=1", "--seed=0", "--max_train_steps=1")
    run = train(
        *(kind, tmp_path / "out", tiny_model, [f"--instance_data_dir={dog_dir}"], *arguments),
        "--max_sequence_length=40",
        without=without,
    )
    assert run.status == 0, run.log
    assert set(run.events("text_tokens")) == ({77 + 40, 77 + 256} if without else {77 + 40})
