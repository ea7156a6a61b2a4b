"""The quick start's page: what it shows, what it refuses, and that it looks like something."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import BROWSER, assert_looks_like_something
from evaluation_page import Element, Page
from sd3.common.pictures import Recipe, save_picture
from sd3.quickstart import figures, page
from sd3.tiny_world.grammar import BACKGROUNDS, Scene, told_by
from sd3.tiny_world.render import render, to_image
from sd3.tiny_world.subject import subject_picture

PROMPTS = ("a sks star on a grey background", "a large red circle on the left, on a black background")
SEEDS = (1, 2)
METRICS = {"clip-t": (0.21, 0.34), "dino": (0.4, 0.9)}  # before, after


def recipe(prompt: str, seed: int) -> Recipe:
    return Recipe(prompt, "", seed, 4, 4.0, 64, 64, "float32", "model", "hash")


def picture(prompt: str, seed: int, learned: bool) -> Image.Image:
    """What a model would paint that follows prompts, and knows the subject if it has `learned` it."""
    rng = random.Random(f"{prompt} {seed}")
    told = told_by(prompt)
    if "sks" in prompt and learned:
        return to_image(subject_picture(64, rng, told.background or "white"))
    scene = Scene(told.shape, "one", told.colour or "blue", told.size or "large", told.position or "centre",
                  told.background or "white")  # fmt: skip
    return to_image(render(scene, rng))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the page is made from."""
    folder = tmp_path_factory.mktemp("quickstart")
    for name in ("before", "full"):
        (folder / name).mkdir()
        for prompt in PROMPTS:
            for seed in SEEDS:
                made = recipe(prompt, seed)
                save_picture(picture(prompt, seed, name == "full"), folder / name / made.file_name(), made, {})
    (folder / "subject").mkdir()
    for number, background in enumerate(BACKGROUNDS):
        image = to_image(subject_picture(64, random.Random(number), background))
        image.save(folder / "subject" / f"{number}.png")
    (folder / "run").mkdir()
    Image.new("RGB", (90, 70), "white").save(folder / "run" / "report.png")
    report = {"last_step": 200, "sessions": 2, "images_per_second_text": "12.500", "final_train_loss_text": "0.250000"}
    (folder / "run" / "report.json").write_text(json.dumps(report))

    def estimate(mean: float) -> dict:
        return {"mean": mean, "interval": [mean - 0.01, mean + 0.01], "n": 40, "unit": "prompts", "units": 20}

    candidates = [
        {"label": label, "metrics": {metric: estimate(values[place]) for metric, values in METRICS.items()}}
        for place, label in enumerate(("before", "full"))
    ]
    differences = {metric: estimate(after - before) for metric, (before, after) in METRICS.items()}
    results = {"metrics": list(METRICS), "candidates": candidates,
               "differences": [{"label": "full", "base": "before", "metrics": differences}]}  # fmt: skip
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(results))
    (folder / "commands.txt").write_text("bash sd3/train.sh --flag='<b>'\n")
    return folder


def arguments(folder: Path, output: Path, **changed: str) -> list[str]:
    return [
        f"--subject-dir={folder / 'subject'}",
        "--pictures", *changed.get("pictures", f"before={folder / 'before'} full={folder / 'full'}").split(),
        "--run", changed.get("run", f"full={folder / 'run'}"),
        f"--evaluation={changed.get('evaluation', folder / 'evaluation')}",
        f"--commands={folder / 'commands.txt'}", f"--output={output}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(inputs: Path) -> Path:
    output = inputs / "quickstart.html"
    assert page.main(arguments(inputs, output)) == 0
    return output


def rows_of(root: Element) -> dict[str, list[str]]:
    rows = [row.all("td") for row in root.one("table", "figures").all("tr")[1:]]
    return {cells[0].one("b").text: [cell.text for cell in cells[1:]] for cells in rows}


def test_every_picture_is_shown_under_its_prompt_and_model(inputs: Path, made: Path) -> None:
    root = Page(made.read_text(encoding="utf-8")).root
    cards = root.all("section", "prompt")
    assert [card.one("h3").text for card in cards] == list(PROMPTS)  # the subject's first
    for card, prompt in zip(cards, PROMPTS, strict=True):
        labels = [image.attributes["alt"] for image in card.all("img")]
        assert labels == [f"{name}, seed {seed}: {prompt}" for name in ("before", "full") for seed in SEEDS]
        for image, label in zip(card.all("img"), labels, strict=True):
            name, seed = label.split(", seed ")[0], int(label.split("seed ")[1][0])
            with Image.open(inputs / name / recipe(prompt, seed).file_name()) as original:
                assert (np.asarray(image.picture) == np.asarray(original)).all()
    assert len(root.all(cls="subject")[0].all("img")) == 4


def test_the_figures_are_counted_and_the_metrics_judged(made: Path) -> None:
    rows = rows_of(Page(made.read_text(encoding="utf-8")).root)
    assert rows["The subject"] == ["0 of 2", "2 of 2"]
    assert rows["Other prompts"] == ["2 of 2", "2 of 2"]
    assert rows["CLIP-T"] == ["0.2100", "0.3400better"]
    assert rows["DINO"] == ["0.4000", "0.9000better"]


def test_runs_and_commands_are_there_and_nothing_is_fetched(made: Path) -> None:
    text = made.read_text(encoding="utf-8")
    root = Page(text).root
    assert "200 steps in 2 sessions" in root.text
    assert "12.500 images/s, final loss 0.250000" in root.text
    assert root.one("pre").text == "bash sd3/train.sh --flag='<b>'"
    assert all(image.attributes["src"].startswith("data:image/png;base64,") for image in root.all("img"))
    assert not [element for element in root.walk() if element.tag in ("script", "link", "iframe")]
    assert "http" not in text.replace("http-equiv", "")


def test_other_prompts_count_only_with_all_that_they_name(inputs: Path, tmp_path: Path) -> None:
    """The picture of another colour, size, place, number or background is not right."""
    made = recipe("two small red circles, on a white background", 1)
    true = told_by(made.prompt)
    wrong = [replace(true, **{name: value}) for name, value in
             {"colour": "blue", "shape": "star", "background": "black", "count": "three"}.items()]  # fmt: skip
    for number, (scene, right) in enumerate([(true, 1), *((one, 0) for one in wrong)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_picture(to_image(render(scene, random.Random(0))), folder / made.file_name(), made, {})
        assert (figures.world_figures(folder)[-1].right, figures.world_figures(folder)[-1].of) == (right, 1), scene


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pictures": "before=nowhere"}, "--pictures before=nowhere: expected NAME=DIR"),
        ({"pictures": "before"}, "--pictures before: expected NAME=DIR"),
        ({"run": "full={0}/subject"}, "there is no report of a run"),
        ({"evaluation": "nowhere"}, "--evaluation nowhere holds no metrics.json"),
        ({"pictures": "full={0}/full before={0}/before"}, "is of before, full, --pictures of full, before"),
        ({"pictures": "before={0}/subject full={0}/full"}, "was not painted alike by all models"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], message: str
) -> None:
    changed = {name: value.format(inputs) for name, value in changed.items()}
    assert page.main(arguments(inputs, tmp_path / "page.html", **changed)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


if BROWSER:

    @pytest.mark.parametrize("width", [1280, 400])
    def test_the_page_looks_like_something(made: Path, tmp_path: Path, width: int) -> None:
        assert_looks_like_something(made, tmp_path, width)
