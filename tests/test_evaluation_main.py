"""The whole evaluation: flags in, metrics.json, table and report out; every refusal in one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from browser import BROWSER, assert_looks_like_something
from evaluation_page import Element, Page
from evaluation_parts import FakeInference, fill, make_feature_models
from painting import SMALL, make_lora
from prepared import prepared
from sd3.common.pictures import pictures_in
from sd3.evaluation import report
from sd3.evaluation.candidates import align, read_folder
from sd3.evaluation.main import main
from sd3.evaluation.metrics import kid
from sd3.evaluation.options import Defaults
from sd3.evaluation.table import cell, number, verdict

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = PROJECT / "sd3" / "evaluate_sd3.py"
PROMPTS = ["a photo of sks dog", 'sks dog & <script>alert("x")</script> {{ 7 * 7 }}']
SEEDS = [8, 23, 42]


@pytest.fixture(scope="module")
def models() -> Path:
    return prepared("feature-models", make_feature_models)


@pytest.fixture(scope="module")
def defaults(models: Path) -> Defaults:
    return Defaults(
        str(models / "clip"), str(models / "vit"), str(models / "dinov2"), "object", "sks dog", SEEDS, "eval_result"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("pictures")
    return [str(fill(root / name, PROMPTS, SEEDS, tag=name)) for name in ("base", "tuned")]


@pytest.fixture(scope="module")
def evaluated(folders: list[str], defaults: Defaults, dog_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "new" / "folder"
    status = main(
        ["--pictures", *folders, f"--subject-dir={dog_dir}", f"--reference-dir={dog_dir}", f"--output-dir={output}",
         "--device=cpu"], defaults,
    )  # fmt: skip
    assert status == 0
    return output


def metrics_of(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def test_metrics_hold_means_intervals_and_numbers(evaluated: Path) -> None:
    found = metrics_of(evaluated)
    assert found["metrics"] == ["clip-t", "clip-i", "dino", "kid", "fid"]
    assert [candidate["label"] for candidate in found["candidates"]] == ["base", "tuned"]
    for candidate in found["candidates"]:
        assert list(candidate["metrics"]) == found["metrics"]
        for name, estimate in candidate["metrics"].items():
            assert (estimate["n"], estimate["unit"], estimate["units"]) == (6, "prompts", 2)
            if name == "fid":
                assert estimate["interval"] is estimate["interval_method"] is None
            else:
                how = "jackknife over prompts and references" if name == "kid" else "bootstrap over prompts"
                assert estimate["interval_method"] == how
                assert estimate["interval"][0] <= estimate["mean"] <= estimate["interval"][1]
        assert (candidate["steps"], candidate["model_hash"]) == (28, "a" * 64)
    for model in found["feature_models"].values():
        assert re.fullmatch("[0-9a-f]{64}", model["sha256_of_weights_and_configuration"])
    assert found["versions"]["torchmetrics"] == "1.9.0"
    assert found["settings"]["seeds"] == SEEDS


def test_a_difference_is_that_of_pairs(evaluated: Path) -> None:
    found = metrics_of(evaluated)
    (difference,) = found["differences"]
    for name, estimate in difference["metrics"].items():
        base, tuned = (candidate["metrics"][name]["mean"] for candidate in found["candidates"])
        assert estimate["mean"] == pytest.approx(tuned - base)
    for name in ("clip-t", "clip-i", "dino"):
        means = [prompt["candidates"][1]["metrics"][name]["mean"] for prompt in found["prompts"]]
        assert np.mean(means) == pytest.approx(found["candidates"][1]["metrics"][name]["mean"])
        for prompt in found["prompts"]:
            estimate = prompt["differences"][0]["metrics"][name]
            assert (estimate["units"], estimate["interval_method"]) == (3, "bootstrap over pictures")


def test_the_figures_are_those_of_the_library_used_by_hand(evaluated: Path, folders: list[str], models: Path) -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(models / "clip").eval(), CLIPProcessor.from_pretrained(models / "clip")
    pictures = [(path, recipe) for path, recipe in pictures_in(Path(folders[1])) if recipe.prompt == PROMPTS[0]]
    inputs = processor(
        text=["a photo of dog"], images=[Image.open(path).convert("RGB") for path, _ in pictures], return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**inputs)
    expected = (out.image_embeds @ out.text_embeds.T).mean().item()
    prompt = next(prompt for prompt in metrics_of(evaluated)["prompts"] if prompt["prompt"] == PROMPTS[0])
    assert prompt["clip_text"] == "a photo of dog"
    assert prompt["candidates"][1]["metrics"]["clip-t"]["mean"] == pytest.approx(expected, abs=1e-5)


def test_a_second_run_gives_the_same_files_from_the_cache(
    evaluated: Path, folders: list[str], defaults: Defaults, dog_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for kind in ("ClipModel", "ClassTokenModel"):
        monkeypatch.setattr(f"sd3.evaluation.feature_models.{kind}.embed", None)  # calling it would fail
    arguments = ["--pictures", *folders, f"--subject-dir={dog_dir}", f"--reference-dir={dog_dir}", "--device=cpu",
                 f"--output-dir={tmp_path}", f"--cache-dir={evaluated / '.features'}"]  # fmt: skip
    assert main(arguments, defaults) == 0
    assert (tmp_path / "metrics.json").read_bytes() == (evaluated / "metrics.json").read_bytes()
    assert (tmp_path / "report.html").read_bytes() == (evaluated / "report.html").read_bytes()
    printed = capsys.readouterr()
    assert re.search(r"^CLIP-T +higher +\S+ \[", printed.out, re.MULTILINE)
    assert "far too high" in printed.out
    assert len(set(re.findall(r"(\w+):\s+\d+%", printed.err))) == 1  # one progress bar


@pytest.fixture
def page(evaluated: Path) -> Element:
    return Page((evaluated / "report.html").read_text(encoding="utf-8")).root


def test_the_report_is_one_file_that_asks_for_nothing(evaluated: Path, page: Element) -> None:
    text = (evaluated / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object", "base", "form"} & {each.tag for each in page.walk()}
    for each in page.walk():
        assert not [name for name in each.attributes if name.startswith("on")]
        for name in {"src", "href", "srcset", "data", "action", "poster"} & set(each.attributes):
            assert (each.tag, name) == ("img", "src")
            assert each.picture.width > 0
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r'src="data:[^"]*"', "", text))


def test_the_report_fits_phones_and_dark_screens(page: Element) -> None:
    metas = {each.attributes.get("name"): each.attributes.get("content") for each in page.all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    css = page.one("style").text
    light, dark = (dict(re.findall(r"(--\w[\w-]*): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", css))
    assert "@media (prefers-color-scheme: dark) { :root" in css
    assert light.keys() == dark.keys() > {"--page", "--ink", "--c0"}
    assert all(light[name] != dark[name] for name in light)
    assert "@media (max-width: 560px)" in css
    assert not re.search(r"[^-]width: \d{3,}px", css)  # nothing that a phone could not hold


def check_figures(box: Element, candidates: list[dict], differences: list[dict], metric: str) -> None:
    """Every candidate with its figure and interval, as text and drawn to scale; every difference with its verdict."""
    rows = box.all(cls="row")
    assert [row.one(cls="label").text for row in rows] == [each["label"] for each in candidates]
    for row, candidate in zip(rows, candidates, strict=True):
        estimate = candidate["metrics"][metric]
        assert row.one("b").text == minus(number(estimate["mean"]))
        dot = float(row.one(cls="dot").style["left"].rstrip("%"))
        assert 0 < dot < 100
        if estimate["interval"] is None:
            assert not row.all(cls="interval") + row.all(cls="range")
            continue
        assert row.one(cls="interval").text == minus(" to ".join(map(number, estimate["interval"])))
        left, width = (float(row.one(cls="range").style[name].rstrip("%")) for name in ("left", "width"))
        low, high = estimate["interval"]
        assert 0 < left <= dot <= left + width < 100
        assert (dot - left) / width == pytest.approx((estimate["mean"] - low) / (high - low), abs=0.01)
    for part, difference in zip(box.all(cls="difference"), differences, strict=True):
        assert part.one(cls="badge").text == verdict(metric, difference["metrics"][metric])
        assert part.one(cls="interval").text == minus(cell(difference["metrics"][metric], signed=True))


def minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def test_the_report_has_every_figure_of_every_candidate(evaluated: Path, page: Element) -> None:
    found = metrics_of(evaluated)
    assert page.one("h1").text == "base against tuned"
    cards = page.one(cls="cards").all("section")
    assert [card.one("h3").text for card in cards] == ["CLIP-T", "CLIP-I", "DINO", "KID", "FID"]
    for card, metric in zip(cards, found["metrics"], strict=True):
        check_figures(card, found["candidates"], found["differences"], metric)
    prompts = page.all("section", "prompt")
    for box, prompt in zip(prompts, found["prompts"], strict=True):
        parts = [part for part in box.one(cls="metrics").inside if isinstance(part, Element)]
        assert [part.one("h4").text for part in parts] == ["CLIP-T", "CLIP-I", "DINO"]
        for part, metric in zip(parts, found["metrics"], strict=False):
            check_figures(part, prompt["candidates"], prompt["differences"], metric)
    assert {badge.text for badge in page.all(cls="badge")} == {"too few prompts", "too few pictures", "no interval"}
    assert [note.text for note in page.one(cls="notes").all("li")] == found["notes"]


def test_the_report_shows_every_picture_in_its_place(evaluated: Path, page: Element, folders: list[str]) -> None:
    """The very pixels, as far as JPEG keeps them: a picture under another's name would be the worst of errors."""
    originals = {
        (folder.name, recipe.prompt, recipe.seed): path
        for folder in map(Path, folders)
        for path, recipe in pictures_in(folder)
    }
    boxes = page.all("section", "prompt")
    assert {box.one("h3").text for box in boxes} == set(PROMPTS)
    shown = {}
    for box in boxes:
        for column, label in zip(box.one(cls="columns").all(cls="pictures"), ("base", "tuned"), strict=True):
            for figure in column.all("figure"):
                seed, image = int(figure.one("figcaption").text), figure.one("img")
                assert image.attributes["alt"] == f"{label}, seed {seed}: {box.one('h3').text}"
                shown[label, box.one("h3").text, seed] = image.picture
    assert shown.keys() == originals.keys()

    def distance(image: Image.Image, path: Path) -> float:
        with Image.open(path) as original:
            return float(np.abs(np.asarray(image, float) - np.asarray(original.convert("RGB"), float)).mean())

    for key, image in shown.items():
        assert min(originals, key=lambda other: distance(image, originals[other])) == key
    assert len(page.one(cls="subject").all("img")) == 5


