"""Whole runs: what is written, what is made again, several processes, and the four scripts as a user starts them."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from painting import SMALL, make_lora
from patching import free_port
from sd3.common.pictures import read_recipe
from sd3.inference.run import generate

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (PROJECT / "sd3").glob("infer_sd3_*.py"))
PROMPTS = ["--prompt=a red dog", "--prompt=a red dog!", "--prompt=a blue cat"]


def flags(model: Path, folder: Path, *more: str) -> list[str]:
    return [f"--model={model}", *SMALL, *PROMPTS, "--seeds", "1", "2", f"--output-dir={folder}", *more]


def pictures(folder: Path) -> dict[str, str]:
    """Hash of each picture's file by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("[!.]*.png"))
        if not path.name.startswith("contact_sheet")
    }


def script(name: str, *arguments: str, cwd: Path, launcher: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, str(PROJECT / "sd3" / name), *arguments], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", **env},
    )  # fmt: skip


def finished(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three prompts and two seeds."""
    folder = tmp_path_factory.mktemp("whole")
    assert generate(flags(tiny_model, folder)) == 0
    return folder


def test_a_run_writes_pictures_a_contact_sheet_and_an_index(whole: Path, tiny_model: Path) -> None:
    assert len(pictures(whole)) == 6
    rows = [json.loads(line) for line in (whole / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["file"] for row in rows] == list(pictures(whole))
    for row in rows:
        recipe = read_recipe(whole / row["file"])
        assert (recipe.prompt, recipe.seed, recipe.model) == (row["prompt"], row["seed"], str(tiny_model.resolve()))
        assert recipe.file_name() == row["file"]
    with Image.open(whole / "contact_sheet.png") as sheet:
        assert sheet.width >= 2 * 128
        assert sheet.height >= 3 * 128
    with Image.open(whole / rows[0]["file"]) as picture:
        assert picture.size == (64, 64)
        assert json.loads(picture.text["versions"])["device"] == "cpu"


def test_only_what_is_missing_is_made(whole: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = pictures(whole)
    first, second, *rest = sorted(before)
    stamps = {name: (whole / name).stat().st_mtime_ns for name in rest}
    (whole / first).unlink()
    (whole / second).unlink()
    assert generate(flags(tiny_model, whole)) == 0
    assert "4 of 6 pictures are there already" in capsys.readouterr().out
    assert pictures(whole) == before
    assert {name: (whole / name).stat().st_mtime_ns for name in rest} == stamps
    assert generate(flags(tiny_model, whole, "--overwrite")) == 0
    assert pictures(whole) == before
    assert all((whole / name).stat().st_mtime_ns > stamp for name, stamp in stamps.items())


def test_other_settings_lie_beside_the_first(tiny_model: Path, tmp_path: Path) -> None:
    one = ["--prompt=a", "--seeds", "1", f"--model={tiny_model}", *SMALL, f"--output-dir={tmp_path}"]
    assert generate(one) == 0
    assert generate([*one, "--steps=2"]) == 0
    assert len(pictures(tmp_path)) == 2
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 2


def test_somebody_elses_file_is_not_replaced(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--prompt=a", "--seeds", "1", f"--model={tiny_model}", *SMALL, f"--output-dir={tmp_path}"]
    assert generate(one) == 0
    (name,) = pictures(tmp_path)
    (tmp_path / name).write_bytes(b"precious")
    assert generate(one) == 2
    assert "exists and was made otherwise; give --overwrite" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b"precious"


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_make_the_same_files(whole: Path, tiny_model: Path, tmp_path: Path, ranks: int) -> None:
    """As on several cards: accelerate starts one process for each, and rank 0 alone talks."""
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={ranks}", "--num_machines=1")
    launcher += (f"--main_process_port={free_port()}", "--mixed_precision=no", "--dynamo_backend=no")
    arguments = flags(tiny_model, tmp_path / "out")
    run = functools.partial(script, "infer_sd3_text2img_distrib.py", cwd=tmp_path, launcher=launcher)
    status, out, err = finished(run(*arguments, ACCELERATE_USE_CPU="true"))
    assert status == 0, err
    assert pictures(tmp_path / "out") == pictures(whole)
    assert out.count("6 pictures made") == 1
    assert "Painting 6/6" in err
    (tmp_path / "out" / min(pictures(whole))).unlink()
    status, out, err = finished(run(*arguments, ACCELERATE_USE_CPU="true"))
    assert status == 0, err
    assert "1 pictures made" in out
    assert pictures(tmp_path / "out") == pictures(whole)


def test_more_processes_than_devices_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sd3.common.devices.count", lambda device: 2 if device == "cuda" else 1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert generate([f"--model={tiny_model}", "--prompt=a", "--device=cuda", f"--output-dir={tmp_path}"]) == 2
    assert "--num_processes=4 is more than the 2 visible cuda devices" in capsys.readouterr().err


def apart(rank: int, port: int, *arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """One of two processes, started by hand: no launcher watches over them, as under srun."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1", **env}
    return script("infer_sd3_text2img_distrib.py", *arguments, cwd=cwd, **environment)


