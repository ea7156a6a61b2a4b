"""The benchmark of the engines: its arithmetic, its refusals, what a run measures, and whole runs of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sd3.common.command_line import UserError
from sd3.common.model_sizes import SIZES
from sd3.native import benchmark, benchmark_run
from sd3.native.benchmark import build_parser, main, plan
from sd3.native.benchmark_figures import as_table, bound, costs, figures, pays_after
from sd3.native.benchmark_run import Case, Clocks, Precomputing, run_case

PROJECT = Path(__file__).resolve().parent.parent
MEDIUM = SIZES["sd3-medium"]


def case(**changes: object) -> Case:
    values = {
        "model": "m", "data": "d", "kind": "lora", "captions": "each", "device": "cpu", "precision": "no",
        "resolution": 512, "pictures": 32, "batch_size": 4, "checkpointing": False, "warm_up": 2, "steps": 5,
    }  # fmt: skip
    return Case(**{**values, **changes})


def planned(*arguments: str) -> tuple[Case, str]:
    return plan(build_parser().parse_args(["--device=cpu", *arguments]))


# By hand, in TFLOP for one picture: transformer forward 1.8026 at 512 and 8.4374 at 1024, VAE 1.1176 and 4.8826,
# T5 0.7154, CLIP 0.1112.
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1 + (1.1176 + 0.8266) / (2 * 1.8026)),
        ({"captions": "one"}, 1 + 1.1176 / (2 * 1.8026)),
        ({"checkpointing": True}, 1 + (1.1176 + 0.8266) / (3 * 1.8026)),
        ({"kind": "full", "resolution": 1024}, 1 + (4.8826 + 0.8266) / (3 * 8.4374)),
        ({"kind": "full", "resolution": 1024, "checkpointing": True}, 1 + (4.8826 + 0.8266) / (4 * 8.4374)),
        ({"kind": "full", "resolution": 1024, "checkpointing": True, "captions": "one"}, 1 + 4.8826 / (4 * 8.4374)),
    ],
)
def test_the_bound_is_a_step_over_a_step_without_vae_and_text_encoders(changes: dict, expected: float) -> None:
    assert bound(costs(MEDIUM, case(**changes))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("model_case", "captions", "known"),
    [("lora", "each", 1.54), ("lora", "one", 1.31), ("full", "each", 1.17), ("full", "one", 1.145)],
)
def test_a_proportional_model_has_the_bound_of_sd3_medium(model_case: str, captions: str, known: float) -> None:
    found, size = planned(f"--case={model_case}", f"--captions={captions}")
    assert bound(costs(SIZES[size], found)) == pytest.approx(known, rel=0.01)


def test_when_the_precompute_has_paid() -> None:
    assert pays_after(3.0, 1.5, 1.0) == 6
    assert pays_after(3.25, 1.5, 1.0) == 7
    assert pays_after(3.0, 1.0, 1.0) is None
    assert pays_after(3.0, 1.0, 1.5) is None


def measured(seconds: float, peak: int, precompute: float = 0.0) -> dict:
    return {"seconds": seconds, "peak_bytes": peak, "precompute_seconds": precompute, "threads": 1, "device": "CPU"}


RUNS = {
    "upstream": [measured(10, 400_000_000), measured(12, 400_000_000), measured(11, 500_000_000)],
    "native": [measured(8, 200_000_000, 3.0), measured(6, 300_000_000, 4.0), measured(10, 250_000_000, 2.0)],
}


def test_the_figures_of_runs() -> None:
    found = figures(MEDIUM, case(), RUNS)
    assert found["step_seconds"] == {"upstream": 11 / 5, "native": 8 / 5}
    assert found["speed"] == pytest.approx({"min": 1.1, "median": 1.25, "max": 2.0})
    assert found["memory"] == pytest.approx({"min": 0.5, "median": 0.5, "max": 0.75})
    assert found["median_over_bound"] == pytest.approx(1.25 / 1.5393, rel=1e-4)
    assert found["precompute"] == {"seconds": 3.0, "paid_after_steps": 5}


def result(**changes: object) -> dict:
    one = case(**changes)
    found = figures(MEDIUM, one, RUNS)
    return {"model": "proportional-512", "case": dataclasses.asdict(one), "runs": RUNS, "figures": found}


def test_the_table_says_what_was_found() -> None:
    lines = as_table(result()).splitlines()
    assert lines[0].startswith("proportional-512, lora, captions: each, 512x512, batch 4, without gradient checkpoint")
    assert "fp32, cpu, threads: 1, 3 pairs of 5 steps after 2" in lines[0]
    assert "| upstream | 1.818 | 1 | 400 | 1 |" in lines
    assert "| native | 2.500 | 1.100, 1.250, 2.000 | 250 | 0.50, 0.50, 0.75 |" in lines
    (limit,) = [line for line in lines if line.startswith("Bound set by arithmetic: 1.539 (")]
    assert "transformer 3605.27, vae 1117.56, text 826.59" in limit
    assert limit.endswith("the median is 81.2% of it, the goal of 95% is missed.")
    assert "Precompute of the native engine: 3.00 s for 32 pictures, paid for after 5 steps." in lines
    assert lines[-1].startswith("Times are the processes' CPU time")


def test_the_goal_of_the_proportional_model_is_the_cpus() -> None:
    good = result(captions="one")  # 1.25 of 1.31
    assert "the goal of 95% is reached." in as_table(good)
    good["case"]["device"] = "cuda"
    assert "goal" not in as_table(good)
    assert "CPU time" not in as_table(good)


def test_utilization_is_of_what_a_step_needs_and_computes() -> None:
    """By hand: SD3 medium at 1024 in full, 4 pictures in 1.6 s: 3 x 8.4374 TFLOP each, 4 x with checkpointing."""
    one = case(kind="full", resolution=1024, checkpointing=True, device="cuda", steps=5)
    runs = {name: [{**run, "device": "NVIDIA H100 80GB HBM3"} for run in found] for name, found in RUNS.items()}
    found = figures(MEDIUM, one, runs)["utilization"]
    assert found["native"]["model"] == pytest.approx(4 * 3 * 8.4374 / 1.6 / 989, rel=1e-3)
    assert found["native"]["hardware"] == pytest.approx(4 * 4 * 8.4374 / 1.6 / 989, rel=1e-3)
    assert found["upstream"]["hardware"] == pytest.approx(4 * (4 * 8.4374 + 4.8826 + 0.8266) / 2.2 / 989, rel=1e-3)
    table = as_table({"model": "sd3-medium", "case": dataclasses.asdict(one), "runs": runs,
                      "figures": figures(MEDIUM, one, runs)})  # fmt: skip
    assert "Of the peak of NVIDIA H100 80GB HBM3, needed and computed: upstream 4.7% and 7.3%, native 6.4% and" in table
    assert figures(MEDIUM, case(), RUNS)["utilization"] is None


def test_a_precompute_that_never_pays_is_said_to() -> None:
    found = result()
    found["figures"]["precompute"]["paid_after_steps"] = None
    assert "3.00 s for 32 pictures, which the steps do not repay." in as_table(found)


@pytest.mark.parametrize(
    ("arguments", "size", "changes"),
    [
        ([], "proportional-512", {"kind": "lora", "resolution": 128, "batch_size": 4, "checkpointing": False}),
        (["--case=full"], "proportional-1024", {"kind": "full", "checkpointing": True}),
        (["--case=full", "--no-gradient-checkpointing"], "proportional-1024", {"checkpointing": False}),
        (["--model=sd3-medium"], "sd3-medium", {"resolution": 512, "batch_size": 8, "precision": "no"}),
        (["--model=sd3-medium", "--case=full"], "sd3-medium", {"resolution": 1024, "batch_size": 4}),
        (["--model=sd3.5-large", "--precision=bf16"], "sd3.5-large", {"resolution": 512, "precision": "bf16"}),
        (["--model=tiny", "--batch-size=1", "--pictures=3"], "tiny", {"batch_size": 1, "pictures": 3}),
    ],
)
def test_the_case_that_flags_ask_for(arguments: list[str], size: str, changes: dict) -> None:
    found, name = planned(*arguments)
    assert name == size
    assert dataclasses.replace(found, **changes) == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pairs=0"], "--pairs=0 is too few"),
        (["--warm-up=0"], "--warm-up=0 is too few"),
        (["--batch-size=0"], "--batch-size=0 is too few"),
        (["--pictures=6"], "--pictures=6 is no multiple of the batch of 4"),
        (["--resolution=256"], "a proportional model has its proportions at 128"),
        (["--model=tiny", "--resolution=100"], "--resolution=100 is no multiple of 16 from 64 to 384"),
        (["--model=tiny", "--resolution=512"], "--resolution=512 is no multiple of 16 from 64 to 384"),
        (["--precision=fp16"], "--precision=fp16: accelerate refuses it on a CPU"),
        (["--model=large"], "invalid choice: 'large'"),
        (["--step=3"], "unrecognized arguments: --step=3"),
    ],
)
def test_one_sentence_for_each_mistake(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device=cpu", *arguments], Path("unused")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_without_the_patched_scripts_it_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "patches").symlink_to(PROJECT / "patches")
    monkeypatch.setattr(benchmark, "PROJECT", tmp_path)
    assert main(["--device=cpu"], Path("unused")) == 3
    error = capsys.readouterr().err
    assert "(there is no checkout at " in error
    assert error.endswith("run: bash setup_env.sh\n")


@pytest.mark.parametrize(("kind", "captions"), [("lora", "each"), ("full", "one")])
def test_both_engines_get_the_same_flags_and_know_them(kind: str, captions: str, tmp_path: Path) -> None:
    from sd3.native.options import parse

    one = case(kind=kind, captions=captions, checkpointing=kind == "full")
    upstream, native = (one.arguments(engine, tmp_path) for engine in ("upstream", "native"))
    assert native == [*upstream, f"--precompute_dir={tmp_path / 'precomputed'}"]
    options = parse(kind, native)
    assert (options.train_batch_size, options.resolution, options.max_train_steps) == (4, 512, 7)
    assert options.gradient_checkpointing is one.checkpointing
    assert (options.caption_column, options.instance_data_dir) == (
        ("text", None) if captions == "each" else (None, "d")
    )


def test_kept_data_have_a_caption_of_its_own_for_each_picture(tmp_path: Path) -> None:
    folder = benchmark._pictures(tmp_path, case(pictures=5, resolution=64))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == sorted(file.name for file in folder.glob("*.png"))
    assert len({row["text"] for row in rows}) == 5
    plain = benchmark._pictures(tmp_path, case(pictures=5, resolution=64, captions="one"))
    assert {file.suffix for file in plain.iterdir()} == {".png"}


def test_a_kept_model_of_another_size_is_refused(tmp_path: Path) -> None:
    made = benchmark._model(tmp_path, "tiny")
    assert benchmark._model(tmp_path, "tiny") == made
    made.rename(tmp_path / "model-proportional-512")
    with pytest.raises(UserError, match="is of another size than proportional-512"):
        benchmark._model(tmp_path, "proportional-512")


SCRIPT = """
import sys, time, torch
from pathlib import Path
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.5)
for step in range(1, int({steps}) + 1):
    weight.grad = torch.ones(1)
    try:
        optimizer.step()
    except Exception:
        pass
    Path({record!r}).write_text(f"{{step + 1}}")
