"""The benchmark: its arithmetic, its refusals, and one run of it on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd3.common.model_sizes import SIZES, size_of
from sd3.inference.benchmark import as_table, bound, ratios
from sd3.inference.benchmark_run import Case
from sd3.inference.sources import find_sources

PROJECT = Path(__file__).resolve().parent.parent


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "sd3" / "benchmark_inference.py"), "--device=cpu", *arguments], text=True,
        capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def case(**changes: object) -> Case:
    values = {"prompts": 8, "seeds": 4, "steps": 28, "side": 1024, "guidance_scale": 1.0, **changes}
    return Case("m", "cpu", "float32", **values)


def test_the_bound_is_what_encoding_once_saves() -> None:
    """SD3 medium, 28 steps at 1024x1024, from the counts of tests/test_flops.py: 0.7 % for 4 seeds of a prompt."""
    step, decode, encode = 8.9043, 10.4722, 2.3966 + 0.1112
    picture = 28 * step + decode
    expected = (picture + encode) / (picture + encode / 4)
    assert bound(SIZES["sd3-medium"], case()) == pytest.approx(expected, rel=1e-4)
    assert bound(SIZES["sd3-medium"], case(seeds=1)) == pytest.approx(1.0)
    # With guidance the empty prompt is encoded once for all instead of for every picture.
    guided = (2 * 28 * step + decode + 2 * encode) / (2 * 28 * step + decode + encode * 9 / 32)
    assert bound(SIZES["sd3-medium"], case(guidance_scale=5.0)) == pytest.approx(guided, rel=1e-4)


def test_ratios_are_of_pairs() -> None:
    published = [{"seconds": 10.0, "peak_bytes": 100}, {"seconds": 30.0, "peak_bytes": 200}]
    ours = [{"seconds": 5.0, "peak_bytes": 50}, {"seconds": 10.0, "peak_bytes": 50}]
    found = ratios(published, ours)
    assert found["speed"] == {"min": 2.0, "median": 2.5, "max": 3.0}
    assert found["memory"] == {"min": 0.25, "median": 0.375, "max": 0.5}


def test_the_size_of_a_pipeline_is_read_from_it(tiny_model: Path) -> None:
    import dataclasses

    found = size_of(find_sources(str(tiny_model)).parts)
    assert dataclasses.replace(found, t5_rows=0) == SIZES["tiny"]


def test_a_run(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    small = ("--side=64", "--steps=2", "--prompts=2", "--seeds=2", "--pairs=1", "--batch-sizes", "1", "4")
    done = benchmark(f"--model={tiny_model}", *small, f"--output={output}")
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert set(figures["runs"]) == {"published", "ours, batch 1", "ours, batch 4"}
    for (run,) in figures["runs"].values():
        assert run["pictures"] == 4
        assert min(run["seconds"], run["load_seconds"], run["peak_bytes"]) > 0
    assert as_table(figures) in done.stdout
    assert "| ours, batch 4 | " in done.stdout
    assert f"Bound set by arithmetic for batch 1: {figures['bound']:.4f}." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pairs=0"], "are at least 1; got 0"),
        (["--side=100"], "--side=100 is no multiple of 16"),
        (["--model=no/such/place"], "no/such/place is no directory"),
        (["--devic=cpu"], "unrecognized arguments: --devic=cpu"),
    ],
)
def test_one_sentence_for_each_mistake(arguments: list[str], said: str) -> None:
    done = benchmark(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
