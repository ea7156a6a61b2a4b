"""What a device or a compiler raises where a sentence is due: memory that runs out, a compiler that does not work."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from sd3.common.command_line import UserError


def out_of_memory(error: RuntimeError, device: str, advice: str) -> UserError | None:
    """The sentence for an `error` of torch, torch.cuda or torch_npu that means too little memory; None for others."""
    if "out of memory" not in str(error).lower():
        return None
    return UserError(f"the {device} has too little memory; {advice}.")


def compiler_failed(error: RuntimeError, flag: str) -> UserError | None:
    """The sentence for an `error` of torch.compile, which `flag` asked for; None for others.

    torch's compiler needs more than torch: a C++ compiler, on a GPU Triton, on an NPU triton-ascend.
    """
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is None or not isinstance(error, compiler.TorchDynamoException):
        return None
    cause = getattr(error, "inner_exception", None) or error
    reason = (str(cause).strip().splitlines() or [""])[0].rstrip(".")
    return UserError(f"{flag} does not work here ({type(cause).__name__}: {reason}); leave it out.", 3)


@contextlib.contextmanager
def told_of_compiler(flag: str) -> Iterator[None]:
    """Turn a failure of torch.compile into one sentence.

    Raises:
        UserError: the compiler that `flag` asked for does not work; status 3.
    """
    try:
        yield
    except RuntimeError as error:
        told = compiler_failed(error, flag)
        if told is None:
            raise
        raise told from None
