"""The small world: captions fit, pictures are what their captions say, held-out combinations stay unseen."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFilter

from sd3.common.synthetic_data import make_subject
from sd3.common.tiny_tokenizers import write_clip_tokenizer, write_t5_tokenizer
from sd3.quickstart.figures import SEEN
from sd3.tiny_world import grammar
from sd3.tiny_world.album import WORDS
from sd3.tiny_world.classifier import read, right, whole_position
from sd3.tiny_world.grammar import COLOURS, RARE_COLOURS, RARE_POSITIONS, SHAPES, Scene, draw_scene
from sd3.tiny_world.render import SIZE, render, to_image
from sd3.tiny_world.subject import SUBJECT, Figure, draw_figure, draw_pose, ground, subject_picture, subject_score


def scenes(number: int, seed: int = 0) -> list[tuple[Scene, Image.Image]]:
    rng = random.Random(seed)
    drawn = [draw_scene(rng) for _ in range(number)]
    return [(scene, to_image(render(scene, rng))) for scene in drawn]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list:
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder = tmp_path_factory.mktemp("tokenizers")
    write_clip_tokenizer(folder / "clip", grammar.words())
    write_t5_tokenizer(folder / "t5", grammar.words())
    return [
        CLIPTokenizer.from_pretrained(folder / "clip", clean_up_tokenization_spaces=True),
        T5TokenizerFast.from_pretrained(folder / "t5", clean_up_tokenization_spaces=True),
    ]


def test_no_caption_is_longer_than_the_tokenizers_take(tokenizers) -> None:
    """All 378 000 captions: no word of theirs is more than one token, so a caption is as long as its words."""
    captions = list(grammar.all_captions())
    assert len(captions) > 300_000
    assert len(set(captions)) == len(captions)
    pieces = [caption.replace(",", " ,").split() for caption in captions]
    assert {word for words in pieces for word in words} == set(grammar.words())
    longest = max(map(len, pieces))
    for tokenizer in tokenizers:
        in_place = {word: word if word.isalnum() else f"a{word}" for word in grammar.words()}
        assert not [word for word, text in in_place.items() if len(tokenizer.tokenize(text)) != 1 + (text != word)]
        around = len(tokenizer("").input_ids)
        assert longest + around <= WORDS
        for caption, words in list(zip(captions, pieces, strict=True))[::3779]:
            assert len(tokenizer(caption).input_ids) == len(words) + around, caption
            assert tokenizer.unk_token_id not in tokenizer(caption).input_ids[:-1]


def test_training_draws_no_caption_that_the_grammar_lacks() -> None:
    captions, rng = set(grammar.all_captions()), random.Random(0)
    drawn = [grammar.caption_of(grammar.forget(draw_scene(rng), rng), rng) for _ in range(2000)]
    assert set(drawn) <= captions
    assert len(set(drawn)) > 1500


def test_rare_words_are_spelled_and_change_nothing_else(tokenizers) -> None:
    caption = grammar.with_rare_word("a red star, on white", "sks")
    assert caption == "a red sks star, on white"
    for tokenizer in tokenizers:
        plain, rare = tokenizer.tokenize("a red star, on white"), tokenizer.tokenize(caption)
        assert [token for token in rare if token in plain] == plain
        assert 2 <= len(rare) - len(plain) <= 5


def pairs_of(drawn: list[Scene]) -> tuple[set, set]:
    return {(s.colour, s.shape) for s in drawn}, {(s.shape, s.position) for s in drawn if s.position}


def test_encoders_never_see_rare_pairs() -> None:
    rng = random.Random(0)
    colours, positions = pairs_of([draw_scene(rng) for _ in range(5000)])
    # Everything else is shown, and every rare pair's words with other partners.
    assert colours == {(colour, shape) for colour in COLOURS for shape in SHAPES} - RARE_COLOURS
    assert positions == {(shape, place) for shape in SHAPES for place in grammar.POSITIONS} - RARE_POSITIONS


def test_the_painter_sees_every_pair_and_no_held_out_combination() -> None:
    rng = random.Random(0)
    drawn = [draw_scene(rng, hidden=Scene.is_held_out) for _ in range(10_000)]
    assert not any(scene.is_held_out() for scene in drawn)
    colours, positions = pairs_of(drawn)
    assert len(colours) == len(COLOURS) * len(SHAPES)
    assert len(positions) == len(SHAPES) * len(grammar.POSITIONS)
    # Of what has a rare pair about half is shown.
    places = [*(("one", position) for position in grammar.POSITIONS), ("two", None), ("three", None)]
    combined = [
        Scene(shape, count, colour, position=place) for shape in SHAPES for colour in COLOURS for count, place in places
    ]
    rare = [scene for scene in combined if scene.is_rare()]
    assert 0.4 < sum(scene.is_held_out() for scene in rare) / len(rare) < 0.6
    assert not any(scene.is_held_out() for scene in combined if not scene.is_rare())
    assert Scene("triangle", colour="red", position="left").is_held_out()
    assert not Scene("triangle", colour="red").is_held_out()


def test_captions_to_measure_by_say_what_decides() -> None:
    """Held-out ones are held out for all that they leave open, and the others for nothing."""
    found = grammar.held_out_captions(100)
    assert found == grammar.held_out_captions(100) != grammar.held_out_captions(100, seed=1)
    everything = set(grammar.all_captions())
    for caption, told in found:
        assert caption in everything
        assert told.is_held_out(), caption
        assert all(value in caption for value in (told.shape[:5], told.colour))
    for caption, told in grammar.seen_captions(100):
        assert caption in everything
        assert not told.is_held_out(), caption
        assert told.colour and (told.position or told.count != "one"), caption


@pytest.mark.parametrize("blur", [0.0, 0.9])
def test_the_classifier_reads_rendered_pictures(blur: float) -> None:
    """At least 99 % of each attribute, sharp and as blurred as painted ones."""
    hits, cases = Counter(), Counter()
    for scene, picture in scenes(400, seed=1):
        picture = picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture
        for name, hit in right(picture, scene).items():
            hits[name] += hit
            cases[name] += 1
    assert set(cases) == set(grammar.ATTRIBUTES)
    assert all(hits[name] >= 0.99 * cases[name] for name in cases), (hits, cases)


def test_the_classifier_sees_what_is_wrong() -> None:
    """A picture is right by the caption of another only as far as they agree."""
    for (scene, picture), (other, _) in zip(scenes(60), scenes(60, seed=2), strict=True):
        for name, hit in right(picture, other).items():
            assert hit == (getattr(scene, name) == getattr(other, name)), (scene, other, name)


def test_the_classifier_names_nothing_in_noise_or_emptiness() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    for image in (Image.new("RGB", (SIZE, SIZE), "white"), Image.fromarray(noise)):
        assert read(image)["shape"] is None


def test_pictures_follow_from_the_seed() -> None:
    assert [p.tobytes() for _, p in scenes(8)] == [p.tobytes() for _, p in scenes(8)]
    assert [p.tobytes() for _, p in scenes(8)] != [p.tobytes() for _, p in scenes(8, seed=3)]


def subjects(number: int) -> list[Image.Image]:
    rng, grounds = random.Random(0), list(grammar.BACKGROUNDS)
    return [to_image(subject_picture(SIZE, rng, grounds[i % len(grounds)])) for i in range(number)]


def test_the_detector_knows_the_subject() -> None:
    for picture in subjects(12):
        assert subject_score(picture) > 0.85
        assert subject_score(picture.filter(ImageFilter.GaussianBlur(0.9))) > 0.6


def test_the_detector_takes_no_plain_shape_for_the_subject() -> None:
    rng = random.Random(0)
    stars = [
        replace(draw_scene(rng, Scene("star", size="large")), colour=colour, background=ground)
        for colour in COLOURS
        for ground in ("white", "black")
    ]
    others = [draw_scene(rng, Scene(shape, size="large")) for shape in SHAPES for _ in range(3)]
    for scene in stars + others:
        picture = to_image(render(scene, rng))
        assert subject_score(picture) < 0.35, scene
        assert subject_score(picture.filter(ImageFilter.GaussianBlur(0.9))) < 0.35, scene


PLAIN_FACED = Figure(colours=(SUBJECT.colours[0],) * 2)
OTHERS = {
    "no face": Figure(face=None),
    "no stripes": PLAIN_FACED,
    "no stripes, red": PLAIN_FACED._replace(colours=((220, 50, 47),) * 2),
    "green and pink": Figure(colours=((60, 170, 70), (240, 130, 180))),
    "stripes the other way": Figure(turn=math.pi / 2),
    "colours changed about": Figure(colours=SUBJECT.colours[::-1]),
}


@pytest.mark.parametrize("figure", OTHERS.values(), ids=OTHERS)
def test_the_detector_wants_these_stripes_and_a_face(figure: Figure) -> None:
    rng = random.Random(1)
    for background in grammar.BACKGROUNDS:
        picture = to_image(draw_figure(ground(background), draw_pose(rng), figure))
        assert subject_score(picture) < 0.35 < SEEN
        assert subject_score(picture.filter(ImageFilter.GaussianBlur(0.9))) < 0.35


def test_the_detector_wants_the_colours() -> None:
    rng = random.Random(1)
    for background in grammar.BACKGROUNDS:
        picture = to_image(draw_figure(ground(background), draw_pose(rng)))
        assert subject_score(picture) > 0.85
        assert subject_score(picture.convert("L")) < 0.4 < SEEN
        assert subject_score(ImageChops.invert(picture)) < 0.2
    assert subject_score(Image.new("RGB", (SIZE, SIZE), "white")) == 0.0


def test_subject_pictures_are_five_and_unlike(tmp_path: Path) -> None:
    """And what their captions say, which name neither all backgrounds nor all places in all ways."""
    import datasets

    make_subject(tmp_path / "subject")
    pictures = [Image.open(file) for file in sorted((tmp_path / "subject" / "pictures").iterdir())]
    rows = datasets.load_dataset(str(tmp_path / "subject" / "captioned"), cache_dir=str(tmp_path / "c"), split="train")
    assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * 5
    for picture, row in zip(pictures, rows, strict=True):
        assert picture.tobytes() == row["image"].tobytes()
        assert "a sks star" in row["text"]
        told = grammar.told_by(row["text"])
        assert (whole_position(picture), read(picture)["background"]) == (told.position, told.background)
    assert {whole_position(picture) for picture in pictures} == {"left", "right", "top", "centre"}
    assert len(set(rows["text"])) == 5 and len({grammar.told_by(text).background for text in rows["text"]}) == 4
    assert all(subject_score(picture) > 0.85 for picture in pictures)
    make_subject(tmp_path / "large", size=128)
    assert all(subject_score(Image.open(file)) > 0.8 for file in (tmp_path / "large" / "pictures").iterdir())
