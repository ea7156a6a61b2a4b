"""The models that judge pictures of the tiny world: they know what a caption states, and a figure wherever it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from repository import PROJECT
from sd3.evaluation.feature_models import ClassTokenModel, ClipModel, FeatureModel
from sd3.evaluation.metrics import cosines, subject_fidelity
from sd3.tiny_world import judge_world, train_judge
from sd3.tiny_world.grammar import ATTRIBUTES, BACKGROUNDS, COLOURS, Scene, caption_of
from sd3.tiny_world.render import plain, render, to_image
from sd3.tiny_world.subject import SUBJECT, draw_figure, draw_pose, subject_picture

JUDGE = PROJECT / "sd3" / "tiny_world" / "judge"
MOST_BYTES = 500_000
PICTURES = 150
# Least share of pictures that are nearer to their caption than to every one with this attribute swapped. Shapes,
# places and counts are known above chance (a sixth, a fifth, a third), not well; the README says so.
TOLD = {"colour": 0.9, "shape": 0.3, "count": 0.6, "size": 0.8, "position": 0.35, "background": 0.8}


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return ClipModel("--clip-model", str(JUDGE / "clip"), local_files_only=True)


@pytest.fixture(scope="module")
def vit() -> ClassTokenModel:
    return ClassTokenModel("--dino-model", str(JUDGE / "vit"), local_files_only=True)


@pytest.fixture(scope="module", params=["clip", "vit"])
def judge(request: pytest.FixtureRequest) -> FeatureModel:
    return request.getfixturevalue(request.param)


def scenes(number: int, **fixed: str) -> list[Scene]:
    """Any scenes of the painter's world, held-out pairs too."""
    rng = random.Random("scenes to judge")
    found = []
    for _ in range(number):
        count = rng.choices(ATTRIBUTES["count"], (6, 2, 2))[0]
        drawn = {name: rng.choice(values) for name, values in ATTRIBUTES.items()} | {"count": count} | fixed
        if drawn["count"] != "one":
            drawn |= {"size": "small", "position": None}
        found.append(Scene(**drawn))
    return found


def embedded(model: FeatureModel, draw: Callable[[random.Random], np.ndarray], number: int) -> np.ndarray:
    rng = random.Random("pictures to judge")
    return model.embed([to_image(draw(rng)) for _ in range(number)]).numpy()


def subjects(rng: random.Random) -> np.ndarray:
    return subject_picture(64, rng, rng.choice(list(BACKGROUNDS)))


def bare_subjects(rng: random.Random) -> np.ndarray:
    """The subject without its face."""
    ground = plain(BACKGROUNDS[rng.choice(list(BACKGROUNDS))])
    return draw_figure(ground, draw_pose(rng), SUBJECT._replace(face=None))


def plain_stars(rng: random.Random) -> np.ndarray:
    facts = judge_world.Facts(
        "star", "one", "plain", rng.choice(list(COLOURS)), "none", "no", rng.choice(("small", "large")),
        rng.choice(ATTRIBUTES["position"]), rng.choice(list(BACKGROUNDS)),
    )  # fmt: skip
    return judge_world.picture_of(facts, rng)


def other_shapes(rng: random.Random) -> np.ndarray:
    return render(replace(rng.choice(scenes(64)), shape=rng.choice(("circle", "square", "triangle", "cross"))), rng)


def area_under_curve(high: np.ndarray, low: np.ndarray) -> float:
    """The share of pairs in which the first is higher (Mann and Whitney 1947)."""
    return float((high[:, None] > low).mean())


def test_the_subject_is_not_in_the_judges_world() -> None:
    rng = random.Random(0)
    facts = [judge_world.draw_facts(rng) for _ in range(2000)]
    facts += [judge_world.changed(one, rng) for one in facts]
    stars = [{one.colour, one.second} for one in facts if one.shape == "star" and one.fill != "plain"]
    assert len(stars) > 100 and {"yellow", "purple"} not in stars
    assert any({one.colour, one.second} == {"yellow", "purple"} for one in facts)  # on other shapes
    figures = [judge_world.draw_look(rng) for _ in range(2000)]
    figures += [judge_world.altered(one, rng) for one in figures]
    near = [
        one
        for one in figures
        if one.shape == "star" and one.fill != "plain"
        if any(np.abs(np.subtract(one.colours, pair)).max() < 30 for pair in (SUBJECT.colours, SUBJECT.colours[::-1]))
    ]
    assert not near


