"""Emulated CANN itself: operators through torch_npu's own code, what strict mode refuses, HCCL, and its table."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from emulated_cann import table
from emulated_npu import EmulatedNpu
from patching import free_port

PROGRAMS = Path(table.HERE) / "programs"


@pytest.fixture(scope="module")
def operators(_emulated_npu: EmulatedNpu) -> dict[str, Any]:
    done = _emulated_npu.run([sys.executable, str(PROGRAMS / "operators.py")], EMULATED_CANN_MEMORY=str(2 << 30))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.npu
@pytest.mark.parametrize(
    ("kind", "bound"), [("float32", 1e-6), ("masked", 2e-6), ("bfloat16", 2e-2), ("float16", 3e-3)]
)
def test_attention_and_its_gradient_go_through_torch_npu(operators: dict[str, Any], kind: str, bound: float) -> None:
    assert operators[kind] < bound


@pytest.mark.npu
def test_root_mean_square_norm_and_its_gradients(operators: dict[str, Any]) -> None:
    assert operators["rms_norm"] < 1e-6


@pytest.mark.npu
def test_random_numbers_follow_the_npus_generator(operators: dict[str, Any]) -> None:
    assert operators["random state"]
    assert operators["dropout"] == pytest.approx([0.75, 1 / 0.75], abs=0.03)


@pytest.mark.npu
@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("float64", "aclnnMuls: self is of type DOUBLE"),
        ("type", "aclnnSoftmax: self is of type INT32"),
        ("strided", "aclnnAmpUpdateScale: currentScale is not contiguous"),
        ("not in the table", "no aclnn function for the operator FloorDiv"),
        ("memory format", "Only contiguous_format or preserve_format is supported"),
        ("out of memory", "NPU out of memory"),
    ],
)
def test_what_a_card_refuses_is_refused(operators: dict[str, Any], case: str, told: str) -> None:
    assert told in operators[case]


@pytest.mark.npu
@pytest.mark.parametrize("delay", [pytest.param(0, marks=pytest.mark.long), 20])
def test_collectives_are_right_and_a_missing_wait_shows_on_late_streams(
    emulated_npu: EmulatedNpu, delay: int
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = emulated_npu.run([*launch, str(PROGRAMS / "collectives.py")], cards=2, EMULATED_CANN_DELAY=str(delay))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("read too early") == (delay == 0)
    assert [name for name, right in found.items() if not right] == []


def written_operators() -> dict[str, set[str]]:
    """The tensor parameters of every aclnn function in operators/."""
    pattern = re.compile(r"ACLNN\((aclnn\w+),\s*((?:\([\w*]+, \w+\)\s*)+)\)")
    found: dict[str, set[str]] = {}
    for source in sorted((table.HERE / "operators").glob("*.cpp")):
        for name, parameters in pattern.findall(source.read_text(encoding="utf-8")):
            assert name not in found
            found[name] = set(re.findall(r"\(TL?, (\w+)\)", parameters))
    return found


def test_the_table_has_a_row_for_every_tensor_of_every_function_and_no_other() -> None:
    given = {(function, parameter) for function, parameter, *_ in table.rows()}
    # The documentation has no types for a parameter that it says must not be given.
    none = {"paddingMaskOptional"}
    assert given == {(name, tensor) for name, all_of_it in written_operators().items() for tensor in all_of_it - none}


def test_every_row_names_types_a_layout_and_its_source() -> None:
    for function, _, types, layout, source in table.rows():
        assert types and set(types.split()) <= set(table.SHORT)
        assert layout in ("strided", "contiguous")
        assert re.fullmatch(r"ops-\w+/[\w/&]+\.md", source), function


@pytest.mark.parametrize("readme", table.READMES, ids=lambda path: path.name)
def test_the_readme_holds_the_table_as_it_is(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert table.with_table(text) == text
