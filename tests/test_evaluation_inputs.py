"""Prompts, data sets, pictures and candidates: what is read, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from evaluation_parts import FakeInference, draw, fill
from sd3.common.command_line import UserError
from sd3.evaluation.baseline import held_out_rows, read_split, write_training_rows
from sd3.evaluation.candidates import (
    Candidate,
    PictureSet,
    align,
    parse_candidate,
    read_folder,
    unequal_settings,
)
from sd3.evaluation.images import decode, images_in
from sd3.evaluation.painting import GenerationFailed, Inference, paint
from sd3.evaluation.prompts import SETS, class_noun_of, read_prompts, text_for_clip
from sd3.inference.options import parse
from sd3.inference.run import TEXT_TO_IMAGE
from sd3.inference.sources import find_sources

PROMPTS = ["a photo of sks dog", "a sketch of sks dog"]


@pytest.mark.parametrize("name", SETS)
def test_a_prompt_set_has_25_prompts_of_its_subject(name: str) -> None:
    prompts = read_prompts(name, "sks dog")
    assert len(set(prompts)) == len(prompts) == 25
    assert all(prompt.count("sks dog") == 1 and "{" not in prompt for prompt in prompts)


def test_a_prompt_file_may_have_comments_and_repetitions(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\ufeff# about\n\n a {subject} \r\na cat\na {subject}\n", encoding="utf-8")
    assert read_prompts(str(file), "sks dog") == ["a sks dog", "a cat"]


@pytest.mark.parametrize("content", [None, b"# only this\n", b"\xff\xfe\x00"])
def test_an_unusable_prompt_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="--prompt-set=.*mine.txt"):
        read_prompts(str(file), "x")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("A photo of sks dog.", "A photo of dog."), ("a SKS Dog, a sks dog", "a dog, a dog"),
        ("a sks dogsled", "a sks dogsled"), ("a cat", "a cat"),
    ],
)  # fmt: skip
def test_clip_reads_the_class_noun_in_place_of_the_rare_token(prompt: str, text: str) -> None:
    assert text_for_clip(prompt, "sks dog", "dog") == text


def test_the_class_noun_follows_from_the_subject() -> None:
    found = [class_noun_of(text) for text in ("sks dog", "sks polar bear", "dog", "")]
    assert found == ["dog", "polar bear", "dog", ""]
    assert text_for_clip("a dog", "", "x") == "a dog"
    assert text_for_clip("a sks dog", "sks dog", r"\1") == r"a \1"


def test_the_split_is_the_same_for_ever() -> None:
    assert held_out_rows(833, 0.01, 0) == [46, 87, 282, 306, 366, 392, 404, 808]
    assert set(held_out_rows(833, 0.05, 0)) > set(held_out_rows(833, 0.01, 0))
    assert held_out_rows(833, 0.01, 1) != held_out_rows(833, 0.01, 0)
    assert len(held_out_rows(10, 0.01, 0)) == 1
    assert len(held_out_rows(2, 0.99, 0)) == 1


def test_held_out_rows_are_read_and_the_others_written(tmp_path: Path, pokemon_dir: Path) -> None:
    import datasets

    split = read_split(pokemon_dir, 0.25, seed=3)
    assert (split.total, len(split.rows), len(split.images)) == (8, 2, 2)
    assert write_training_rows(pokemon_dir, tmp_path / "train", 0.25, seed=3) == 6
    everything = datasets.load_dataset(str(pokemon_dir), cache_dir=str(tmp_path / "cache"))["train"]
    kept = datasets.load_dataset(str(tmp_path / "train"), cache_dir=str(tmp_path / "cache"))["train"]
    assert kept["text"] == [text for row, text in enumerate(everything["text"]) if row not in split.rows]
    assert split.captions == [everything["text"][row] for row in split.rows]
    shown = decode("x", split.images[0].read())
    assert shown.tobytes() == everything[split.rows[0]]["image"].convert("RGB").tobytes()
    assert kept[0]["image"].size == (96, 96)
    with pytest.raises(UserError, match="--training-split .*train exists"):
        write_training_rows(pokemon_dir, tmp_path / "train", 0.25, seed=3)


def write_rows(folder: Path, rows: list[dict[str, object]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder


GOOD = {"image": {"bytes": b"x", "path": None}, "text": "a cat"}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([GOOD], "has 1 rows"),
        ([{"image": GOOD["image"], "words": "x"}] * 2, "--caption-column=text is not a column of .* are image, words"),
        ([GOOD, {"image": GOOD["image"], "text": " "}], "set, row 1 has no caption"),
        ([GOOD, {"image": {"bytes": None, "path": "gone.png"}, "text": "a"}], "set, row 1 names gone.png"),
    ],
)  # fmt: skip
def test_an_unusable_data_set_is_explained(tmp_path: Path, rows: list[dict[str, object]], why: str) -> None:
    folder = write_rows(tmp_path / "set", rows)
    with pytest.raises(UserError, match=why):
        for seed in range(8):  # until row 1 is the held-out one
            read_split(folder, 0.5, seed)


def test_a_damaged_or_empty_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no .parquet file"):
        read_split(tmp_path, 0.1, 0)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="a.parquet cannot be read as parquet"):
        read_split(tmp_path, 0.1, 0)


def test_pictures_are_turned_upright_and_clear_parts_are_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    shown = decode("a", (tmp_path / "a.png").read_bytes())
    assert (shown.mode, shown.size) == ("RGB", (2, 4))
    assert sorted(shown.getcolors()) == [(1, (0, 0, 255)), (7, (255, 255, 255))]


def test_a_folder_of_real_pictures_may_hold_other_things(tmp_path: Path, dog_dir: Path) -> None:
    draw(1).save(tmp_path / "b.jpeg")
    draw(2).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    assert [Path(source.name).name for source in images_in(tmp_path, "--subject-dir")] == ["a.PNG", "b.jpeg"]
    assert len(images_in(dog_dir, "--subject-dir")) == 5
    with pytest.raises(UserError, match="--subject-dir=.*no directory"):
        images_in(tmp_path / "gone", "--subject-dir")
    with pytest.raises(UserError, match="--subject-dir=.*holds no pictures"):
        images_in(tmp_path / ".cache", "--subject-dir")


def test_a_candidate_is_spelled_out() -> None:
    assert parse_candidate("label=base,model=a/b") == Candidate("base", model="a/b")
    assert parse_candidate(r"lora=x\,y.safetensors,label=a=b,model=m") == Candidate("a=b", None, "m", "x,y.safetensors")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("label=a,model=b,c", "'c' is none of"), ("label=a", "lacks model="), ("model=a", "lacks label="),
        ("label=a,model=", "model= is empty"), ("label=a,label=b,model=c", "label= is given twice"),
        ("label=a,model=b,steps=3", "'steps=3' is none of"),
    ],
)  # fmt: skip
def test_a_candidate_that_is_not_says_why(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_candidate(text)


def test_a_folder_of_pictures_is_read_without_its_contact_sheet(tmp_path: Path) -> None:
    fill(tmp_path, PROMPTS, [8, 23])
    draw("sheet").save(tmp_path / "sheet.png")
    (tmp_path / ".killed.png").write_bytes(b"half")
    assert sorted(read_folder("a", tmp_path).keys()) == sorted((p, s) for p in PROMPTS for s in (8, 23))


def test_an_unusable_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory"):
        read_folder("a", tmp_path / "gone")
    with pytest.raises(UserError, match="no PNG file with a recipe"):
        read_folder("a", tmp_path)
    fill(tmp_path, PROMPTS, [8])
    fill(tmp_path, PROMPTS[:1], [8], steps=20)
    with pytest.raises(UserError, match="two pictures of the same prompt and seed"):
        read_folder("a", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="broken.png cannot be read"):
        read_folder("a", tmp_path)


def test_all_candidates_come_in_one_order(tmp_path: Path) -> None:
    one = read_folder("one", fill(tmp_path / "one", PROMPTS, [8, 23, 1334]))
    two = read_folder("two", fill(tmp_path / "two", PROMPTS[::-1], [1334, 23, 8], steps=20, lora_scale=0.5))
    first, second = align([one, two])
    assert first.keys() == second.keys()
    assert [seed for prompt, seed in first.keys() if prompt == PROMPTS[0]] == [8, 23, 1334]
    notes = unequal_settings([first, second])
    assert notes == ["The candidates were painted with different steps (one: 28; two: 20)."]


@pytest.mark.parametrize("more", ["one", "two"])
def test_other_prompts_or_seeds_are_refused(tmp_path: Path, more: str) -> None:
    seeds = {"one": [8], "two": [8]}
    seeds[more] = [8, 23]
    sets = [read_folder(name, fill(tmp_path / name, PROMPTS, seeds[name])) for name in seeds]
    with pytest.raises(UserError, match="seed 23.*the same prompts and seeds"):
        align(sets)


def test_pictures_are_painted_with_the_flags_of_the_inference_scripts(tmp_path: Path) -> None:
    inference = FakeInference()
    candidate = Candidate("LoRA, 500 steps", model="models/base", lora="run/x,y.safetensors")
    painted = paint(candidate, PROMPTS, [8, 23], "float32", ["--steps=4"], tmp_path, inference)
    assert painted.keys() == [(prompt, seed) for prompt in PROMPTS for seed in (8, 23)]
    assert {recipe.lora for recipe in painted.recipes} == {"run/x,y.safetensors"}
    (call,) = inference.calls
    assert {"--model=models/base", "--lora=run/x,y.safetensors", "--steps=4", "--dtype=float32"} < set(call)
    assert call[-3:] == ["--seeds", "8", "23"]


def test_a_model_that_was_trained_again_in_its_place_is_painted_again(tmp_path: Path) -> None:
    inference, candidate = FakeInference(), Candidate("tuned", model="run1")

    def now() -> PictureSet:
        return paint(candidate, PROMPTS, [8, 23], "float32", [], tmp_path, inference)

    old = now()
    before = {path: path.read_bytes() for path in old.paths}
    inference.trained = 1
    new = now()
    assert {recipe.model_hash for recipe in new.recipes} == {"run1 1"}
    assert {path: path.read_bytes() for path in old.paths} == before
    assert now().paths == new.paths
    inference.trained = 0
    assert now().paths == old.paths
    assert len(inference.made) == 8


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["--batch-size=4"], False), (["--device=cpu"], False), (["--local-files-only"], False),
        (["--steps=28"], False), (["--guidance-scale=1"], False), (["--steps=5"], True), (["--height=512"], True),
        (["--guidance-scale=1.5"], True),
    ],
    ids=str,
)  # fmt: skip
def test_only_what_a_recipe_holds_makes_another_folder(tmp_path: Path, change: list[str], again: bool) -> None:
    inference, candidate = FakeInference(), Candidate("a", model="m")
    first = paint(candidate, PROMPTS, [8], "float32", ["--device=auto", "--batch-size=1"], tmp_path, inference)
    flags = ["--device=auto", "--batch-size=1", *change]
    second = paint(candidate, PROMPTS, [8], "float32", flags, tmp_path, inference)
    assert (second.paths[0].parent != first.paths[0].parent) == again
    assert len(inference.made) == (4 if again else 2)


def test_a_label_moves_no_pictures_and_a_dtype_or_lora_does(tmp_path: Path) -> None:
    inference = FakeInference()
    places = [
        paint(candidate, PROMPTS, [8], dtype, [], tmp_path, inference).paths[0].parent
        for candidate, dtype in (
            (Candidate("a", model="m"), "float32"), (Candidate("other name", model="m"), "float32"),
            (Candidate("a", model="m"), "float16"), (Candidate("a", model="m", lora="l"), "float32"),
        )
    ]  # fmt: skip
    assert places[0] == places[1]
    assert len(set(places)) == 3


def test_the_origin_is_that_of_the_recipes(tiny_model: Path) -> None:
    candidate = Candidate("a", model=str(tiny_model))
    for flags, tokens in (([], 256), (["--max-sequence-length=99"], 99)):
        found = Inference().origin(candidate, parse([f"--model={tiny_model}", *flags], TEXT_TO_IMAGE), True)
        assert found == (find_sources(str(tiny_model)).model_hash(), "", tokens)
    with pytest.raises(UserError, match="--lora=gone does not exist"):
        Inference().origin(Candidate("a", model=str(tiny_model), lora="gone"), parse([], TEXT_TO_IMAGE), True)


def test_failed_painting_keeps_its_status(tmp_path: Path) -> None:
    with pytest.raises(GenerationFailed) as caught:
        paint(Candidate("a", model="m"), PROMPTS, [8], "float32", [], tmp_path, FakeInference(status=3))
    assert caught.value.status == 3
    with pytest.raises(UserError, match="is no directory"):
        paint(Candidate("a", model="m"), PROMPTS, [8], "float32", [], tmp_path, FakeInference(paints=False))
