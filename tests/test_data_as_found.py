"""Training data in odd states: pipes, names of any bytes, tables of other kinds, splits; right or one sentence."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sd3.common.command_line import UserError, one_line
from sd3.data import training_data
from sd3.data.training_data import DataFlags, read_folder, read_training_data
from sd3.launch import preflight
from test_data_check import BYTES, CELLS, TEXTS, checked, folder_with_metadata, of_dataset, only, png, table
from test_preflight import flags_of, settings_of

PIPES = "contains what is not a file, such as broken links or pipes (odd.png); it must contain only images."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def bind(path: Path) -> None:
    """A socket; its address, relative, is short enough."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    "make", [os.mkfifo, bind, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)],
    ids=["pipe", "socket", "device", "loop"],
)  # fmt: skip
def test_a_folder_with_what_is_no_file_is_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "odd.png")
    assert only(DataFlags(folder=str(tmp_path))) == f"--input_dir={tmp_path} {PIPES}"


def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").symlink_to("/proc/self/mem")
    why = "b.png cannot be read (Input/output error); fix or remove these files."
    assert only(DataFlags(folder=str(tmp_path))) == f"--input_dir={tmp_path}: {why}"
    (tmp_path / "b.png").unlink()
    monkeypatch.setattr(training_data, "MOST_BYTES", 1 << 30)
    with (tmp_path / "video.mp4").open("wb") as stream:
        stream.truncate(3 << 30)  # of holes
    assert "video.mp4 has 3.0 GiB, more than the 1 of an image; fix or remove" in only(DataFlags(folder=str(tmp_path)))
    with pytest.raises(UserError, match=r"video\.mp4 has 3\.0 GiB, more than the 1 of an image; fix or remove it\."):
        read_folder(tmp_path).images[-1].content()


@pytest.mark.parametrize(("size", "good"), [((1, 1), True), ((1, 20_000), True), ((30_000, 1), False)])
def test_an_image_too_narrow_to_be_enlarged(tmp_path: Path, size: tuple[int, int], good: bool) -> None:
    Image.new("RGB", size).save(tmp_path / "line.png")
    problems, _ = checked(DataFlags(folder=str(tmp_path)), resolution=64)
    why = "line.png is 30000x1, too narrow to be enlarged to 64 pixels a side; fix or remove these files."
    assert problems == ([] if good else [f"--input_dir={tmp_path}: {why}"])


def test_system_files_of_macs_and_windows_are_left_out(tmp_path: Path) -> None:
    for name in ("Icon\r", "ehthumbs.db", "._a.png"):
        (tmp_path / name).touch()
    (tmp_path / "a.png").write_bytes(png())
    assert len(read_folder(tmp_path).images) == 1


# ---- names


def test_names_of_any_bytes_are_told_and_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    names = [b"\xff\xfe.png", b"a\nb.png", b"\x1b[31m.png", "狗.png".encode()]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        Path(folder, os.fsdecode(name)).write_bytes(png(size=20))
    reading, writing = os.pipe()
    monkeypatch.setenv("SD3_SUMMARY_FD", str(writing))
    with (tmp_path / "settings").open("w+") as settings:
        json.dump(settings_of(tiny_model, tmp_path), settings)
        settings.seek(0)
        monkeypatch.setattr(sys, "stdin", settings)
        with open(1, "w", encoding="ascii", closefd=False) as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            assert preflight.main(flags_of(f"--instance_data_dir={folder}")) == 0
    assert r"(\x1b[31m.png, a\nb.png, \u72d7.png and 1 more)" in capfd.readouterr().out
    with os.fdopen(reading, encoding="utf-8") as stream:
        assert set(json.load(stream)["images"]["enlarged"]) == {os.fsdecode(name) for name in names}


def test_one_line() -> None:
    assert one_line("a\nb\r\x1b\udcff é狗") == r"a\nb\r\x1b\udcff é狗"


# ---- data sets