sys.exit({status})
"""


class Scripted:
    """Clocks that show each time a second more on the wall and two more of the process."""

    def __init__(self, device: torch.device) -> None:
        self.reading = 0
        self.counting = Clocks(device).counting

    def now(self) -> tuple[float, float]:
        self.reading += 1
        return float(self.reading), 2.0 * self.reading


def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, status: int = 0) -> Path:
    """A script that makes so many steps, in the place of the engines' own; returns where it notes the next one."""
    record = tmp_path / "next"
    (tmp_path / "script.py").write_text(SCRIPT.format(steps=steps, status=status, record=str(record)))
    monkeypatch.setattr(benchmark_run, "FOLDERS", {"upstream": tmp_path})
    monkeypatch.setattr(benchmark_run, "SCRIPTS", {"lora": "script.py"})
    monkeypatch.setattr(benchmark_run, "Clocks", Scripted)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return record


def test_a_run_ends_after_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = scripted(tmp_path, monkeypatch, steps=100)
    found = run_case(case(), "upstream", tmp_path)
    assert record.read_text() == "7"  # the seventh step is the last of 2 + 5
    assert (found.seconds, found.wall_seconds, found.cpu_seconds) == (2.0, 1.0, 2.0)
    assert (found.pictures, found.precompute_seconds, found.threads) == (20, 0.0, torch.get_num_threads())


