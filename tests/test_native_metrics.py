"""What a run tells about itself: counted work, the device's peak, speeds, and where the time goes."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from native_parts import options
from native_runs import finished, forked, log_of
from sd3.common.model_parts import make_transformer
from sd3.common.model_sizes import SIZES
from sd3.native import metrics as metrics_module
from sd3.native.loop import work
from sd3.native.metrics import Metrics, Reading
from sd3.native.profile import WARM_UP, Profile
from sd3.native.utilization import device_name, peak_of, work_of

TEXT_TOKENS = 154


# ---- utilization


@pytest.fixture(scope="module")
def medium() -> dict[str, object]:
    """SD3 medium's transformer, by its configuration."""
    with torch.device("meta"):
        return dict(make_transformer(SIZES["sd3-medium"]).config)


@pytest.mark.parametrize(
    ("resolution", "lora", "expected"), [(1024, False, 25.3e12), (1024, True, 16.9e12), (512, False, 5.4e12)]
)
def test_sd3_medium_costs_what_was_counted_by_hand(
    medium: dict[str, object], resolution: int, lora: bool, expected: float
) -> None:
    assert work_of(medium, resolution, TEXT_TOKENS, lora) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("flags", [(), ("--with_prior_preservation", "--class_data_dir=c", "--class_prompt=a thing")])
def test_a_sample_costs_what_its_pictures_do(flags: tuple[str, ...]) -> None:
    with torch.device("meta"):
        transformer = make_transformer(SIZES["tiny"])
    trained = types.SimpleNamespace(parts={"transformer": transformer}, lora=True)
    found = work(options("--resolution=64", "--gradient_checkpointing", *flags), trained)
    assert found == (2 if flags else 1) * work_of(dict(transformer.config), 64, TEXT_TOKENS, True)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("Ascend910B3", 313e12),
        ("ASCEND910B1", 414e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", None),
        ("Ascend910B2C", None),
        ("NVIDIA GeForce RTX 3090", None),
        ("CPU", None),
    ],
)
def test_peaks_are_found_by_the_devices_own_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_cpu_calls_itself_cpu() -> None:
    assert device_name(torch.device("cpu")) == "CPU"


# ---- speeds


class Clock:
    """A time of day that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now


class Board:
    """TensorBoard's tracker; `told` holds (name, value, step, wall time)."""

    name = "tensorboard"

    def __init__(self) -> None:
        self.told: list[tuple[str, float, int, float]] = []
        self.flushed = 0
        self.writer = self

    def add_scalar(self, name: str, value: float, step: int, walltime: float) -> None:
        self.told.append((name, value, step, walltime))

    def flush(self) -> None:
        self.flushed += 1


class OtherTracker:
    """Any other tracker."""

    name = "wandb"

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((values, step))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(metrics_module, "time", made)
    return made


class Accelerator(types.SimpleNamespace):
    """Two ranks; the other one's losses are 1 higher."""

    num_processes, is_local_main_process, mixed_precision = 2, True, "bf16"

    def reduce(self, losses: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "mean"
        return (losses + (losses + 1)) / 2


def made(device: str, first: int = 0) -> tuple[Metrics, Board, OtherTracker]:
    trackers = Board(), OtherTracker()
    cost = 39e12
    return Metrics(Accelerator(trackers=list(trackers)), 8, cost, device, first, 10), *trackers


def scalars(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.tensor, values))


@pytest.mark.parametrize(("precision", "norm"), [("bf16", math.inf), ("fp16", 0.0)])
def test_an_overflow_is_told_and_in_fp16_no_fault(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, precision: str, norm: float
) -> None:
    monkeypatch.setattr(Accelerator, "mixed_precision", precision)
    metrics, *_ = made("CPU")
    for step, found in enumerate((1.0, math.inf, math.nan), start=1):
        metrics.add(step, 0, *scalars(0.5, found), 1e-3)
    clock.now += 1
    assert metrics.read()[1].gradient_norm == norm
    assert ("2 of the last 3 steps were skipped" in caplog.text) == (precision == "fp16")
    metrics.close()