if BROWSER:

    @pytest.mark.parametrize("width", [1280, 400])
    def test_the_report_looks_like_something(evaluated: Path, tmp_path: Path, width: int) -> None:
        assert_looks_like_something(evaluated / "report.html", tmp_path, width)


def test_beyond_its_room_the_report_has_figures_alone(
    evaluated: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_THUMBNAILS", 6)
    sets = align([read_folder(Path(folder).name, Path(folder)) for folder in folders])
    page = Page(report.render(metrics_of(evaluated), sets, [])).root
    assert len(page.all("img")) == 6
    assert "No pictures here" in page.text


def test_candidates_are_painted_and_compared_with_a_folder(
    folders: list[str], defaults: Defaults, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS).replace("sks dog", "{subject}"), encoding="utf-8")
    inference = FakeInference()
    status = main(
        ["--pictures", folders[1], "--candidate=label=new,model=models/base", f"--prompt-set={prompts}", "--seeds",
         "8", "23", "42", "--steps=7", "--painting-batch-size=2", "--local-files-only", "--base=new", "--device=cpu",
         f"--output-dir={tmp_path / 'out'}"], defaults, inference,
    )  # fmt: skip
    assert status == 0
    assert {"--steps=7", "--batch-size=2", "--device=cpu", "--local-files-only"} < set(inference.calls[0])
    found = metrics_of(tmp_path / "out")
    assert [candidate["label"] for candidate in found["candidates"]] == ["new", "tuned"]
    assert found["metrics"] == ["clip-t"]
    assert "note: kid was left out: it needs --reference-dir or --dataset." in capsys.readouterr().out