def test_a_script_that_ends_early_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(tmp_path, monkeypatch, steps=6)
    with pytest.raises(UserError, match=r"script.py ended after 6 of 7 steps\."):
        run_case(case(), "upstream", tmp_path)


def test_a_script_that_refuses_keeps_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(tmp_path, monkeypatch, steps=1, status=3)
    with pytest.raises(SystemExit) as raised:
        run_case(case(), "upstream", tmp_path)
    assert raised.value.code == 3


def test_the_time_of_the_precompute_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from sd3.native.precompute import Precompute

    monkeypatch.setattr(Precompute, "latents", lambda self, views: ["key"])
    monkeypatch.setattr(Precompute, "prompts", lambda self, captions, dtype, t5_tokens: ["other"])
    found = Precomputing(Scripted(torch.device("cpu")))
    found.watch()
    nothing = object.__new__(Precompute)
    assert nothing.latents([]) == ["key"]
    assert nothing.prompts([], torch.float32, 77) == ["other"]
    assert found.seconds == 4.0


@pytest.mark.upstream
@pytest.mark.long
@pytest.mark.parametrize(("kind", "captions"), [("lora", "each"), ("full", "one")])
def test_a_whole_run(kind: str, captions: str, tmp_path: Path, upstream_checkout: Path) -> None:
    output = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, str(PROJECT / "sd3" / "benchmark_engines.py"), "--model=tiny", "--device=cpu"),
            *(f"--case={kind}", f"--captions={captions}", "--pairs=2", "--steps=2", "--warm-up=1"),
            *(f"--keep={tmp_path / 'kept'}", f"--output={output}"),
        ],
        text=True, capture_output=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert as_table(found) in done.stdout
    for engine, runs in found["runs"].items():
        assert len(runs) == 2
        for run in runs:
            assert min(run["seconds"], run["wall_seconds"], run["peak_bytes"]) > 0
            assert (run["pictures"], run["threads"]) == (4, 1)
            # Each native run begins with an empty cache.
            assert (run["precompute_seconds"] > 0) is (engine == "native")
    assert found["figures"]["bound"] == pytest.approx(bound(costs(SIZES["tiny"], planned_as(found["case"]))))
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"model-tiny", f"pictures-4-64-{captions}"}


def planned_as(fields: dict) -> Case:
    return Case(model="", data="", **fields)
