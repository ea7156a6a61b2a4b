"""Memory that runs out and compilers that do not work become sentences; all other errors stay what they are."""

from __future__ import annotations

import pytest
import torch

from sd3.common.command_line import UserError
from sd3.common.device_errors import out_of_memory, told_of_compiler
from sd3.inference.weights import told_of_memory


def no_triton(*_: object) -> None:
    raise AttributeError("module 'triton.language.extra' has no attribute 'ascend'\nmore lines")


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_a_compiler_that_does_not_work_is_one_sentence() -> None:
    with pytest.raises(UserError) as refusal, told_of_compiler("--compile"):
        torch.compile(double, backend=no_triton)(torch.ones(2))
    assert str(refusal.value) == (
        "--compile does not work here (AttributeError: module 'triton.language.extra' has no attribute 'ascend'); "
        "leave it out."
    )
    assert refusal.value.status == 3


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB", "NPU out of memory. Tried"])
def test_too_little_memory_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"^the npu has too little memory; give --offload\.$"):
        with told_of_memory("npu", "give --offload"):
            raise torch.OutOfMemoryError(text)


def test_other_errors_pass() -> None:
    assert out_of_memory(RuntimeError("shapes do not match"), "npu", "") is None
    for context in (told_of_compiler("--compile"), told_of_memory("npu", "give --offload")):
        with pytest.raises(RuntimeError, match="shapes do not match"), context:
            raise RuntimeError("shapes do not match")
