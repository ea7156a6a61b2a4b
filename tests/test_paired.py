"""Measuring in pairs: the order of the runs, what their processes are told, ratios, and peak memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sd3.common.command_line import Parser, UserError
from sd3.common.memory import GIVE_BACK, uncollected
from sd3.common.paired import Variant, add_options, back_and_forth, measure, ratios, run_benchmark, shown

CHILD = """
import json, os, sys
case = json.load(sys.stdin)
if case["fails"]:
    sys.exit("first line\\nit broke")
print("a library says something")
print(json.dumps({"kind": sys.argv[1], "steps": case["steps"],
                  "peak_bytes": 7 if "MALLOC_MMAP_THRESHOLD_" in os.environ else 1000 + case["steps"]}))
"""

HOLDER = """
import time
import torch
from sd3.common.memory import PeakMemory

def hold(megabytes):
    held = torch.ones(megabytes, 250_000)
    time.sleep(0.1)  # memory is looked at every 2 ms
    del held

hold(30)  # freed: glibc now takes blocks of up to 30 MB from its heap
freed = [torch.ones(20, 250_000) for _ in range(15)]
above = torch.ones(10, 250_000)  # what lies below it in the heap is not given back of itself
del freed
with PeakMemory(torch.device("cpu")) as memory:
    hold(200)
    hold(20)
print(memory.peak)
"""


@dataclass(frozen=True)
class Case:
    steps: int
    fails: bool = False


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "child.py"
    file.write_text(CHILD)
    return file


def test_the_order_turns_with_each_pair() -> None:
    assert list(back_and_forth(["a", "b"], 3)) == ["a", "b", "b", "a", "a", "b"]


def test_ratios_are_of_pairs() -> None:
    over, under = [{"s": 10.0}, {"s": 30.0}, {"s": 8.0}], [{"s": 5.0}, {"s": 10.0}, {"s": 8.0}]
    found = ratios(over, under, "s")
    assert found == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert shown(found, 2) == "1.00, 2.00, 3.00"


def test_each_run_is_a_process_with_its_case(script: Path) -> None:
    runs = measure(script, {"one": Variant("a", Case(3)), "other": Variant("b", Case(5))}, pairs=2)
    assert runs == {
        "one": [{"kind": "--one=a", "steps": 3, "peak_bytes": 1003}] * 2,
        "other": [{"kind": "--one=b", "steps": 5, "peak_bytes": 1005}] * 2,
    }


def test_memory_can_have_a_run_of_its_own(script: Path) -> None:
    (run,) = measure(script, {"one": Variant("a", Case(3), short=Case(1))}, pairs=1)["one"]
    assert (run["steps"], run["peak_bytes"]) == (3, 7)


def test_a_run_that_fails_is_named_with_its_last_words(script: Path) -> None:
    with pytest.raises(UserError, match="the run 'one' failed: it broke") as raised:
        measure(script, {"one": Variant("a", Case(1, fails=True))}, pairs=1)
    assert raised.value.status == 1


@pytest.mark.parametrize(("name", "says"), [(".", "cannot be written"), ("file/figures.json", "its folder cannot be")])
def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    (tmp_path / "file").touch()
    parser = Parser()
    add_options(parser)
    asked = [f"--output={tmp_path / name}"]
    assert run_benchmark(parser, asked, pytest.fail, lambda _: pytest.fail("it measures"), str) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("environment", "least", "most"), [(GIVE_BACK, 190e6, 300e6), ({}, 0, 10e6)])
def test_peak_memory_is_what_was_held_at_most(environment: dict[str, str], least: float, most: float) -> None:
    """Also where much was freed before, which glibc would use again unseen: hence GIVE_BACK."""
    done = subprocess.run(
        [sys.executable, "-c", HOLDER], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    assert least <= int(done.stdout) < most


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_pauses_and_is_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