def test_tables_behind_pipes_and_in_hidden_or_named_folders(tmp_path: Path) -> None:
    folder = table(tmp_path / "set", image=BYTES, text=TEXTS)
    (folder / "data").rename(folder / "data.parquet")  # as Spark names the folder of a table
    for name in (".cache", "__MACOSX"):
        (folder / name).mkdir()
        (folder / name / "junk.parquet").write_bytes(b"junk")
    (folder / "data.parquet" / "._train.parquet").write_bytes(b"junk")
    assert len(read_training_data(of_dataset(folder)).images) == 4
    os.mkfifo(folder / "pipe.parquet")
    assert only(of_dataset(folder)) == f"{folder}/pipe.parquet is not a file; remove it."


@pytest.mark.parametrize(
    "column",
    [[list(content[:50]) for content in BYTES], [[cell] for cell in CELLS], [1, 2, 3, 4],
     [{"data": content} for content in BYTES], [True, False, True, False]],
    ids=["bytes as numbers", "lists of images", "numbers", "other names", "yes or no"],
)  # fmt: skip
def test_columns_that_hold_no_images_are_refused(tmp_path: Path, column: list) -> None:
    """A list of numbers was once taken for the pixels of a grey image."""
    problem = only(of_dataset(table(tmp_path / "set", image=column, text=TEXTS)))
    assert f"--image_column=image of {tmp_path / 'set'} has " in problem
    assert problem.endswith("expected images as bytes or paths; give the column with the images.")


def test_other_splits_and_files_that_are_not_read_are_in_the_summary(tmp_path: Path) -> None:
    folder = table(tmp_path / "tables", image=CELLS, text=TEXTS)
    table(folder, "test", image=CELLS[:3], text=TEXTS[:3])
    (folder / "metadata.csv").write_text("file_name,text\n")
    assert checked(of_dataset(folder))[1].lines()[1:] == [
        "images: 1 left out, other splits (test with 3 rows)",
        "images: 1 left out, the rows come from parquet files (metadata.csv)",
    ]
    folder = tmp_path / "images"
    folder_with_metadata(folder / "train", 2, 3)
    folder_with_metadata(folder / "test", 3, 3)
    pyarrow.parquet.write_table(pyarrow.table({"image": BYTES}), folder / "old.parquet")
    assert checked(of_dataset(folder))[1].lines()[1:] == [
        "images: 1 left out, other splits (test with 3 rows)",
        "images: 1 left out, the rows come from metadata of images (old.parquet)",
        "images: 1 left out, no row of the metadata names it (train/2.png)",
    ]


def test_a_data_set_that_cannot_be_loaded_says_what_is_expected(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = table(tmp_path / "columns", image=CELLS, text=TEXTS)
    table(folder, "train-more", image=CELLS, caption=TEXTS)
    problem = only(of_dataset(folder))
    assert "because column names don't match); expected are tables of the same columns" in problem
    folder = folder_with_metadata(tmp_path / "csv", 4, 4, "csv")
    (folder / "metadata.csv").write_text("file_name;text\n0.png;a\n")
    problem = only(of_dataset(folder))
    assert problem.endswith("each row of the metadata needs a file_name, and each column values of one kind.")
    folder = table(tmp_path / "configs", image=CELLS, text=TEXTS)
    names = "".join(f"- config_name: {name}\n  data_files: data/*.parquet\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    assert "['one', 'two']" in (problem := only(of_dataset(folder)))
    assert problem.endswith("see --dataset_config_name.")
    assert "Failed to read" not in capfd.readouterr().err  # which datasets logs


@pytest.mark.parametrize("name", ["photos [2024]", "what?", "a*b", "a::b"])
def test_a_path_that_is_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    problem = only(of_dataset(folder_with_metadata(tmp_path / name, 4, 4)))
    assert problem.endswith("in its path, which has a meaning in patterns; rename the folder.")


@pytest.mark.parametrize("name", ["a#b", "50%20", "狗 é", "{x}", "it's"])
def test_any_other_path_is_none(tmp_path: Path, name: str) -> None:
    found = read_training_data(of_dataset(folder_with_metadata(tmp_path / name, 4, 4)))
    assert [image.caption for image in found.images] == TEXTS
    assert [image.content() for image in found.images] == BYTES
