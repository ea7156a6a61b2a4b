"""Operators on the card against the CPU, and what strict mode refuses; prints one JSON object."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable

import torch
import torch_npu
from torch.nn.functional import scaled_dot_product_attention

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def attention(device: str, dtype: torch.dtype, masked: bool = False) -> list[torch.Tensor]:
    """Result and the three gradients of one attention [2, 3, 8, 16] over 10 keys."""
    draws = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 8, 16), (2, 3, 10, 16), (2, 3, 10, 16))
    inputs = [torch.randn(size, generator=draws).to(device, dtype).requires_grad_() for size in sizes]
    mask = (torch.arange(10) % 3 != 1).expand(2, 1, 8, 10).to(device) if masked else None
    result = scaled_dot_product_attention(*inputs, attn_mask=mask)
    (result.float() * torch.randn(result.shape, generator=draws).to(device)).sum().backward()
    return [result.detach(), *(tensor.grad for tensor in inputs)]


def rms_norm(device: str) -> list[torch.Tensor]:
    """Result and both gradients of a root-mean-square norm; on the card npu_rms_norm's."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=draws).to(device).requires_grad_()
    gamma = torch.randn(6, generator=draws).to(device).requires_grad_()
    if device == "npu":
        result = torch_npu.npu_rms_norm(x, gamma, epsilon=1e-6)[0]
    else:
        result = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gamma
    result.pow(2).sum().backward()
    return [result.detach(), x.grad, gamma.grad]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest absolute difference."""
    return max((a.cpu().float() - b.float()).abs().max().item() for a, b in zip(one, other, strict=True))


def refusal(work: Callable[[], object]) -> str:
    """What is raised; torch_npu raises late, so the card is waited for."""
    try:
        work()
        torch.npu.synchronize()
    except RuntimeError as error:
        return str(error)
    return ""


def strided() -> str:
    """What aclnn says of a tensor that is not contiguous where its documentation wants one that is.

    torch_npu makes tensors contiguous before it comes to this, so the function is called as torch_npu would call it.
    """
    library = ctypes.CDLL("libopapi.so")
    library.aclCreateTensor.restype = ctypes.c_void_p
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    memory = (ctypes.c_float * 16)()
    sizes, strides = (ctypes.c_int64 * 2)(3, 4), (ctypes.c_int64 * 2)(1, 4)

    def tensor() -> ctypes.c_void_p:
        shape = (sizes, ctypes.c_uint64(2), 0, strides, ctypes.c_int64(0))
        return ctypes.c_void_p(library.aclCreateTensor(*shape, 2, None, ctypes.c_uint64(0), memory))

    library.aclnnAmpUpdateScaleGetWorkspaceSize.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_double, ctypes.c_double,
                                                            ctypes.c_int64, *[ctypes.c_void_p] * 4]  # fmt: skip
    size, executor = ctypes.c_uint64(), ctypes.c_void_p()
    scales = [tensor() for _ in range(5)]
    library.aclnnAmpUpdateScaleGetWorkspaceSize(
        *scales[:3], 2.0, 0.5, 100, *scales[3:], ctypes.byref(size), ctypes.byref(executor)
    )
    return library.aclGetRecentErrMsg().decode()


def main() -> None:
    """Everything in one process: importing torch_npu takes longer than the rest."""
    found: dict[str, object] = {
        name: difference(attention("npu", dtype), attention("cpu", torch.float32)) for name, dtype in TYPES.items()
    }
    found["masked"] = difference(attention("npu", torch.float32, True), attention("cpu", torch.float32, True))
    found["rms_norm"] = difference(rms_norm("npu"), rms_norm("cpu"))
    state = torch.npu.get_rng_state()
    first = torch.randn(5, device="npu")
    torch.npu.set_rng_state(state)
    found["random state"] = torch.equal(first, torch.randn(5, device="npu"))
    kept = torch.nn.functional.dropout(torch.ones(10_000, device="npu"), 0.25)
    found["dropout"] = [kept.ne(0).float().mean().item(), kept.max().item()]
    found["float64"] = refusal(lambda: torch.ones(2, dtype=torch.float64).to("npu") * 2)
    found["strided"] = strided()
    found["type"] = refusal(lambda: torch.softmax(torch.ones(4, dtype=torch.int32, device="npu"), 0))
    found["not in the table"] = refusal(lambda: torch.floor_divide(torch.ones(2, device="npu"), 2))
    found["memory format"] = refusal(lambda: torch.ones(1, 2, 3, 3).to("npu", memory_format=torch.channels_last))
    found["out of memory"] = refusal(lambda: torch.empty(1 << 30, device="npu"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