def test_a_process_that_fails_is_heard_and_not_waited_for(tiny_model: Path, tmp_path: Path) -> None:
    """Rank 1 cannot read a weight that rank 0, which has loaded all by then, does not miss."""
    port = free_port()
    arguments = flags(tiny_model, tmp_path / "out", "--device=cpu")
    first = apart(0, port, *arguments, cwd=tmp_path)
    second = apart(1, port, *arguments, cwd=tmp_path, SD3_TEST_FAIL="1", PYTHONPATH=str(PROJECT / "tests" / "failing"))
    _, _, err = finished(second)
    assert "process 1 of 2: " in err
    status, _, err = finished(first, timeout=60)
    assert status == 1
    assert "another process ended early" in err


def test_killed_and_started_again(whole: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = script("infer_sd3_text2img.py", *flags(tiny_model, folder), cwd=tmp_path)
    end = time.monotonic() + 120
    while not pictures(folder):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    finished(process)
    assert pictures(folder).items() <= pictures(whole).items()
    assert generate(flags(tiny_model, folder)) == 0
    assert pictures(folder) == pictures(whole)


def test_ctrl_c_is_no_stack_trace(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sd3.inference.paint.Painter.paint", interrupted)
    assert generate(flags(tiny_model, tmp_path)) == 130
    assert "the same command goes on where this one ended" in capsys.readouterr().err


def test_a_picture_is_made_again_like_another(
    whole: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(pictures(whole))
    like = f"--like={whole / name}"
    assert generate([like, "--device=cpu", f"--output-dir={tmp_path}"]) == 0
    assert "has the same pixels as" in capsys.readouterr().out
    assert pictures(tmp_path)[name] == pictures(whole)[name]
    assert generate([like, "--device=cpu", f"--output-dir={tmp_path}", "--steps=1"]) == 0
    shown = capsys.readouterr()
    assert "this will be another picture" in shown.err
    assert "differs by up to" in shown.out


def test_like_never_replaces_the_original(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the original's own directory, and from another place than the first run's."""
    monkeypatch.chdir(tiny_model.parent)
    one = [f"--model={tiny_model.name}", *SMALL, "--prompt=a", "--seeds", "1", f"--output-dir={tmp_path}"]
    assert generate(one) == 0
    (name,) = pictures(tmp_path)
    before = pictures(tmp_path)[name]
    monkeypatch.chdir(tmp_path)
    assert generate([f"--like={name}", "--device=cpu", "--output-dir=."]) == 0
    again = name.replace(".png", "-again.png")
    assert f"{again} has the same pixels as {name}" in capsys.readouterr().out
    assert pictures(tmp_path) == {name: before, again: before}


def test_a_size_the_model_was_not_made_for(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(flags(tiny_model, tmp_path, "--height=512")) == 2
    assert "--height=512 is more than" in capsys.readouterr().err


def test_like_refuses_a_model_that_has_changed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = shutil.copytree(tiny_model, tmp_path / "model")
    arguments = [f"--model={model}", *SMALL, "--prompt=a", "--seeds", "1", f"--output-dir={tmp_path / 'out'}"]
    assert generate(arguments) == 0
    (name,) = pictures(tmp_path / "out")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("3.0", "2.0"))
    again = [f"--like={tmp_path / 'out' / name}", "--device=cpu", f"--output-dir={tmp_path / 'again'}"]
    assert generate(again) == 2
    assert f"was made with another content of {model}" in capsys.readouterr().err


def test_a_lora_is_named_in_the_picture_and_never_left_out(tiny_model: Path, tmp_path: Path) -> None:
    lora = make_lora(tiny_model, tmp_path / "lora")
    arguments = [f"--model={tiny_model}", *SMALL, "--prompt=a", "--seeds", "1", f"--output-dir={tmp_path / 'out'}"]
    assert generate(arguments) == generate([*arguments, f"--lora={lora}"]) == 0
    recipes = [read_recipe(path) for path in (tmp_path / "out").glob("a-1-*.png")]
    assert {recipe.lora for recipe in recipes} == {"", str(lora)}
    assert len({recipe.lora_hash for recipe in recipes}) == 2
    assert len(set(pictures(tmp_path / "out").values())) == 2
    assert generate([*arguments, f"--lora={tmp_path / 'gone.safetensors'}"]) == 2


def test_the_dtype_is_tried_on_the_device(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError('"slow_conv2d_cpu" not implemented for \'Half\'')

    one = ["--prompt=a", "--seeds", "1", f"--model={tiny_model}", *SMALL, f"--output-dir={tmp_path}"]
    assert generate([*one, "--dtype=bfloat16"]) == 0
    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    assert generate([*one, "--dtype=float16"]) == 2


def test_offload_needs_an_accelerator(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(flags(tiny_model, tmp_path, "--offload")) == 2
    assert "--device=cpu has none" in capsys.readouterr().err


def test_an_output_directory_that_cannot_be_made(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert generate(flags(tiny_model, tmp_path / "file" / "below")) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_image_to_image_from_a_file_and_from_an_address(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((90, 60), 60).convert("RGB").save(tmp_path / "cat.png")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    common = [f"--model={tiny_model}", *SMALL, "--prompt=a", "--seeds", "1", "--strength=0.5"]
    by_file = [*common, f"--image={tmp_path / 'cat.png'}", f"--output-dir={tmp_path / 'file'}"]
    by_address = [*common, f"--image={address}/cat.png", f"--output-dir={tmp_path / 'address'}"]
    assert generate(by_file) == generate(by_address) == 0
    assert pictures(tmp_path / "file").keys() == pictures(tmp_path / "address").keys()
    assert generate([*common, f"--image={address}/none.png"]) == 2
    assert generate([*common, f"--image={address}/my cat.png"]) == 2
    server.shutdown()
    (tmp_path / "text.png").write_text("no picture")
    assert generate([*common, f"--image={tmp_path / 'text.png'}"]) == 2
    assert generate([*common, f"--image={tmp_path / 'none.png'}"]) == 2
    said = capsys.readouterr().err
    for sentence in ("cannot be fetched", "cannot be read as an image", "cannot be read (No such file"):
        assert sentence in said


def test_the_image_script_paints_its_example(tiny_model: Path, tmp_path: Path) -> None:
    """The script's own example, with its picture at hand instead of an address, is cat_wizard.png."""
    Image.effect_noise((64, 64), 60).save(tmp_path / "cat.png")
    text = (PROJECT / "sd3" / "infer_sd3_img2img.py").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("IMAGE = "))
    edited = PROJECT / "build" / "tests" / "scripts" / "infer_sd3_img2img.py"
    edited.parent.mkdir(parents=True, exist_ok=True)
    # One folder deeper than sd3/, so the project is one further up.
    edited.write_text(text.replace(line, f'IMAGE = "{tmp_path}/cat.png"').replace("parents[1]", "parents[3]"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, str(edited), f"--model={tiny_model}", *SMALL, "--output-dir=out"],
        cwd=tmp_path, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert read_recipe(tmp_path / "out" / "cat_wizard.png").strength == 0.6


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_missing_model_from_anywhere(tmp_path: Path, name: str) -> None:
    """As `cd sd3 && python X.py` and by its path from elsewhere."""
    status, out, _ = finished(script(name, "--help", cwd=PROJECT / "sd3"))
    assert status == 0
    assert "--prompts-file FILE" in out
    more = ("--lora=", "--image=") if name != "infer_sd3_img2img.py" else (f"--image={PROJECT / 'none.png'}",)
    status, out, err = finished(script(name, "--model=no/such/place", "--device=cpu", *more, cwd=tmp_path))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "no/such/place is no directory" in err or "none.png cannot be read" in err


def test_a_missing_lora_of_the_lora_script_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    """The published script paints on with the base model."""
    status, _, err = finished(script("infer_sd3_text2img_lora.py", f"--model={tiny_model}", *SMALL, cwd=tmp_path))
    assert status == 2
    assert "--lora=./output/pytorch_lora_weights.safetensors does not exist" in err


def test_a_contact_sheet_shows_each_picture_in_its_place(tmp_path: Path) -> None:
    from sd3.common.pictures import Recipe, save_picture
    from sd3.inference.sheet import MARGIN, ROWS_A_SHEET, write_sheets

    def picture(number: int, seed: int) -> tuple[Path, Recipe]:
        recipe = Recipe(f"p{number}", "", seed, 1, 1.0, 64, 64, "float32", "m", "h")
        colour = (number * 5, seed * 100, 200)
        save_picture(Image.new("RGB", (64, 64), colour), tmp_path / recipe.file_name(), recipe, {})
        return tmp_path / recipe.file_name(), recipe

    shown = [picture(number, seed) for number in range(ROWS_A_SHEET + 1) for seed in (1, 2)]
    sheets = write_sheets(tmp_path, shown)
    assert [path.name for path in sheets] == ["contact_sheet.png", "contact_sheet_2.png"]
    with Image.open(sheets[0]) as sheet:
        column = [sheet.getpixel((MARGIN + 10, y)) for y in range(sheet.height)]
        second = [sheet.getpixel((MARGIN + 128 + MARGIN + 10, y)) for y in range(sheet.height)]
    for number in range(ROWS_A_SHEET):
        assert column.count((number * 5, 100, 200)) == second.count((number * 5, 200, 200)) == 128
    write_sheets(tmp_path, shown[:2])
    assert not sheets[1].exists()
    write_sheets(tmp_path, shown)
    with Image.open(sheets[1]) as sheet:
        assert sheet.getpixel((MARGIN + 10, sheet.height - 2 * MARGIN - 1)) == (ROWS_A_SHEET * 5, 100, 200)
