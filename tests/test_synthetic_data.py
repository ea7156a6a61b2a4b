"""The drawn data sets are what the training scripts take, whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sd3.common import synthetic_data
from sd3.common.synthetic_data import main, make_dog, make_pokemon


def test_a_dog_folder_holds_only_pictures_of_the_size_asked(tmp_path: Path) -> None:
    make_dog(tmp_path / "dog", images=3, size=48)
    files = sorted((tmp_path / "dog").iterdir())
    assert len(files) == 3
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")
    assert len({file.read_bytes() for file in files}) == 3


def test_the_parquet_set_loads_as_pictures_with_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    make_pokemon(tmp_path / "pokemon", images=6, size=48)
    rows = datasets.load_dataset(str(tmp_path / "pokemon"), cache_dir=str(tmp_path / "cache"), split="train")
    assert rows.column_names == ["image", "text"]
    assert rows.num_rows == 6
    assert all(row["image"].size == (48, 48) for row in rows)
    # Captions that differ are what shows a caption given to another's picture.
    assert len(set(rows["text"])) == 6


@pytest.mark.parametrize("make", [make_dog, make_pokemon])
def test_the_seed_alone_decides(tmp_path: Path, make: synthetic_data.Callable[..., None]) -> None:
    def content(name: str, seed: int) -> list[bytes]:
        make(tmp_path / name, images=2, size=32, seed=seed)
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]

    assert content("a", 1) == content("b", 1)
    assert content("c", 2) != content("a2", 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "0"], "--images is 0"),
        (["--size", "8"], "--size is 8"),
        (["--size", "100000"], "--size is 100000"),
    ],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--kind", "dog", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["--kind", "dog", "--output", str(tmp_path)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_parent_that_is_a_file_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--kind", "dog", "--output", str(tmp_path / "file" / "dog")]) == 2
    error = capsys.readouterr().err
    assert "cannot be made" in error
    assert error.count("\n") == 1


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *_: object) -> None:
        (folder / "half.png").write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_data, "_write_dog", fail)
    with pytest.raises(KeyboardInterrupt):
        make_dog(tmp_path / "dog")
    assert list(tmp_path.iterdir()) == []