def test_a_reading_covers_the_steps_since_the_one_before(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, board, other = made("NVIDIA A100-SXM4-80GB", first=3)
    assert metrics.read() == []
    metrics.add(4, 24, *scalars(0.5, 3.0), 1e-3)
    metrics.add(5, 32, *scalars(1.5, 3.0), 2e-3)
    clock.now += 8  # 4 s a step, 2 pictures a second
    assert metrics.read() == [Reading(4, 24, 1.0, 3.5), Reading(5, 32, 2.0, 3.5)]
    # 2 samples a second of 39 TFLOP each on two devices of 312 TFLOP a second.
    values = {"lr": 1e-3, "images": 8, "images_per_second": 2.0, "utilization": pytest.approx(0.125)}
    values |= {"gradient_norm": 3.5}
    assert other.told == [(values | {"loss": 1.0}, 4), (values | {"loss": 2.0, "lr": 2e-3}, 5)]
    assert ("loss", 1.0, 4, 104.0) in board.told and ("loss", 2.0, 5, 108.0) in board.told
    assert {name for name, *_ in board.told} == set(values) | {"loss"} and board.flushed == 2
    metrics.add(6, 40, *scalars(2.5, 3.0), 3e-3)
    clock.now += 2
    assert metrics.read() == [Reading(6, 40, 3.0, 3.5)]
    assert other.told[-1][0]["images_per_second"] == 4.0
    metrics.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss=" in line]
    assert "5/10" in lines[0] and "6/10" in lines[1]
    assert "loss=2.0000, lr=2.00e-03, images/s=2.00, utilization=12.5%" in lines[0]
    assert "loss=3.0000, lr=3.00e-03, images/s=4.00, utilization=25.0%" in lines[1]


def test_a_tracker_that_cannot_write_is_let_go(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, board, _ = made("CPU")

    def flush() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(board, "flush", flush)
    for step in (1, 2):
        metrics.add(step, 0, *scalars(0.5, 1.0), 1e-3)
        clock.now += 1
        assert metrics.read()[0].step == step
    assert caplog.text.count("goes on without its trackers, which cannot write") == 1
    metrics.close()


def test_pauses_do_not_count(clock: Clock) -> None:
    metrics, board, _ = made("CPU")
    with metrics.paused():
        clock.now += 1000
    metrics.add(1, 0, *scalars(0.0, 3.0), 1e-3)
    clock.now += 4
    with pytest.raises(RuntimeError), metrics.paused():
        clock.now += 50
        raise RuntimeError
    metrics.read()
    assert ("images_per_second", 2.0, 1, 1154.0) in board.told
    metrics.close()


def test_a_device_without_a_peak_has_no_utilization(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, _, other = made("CPU")
    metrics.add(1, 0, *scalars(0.0, 3.0), 1e-3)
    clock.now += 1
    metrics.read()
    metrics.close()
    assert set(other.told[0][0]) == {"loss", "gradient_norm", "lr", "images", "images_per_second"}
    assert "utilization=n/a" in capsys.readouterr().err


def test_other_ranks_show_no_progress(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Accelerator, "is_local_main_process", False)
    metrics, *_ = made("CPU")
    metrics.add(1, 0, *scalars(0.0, 3.0), 1e-3)
    clock.now += 1
    assert len(metrics.read()) == 1
    metrics.close()
    assert capsys.readouterr().err == ""


# ---- where the time goes


def profiled(folder: Path, steps: int, made_steps: int = 6) -> list[list[str]]:
    """Make steps under the profiler; the files that are there after each."""
    profile, seen = Profile(steps, folder, 1, "cpu"), []
    for number in range(1, made_steps + 1):
        with profile.step(number), torch.profiler.record_function(f"step {number}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        seen.append(sorted(file.name for file in folder.glob("*")))
    profile.close()
    return seen


def test_a_profile_is_a_table_and_a_trace_of_the_steps_after_the_warm_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = ["rank-1.json", "rank-1.txt"]
    assert profiled(tmp_path, 2) == [[]] * (WARM_UP + 1) + [files] * 3 and not caplog.records
    table = (tmp_path / "rank-1.txt").read_text(encoding="utf-8")
    trace = json.loads((tmp_path / "rank-1.json").read_text(encoding="utf-8"))
    names = {event.get("name") for event in trace["traceEvents"]}
    for number in range(1, 7):
        assert (f"step {number}" in names) == (f"step {number}" in table) == (number in (3, 4))
    assert "aten::mm" in table and "aten::mm" in names


def test_a_run_that_ends_early_leaves_what_was_profiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert profiled(tmp_path, 5, made_steps=4) == [[]] * 4
    assert "the run ended after 4 steps, of which the first 2 are warm-up; 2 were profiled" in caplog.text
    table = (tmp_path / "rank-1.txt").read_text(encoding="utf-8")
    trace = (tmp_path / "rank-1.json").read_text(encoding="utf-8")
    for number in range(1, 5):
        assert (f"step {number}" in table) == (f'"step {number}"' in trace) == (number > 2)


def test_a_run_that_ends_in_the_warm_up_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert profiled(tmp_path / "none", 5, made_steps=1) == [[]]
    assert "--profile=5: the run ended after 1 steps" in caplog.text and "0 were profiled" in caplog.text
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_short_run_has_a_profile(stopped: bool, tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    """Whether it comes to its end or is stopped by a signal in step 3."""

    def before() -> None:
        plain = Metrics.add

        def add(self: Metrics, step: int, *rest: Any) -> None:
            plain(self, step, *rest)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        Metrics.add = add

    output = tmp_path / "run"
    flags = ("--train_batch_size=1", "--profile=9", f"--max_train_steps={9 if stopped else 3}")
    data = [f"--instance_data_dir={dog_dir}"]
    run = forked("lora", output, tiny_model, data, *flags, before=before if stopped else None)
    assert finished(run) == (143 if stopped else 0)
    assert {file.name for file in (output / "profile").iterdir()} == {"rank-0.json", "rank-0.txt"}
    assert "--profile=9: the run ended after" in log_of(output).read_text(encoding="utf-8")


def test_no_steps_no_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert profiled(tmp_path / "none", 0) == [[]] * 6
    assert not (tmp_path / "none").exists() and not caplog.records