def test_the_real_models_are_painted_side_by_side(
    tiny_model: Path, defaults: Defaults, dog_dir: Path, tmp_path: Path
) -> None:
    """Base and LoRA through the inference code itself; the second time nothing is painted."""
    lora = make_lora(tiny_model, tmp_path / "lo,ra")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of {subject}\na sketch of {subject}\n")
    arguments = [
        f"--candidate=label=base,model={tiny_model}",
        f"--candidate=label=LoRA,model={tiny_model},lora={str(lora).replace(',', chr(92) + ',')}",
        f"--prompt-set={prompts}", "--seeds", "8", "23", f"--subject-dir={dog_dir}", f"--output-dir={tmp_path / 'out'}",
        "--painting-batch-size=2", *SMALL,
    ]  # fmt: skip
    assert main(arguments, defaults) == 0
    found = metrics_of(tmp_path / "out")
    assert [bool(candidate["lora_hash"]) for candidate in found["candidates"]] == [False, True]
    assert [candidate["pictures"] for candidate in found["candidates"]] == [4, 4]
    assert found["differences"][0]["metrics"]["dino"]["mean"] != 0
    assert not [note for note in found["notes"] if "painted with different" in note]
    painted = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").glob("*/*-*-*.png")}
    assert len(painted) >= 8
    assert main(arguments, defaults) == 0
    assert {path: path.stat().st_mtime_ns for path in painted} == painted
    make_lora(tiny_model, lora.parent, rank=8)  # trained again into the same place
    assert main(arguments, defaults) == 0
    after = metrics_of(tmp_path / "out")["candidates"]
    assert after[0] == found["candidates"][0]
    assert after[1]["lora_hash"] != found["candidates"][1]["lora_hash"]
    assert {path: path.stat().st_mtime_ns for path in painted} == painted


def test_what_the_inference_code_refuses_ends_the_evaluation(
    defaults: Defaults, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--candidate=label=a,model={tmp_path / 'gone'}", f"--output-dir={tmp_path}", *SMALL], defaults) == 2
    assert capsys.readouterr().err.startswith(f"--model={tmp_path / 'gone'} is no directory and no hub name")


def test_a_data_set_gives_prompts_and_references(
    defaults: Defaults, pokemon_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inference, kid_of = FakeInference(), Mock(wraps=kid)
    monkeypatch.setattr("sd3.evaluation.results.kid", kid_of)
    status = main(
        [f"--dataset={pokemon_dir}", "--held-out=0.5", "--split-seed=1", "--candidate=label=a,model=m",
         f"--output-dir={tmp_path}", "--device=cpu"], defaults, inference,
    )  # fmt: skip
    assert status == 0
    found = metrics_of(tmp_path)
    assert found["metrics"] == ["clip-t", "kid", "fid"]
    assert len(found["split"]["rows"]) == 4
    assert {prompt["prompt"] for prompt in found["prompts"]} == set(found["split"]["captions"])
    assert found["settings"]["reference_pictures"] == 4
    _, references, prompts, captions = kid_of.call_args.args
    assert len(references) == 4 and captions.tolist() == found["split"]["captions"]
    assert set(prompts) == set(captions)
    assert main([f"--dataset={pokemon_dir}", f"--training-split={tmp_path / 'train'}"], defaults) == 0
    assert main([f"--dataset={pokemon_dir}", f"--training-split={tmp_path / 'train'}"], defaults) == 2


def test_the_status_of_failed_painting_is_kept(defaults: Defaults, tmp_path: Path) -> None:
    arguments = ["--candidate=label=a,model=m", f"--output-dir={tmp_path}", "--device=cpu"]
    assert main(arguments, defaults, FakeInference(status=3)) == 3


PICTURES = ["--pictures", "{base}"]
REFUSALS = [
    ([], "nothing to compare"),
    (["--nonsense"], "--nonsense"),
    ([*PICTURES, "--batch-size=0"], "--batch-size=0 is too small; give at least 1"),
    ([*PICTURES, "--batch-size=many"], "--batch-size: invalid int value: 'many'"),
    ([*PICTURES, "--resamples=3"], "--resamples=3 is too small"),
    ([*PICTURES, "--metrics=clip-t,beauty"], "'beauty' is not known; give some of clip-t,clip-i,dino,kid,fid"),
    ([*PICTURES, "--metrics=clip-i"], "clip-i needs --subject-dir"),
    ([*PICTURES, "--metrics=fid"], "fid needs --reference-dir or --dataset"),
    ([*PICTURES, "--steps=3"], "--steps is for pictures that are painted here"),
    ([*PICTURES, "--seeds", "3"], "--seeds is for pictures that are painted here"),
    (["--candidate=label=a,model=m", "--seeds", "-3"], "--seeds: -3 is out of range"),
    ([*PICTURES, "--label", "a", "b"], "--label has 2 names and --pictures 1 folders"),
    ([*PICTURES, "{base}"], "the label 'base' is there twice"),
    ([*PICTURES, "--base=x"], "--base=x is none of the candidates; give one of base"),
    ([*PICTURES, "--dataset={pokemon}", "--held-out=1"], "--held-out=1 is out of range"),
    ([*PICTURES, "--held-out=0.2"], "--held-out is about a data set"),
    ([*PICTURES, "--dataset={pokemon}", "--reference-dir={dog}"], "exclude each other"),
    (["--candidate=label=a,model=m", "--dataset={pokemon}", "--prompt-set=object"], "exclude each other"),
    ([*PICTURES, "--dataset={pokemon}"], "--held-out=0.1 gives 1 reference picture"),
    ([*PICTURES, "--subject-dir={empty}"], "holds no pictures"),
    ([*PICTURES, "--clip-model={empty}"], "holds no config.json"),
    ([*PICTURES, "--output-dir={file}"], "cannot be made"),
    ([*PICTURES, "--cache-dir={file}"], "name another --cache-dir"),
    (["--pictures", "{empty}"], "no PNG file with a recipe"),
    (["--pictures", "{corrupt}"], "cannot be read as a picture"),
    ([*PICTURES, "--device=tpu"], "invalid choice: 'tpu'"),
]


@pytest.mark.parametrize(("arguments", "why"), REFUSALS, ids=[why for _, why in REFUSALS])
def test_bad_input_is_refused_in_one_sentence(
    arguments: list[str], why: str, folders: list[str], defaults: Defaults, dog_dir: Path, pokemon_dir: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    corrupt = fill(tmp_path / "corrupt", PROMPTS[:1], [8])
    (picture,) = corrupt.iterdir()
    picture.write_bytes(picture.read_bytes()[:-800])
    places = {"base": folders[0], "dog": dog_dir, "pokemon": pokemon_dir, "empty": tmp_path / "empty",
              "file": tmp_path / "file", "corrupt": corrupt}  # fmt: skip
    assert main([argument.format(**places) for argument in arguments], defaults, FakeInference()) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert printed.out == ""
    assert not (tmp_path / "eval_result" / "metrics.json").exists()


@pytest.mark.parametrize("cut", [200, 1000])
def test_a_cut_picture_among_whole_ones_is_named(
    defaults: Defaults, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    """Left out, the figures would be of other pictures than the user believes."""
    fill(tmp_path / "a", PROMPTS, SEEDS)
    victim = sorted((tmp_path / "a").iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:-cut])
    assert main([f"--pictures={tmp_path / 'a'}", f"--output-dir={tmp_path / 'out'}", "--device=cpu"], defaults) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert line.startswith(f"{victim} cannot be read as a picture")


def test_a_device_that_is_not_there_ends_with_2(
    folders: list[str], defaults: Defaults, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sd3.common.devices.count", lambda device: int(device == "cpu"))
    assert main(["--pictures", folders[0], "--device=npu", f"--output-dir={tmp_path}"], defaults) == 2
    assert capsys.readouterr().err == "--device=npu: no npu device is visible; use --device=auto.\n"


def test_figures_are_short_and_judged_with_care() -> None:
    assert [number(value) for value in (0.31234, 1.23456, 12.3456, 1234.56)] == ["0.3123", "1.235", "12.35", "1234.6"]
    sure = {"interval": [0.1, 0.2], "n": 40, "unit": "prompts", "units": 10}
    assert [verdict(metric, sure) for metric in ("clip-t", "kid")] == ["better", "worse"]
    assert verdict("clip-t", {**sure, "interval": [-0.1, 0.2]}) == "unclear"
    assert verdict("clip-t", {**sure, "units": 9}) == "too few prompts"  # however many pictures they have
    assert verdict("clip-t", {**sure, "n": 9, "unit": "pictures", "units": 9}) == "too few pictures"
    assert verdict("fid", {**sure, "interval": None}) == "no interval"


def run_script(
    *arguments: str, python: str = sys.executable, cwd: Path, script: Path = SCRIPT
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in {"SD3_REEXECUTED", "PYTHONPATH"}}
    return subprocess.run(
        [python, str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_script_runs_from_anywhere(tmp_path: Path, folders: list[str], models: Path) -> None:
    result = run_script(
        "--pictures", folders[0], f"--clip-model={models / 'clip'}", "--device=cpu", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "eval_result" / "report.html").is_file()
    assert metrics_of(tmp_path / "eval_result")["metrics"] == ["clip-t"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A copy of the project without an environment, and beside it, in `bare`, a Python without packages."""
    shutil.copytree(PROJECT / "sd3", tmp_path / "project" / "sd3", ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(tmp_path / "bare", with_pip=False)
    return tmp_path / "project"


def run_bare(project: Path) -> subprocess.CompletedProcess[str]:
    bare, script = project.parent / "bare" / "bin" / "python", project / "sd3" / "evaluate_sd3.py"
    return run_script("--help", python=str(bare), cwd=project.parent, script=script)


def test_another_python_goes_on_in_the_projects(elsewhere: Path) -> None:
    (elsewhere / "build").mkdir()
    (elsewhere / "build" / "venv.path").write_text(f"{sys.prefix}\n")
    result = run_bare(elsewhere)
    assert result.returncode == 0
    assert f"going on with {Path(sys.prefix) / 'bin' / 'python'}" in result.stderr
    assert "--pictures" in result.stdout


def test_without_an_environment_it_says_what_is_missing_and_how_to_make_one(elsewhere: Path) -> None:
    result = run_bare(elsewhere)
    assert (result.returncode, result.stdout) == (3, "")
    assert f"run: bash {elsewhere / 'setup_env.sh'}" in result.stderr
    assert {"torch", "torchmetrics", "pyarrow", "datasets"} <= set(re.findall(r"\w+", result.stderr))


def test_help_has_every_flag_with_its_meaning(tmp_path: Path) -> None:
    result = run_script("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert {"--pictures", "--candidate", "--metrics", "--subject-dir"} <= set(re.findall(r"--[a-z-]+", result.stdout))
    assert list(tmp_path.iterdir()) == []