def test_a_change_changes_what_a_full_caption_says() -> None:
    rng = random.Random(1)
    everything = ("look", "face", "size", "position", "background")
    for _ in range(300):
        facts = judge_world.draw_facts(rng)
        other = judge_world.changed(facts, rng)
        assert judge_world.fits([facts, other], [facts, other]).tolist() == [[True, False], [False, True]]
        vague = judge_world.told(facts, (), rng)
        assert (vague.shape, vague.count) == (facts.shape, facts.count)
        assert judge_world.fits([vague], [facts])[0, 0]
        caption = judge_world.caption_of(judge_world.told(facts, everything, rng), rng)
        assert facts.colour in caption or facts.fill != "plain"
        assert ("face" in caption) == (facts.face == "yes")
        assert set(caption.replace(",", " ,").split()) <= set(judge_world.words())


def test_shipped_files_are_small_and_half(judge: FeatureModel) -> None:
    from safetensors.torch import load_file

    folder = Path(judge.name)
    weights = load_file(folder / "model.safetensors")
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST_BYTES
    assert {tensor.dtype for name, tensor in weights.items() if not name.endswith("position_ids")} == {torch.float16}


@pytest.mark.parametrize("attribute", TOLD)
def test_a_picture_is_nearest_to_the_caption_that_is_true(clip: ClipModel, attribute: str) -> None:
    fixed = {"count": "one"} if attribute in ("size", "position") else {}
    rng, right = random.Random(f"captions {attribute}"), 0
    for scene in scenes(PICTURES, **fixed):
        # A figure that becomes several has no place or size to be told.
        told = replace(scene, size=None, position=None) if attribute == "count" else scene
        values = [getattr(scene, attribute), *(v for v in ATTRIBUTES[attribute] if v != getattr(scene, attribute))]
        texts = [caption_of(replace(told, **{attribute: value}), rng) for value in values]
        picture = clip.embed([to_image(render(scene, rng))]).numpy()
        right += int(cosines(picture, clip.embed_texts(texts, 16).numpy())[0].argmax() == 0)
    assert right / PICTURES >= TOLD[attribute]


def test_prompt_fidelity_ranks_pictures_of_a_caption(clip: ClipModel) -> None:
    """As the evaluation has it: the texts are given, and what was painted is right or not."""
    rng, texts, pictures = random.Random("ranks"), [], []
    for scene in scenes(PICTURES):
        other = rng.choice([one for one in scenes(64) if one.shape != scene.shape and one.colour != scene.colour])
        texts.append(caption_of(scene, rng))
        pictures += [to_image(render(scene, rng)), to_image(render(other, rng))]
    found = cosines(clip.embed_texts(texts, 16).numpy(), clip.embed(pictures).numpy())
    rows = np.arange(PICTURES)
    assert (found[rows, 2 * rows] > found[rows, 2 * rows + 1] + 0.1).mean() >= 0.95


@pytest.mark.parametrize("others", [plain_stars, other_shapes])
def test_the_subject_is_known(judge: FeatureModel, others: Callable[[random.Random], np.ndarray]) -> None:
    references = embedded(judge, subjects, 5)
    rng = random.Random("more subjects")
    same = judge.embed([to_image(subjects(rng)) for _ in range(60)]).numpy()
    known = subject_fidelity(same, references)
    unknown = subject_fidelity(embedded(judge, others, 60), references)
    assert area_under_curve(known, unknown) >= 0.95
    assert known.mean() - unknown.mean() >= 0.3


def test_half_a_subject_is_between(vit: ClassTokenModel) -> None:
    """A model that learned the stripes and not the face has learned something."""
    references = embedded(vit, subjects, 5)
    levels = [subject_fidelity(embedded(vit, draw, 60), references).mean() for draw in (plain_stars, bare_subjects)]
    rng = random.Random("more subjects")
    whole = subject_fidelity(vit.embed([to_image(subjects(rng)) for _ in range(60)]).numpy(), references).mean()
    assert levels[0] + 0.1 < levels[1] < whole - 0.05


def test_training_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        options = ["--output", str(tmp_path / name), "--seed", "3", "--clip-steps", "2", "--vit-steps", "2"]
        assert train_judge.main(options) == 0
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert len(files) == 11
    for file in files:
        if file.name != "training.json":  # which tells how long it took
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_an_output_that_is_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    assert train_judge.main(["--output", str(tmp_path)]) == 2
    assert "not an empty directory" in capsys.readouterr().err


@pytest.mark.long
def test_a_short_training_learns(tmp_path: Path) -> None:
    losses = train_judge.train(tmp_path / "judge", 1, {"clip": 100, "vit": 100})
    for name, found in losses.items():
        # On one CPU the ratio for CLIP was below 0.75, on another 0.77; without learning it is 1.
        assert np.mean(found[-10:]) < 0.85 * np.mean(found[:10]), name
