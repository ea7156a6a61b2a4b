"""Collectives of ProcessGroupHCCL, and DDP, on one card for each rank of torchrun; rank 0 prints one JSON object."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

LONG = 3_000_000  # float32 elements: more than one slot of the emulated HCCL


def all_reduced(dtype: torch.dtype, count: int, rank: int, ranks: int) -> bool:
    """Is the sum over the ranks the right one, and the whole of it there when the CPU reads it?"""
    values = (torch.arange(count) % 100 + rank).to(dtype).to("npu")
    dist.all_reduce(values)
    expected = (torch.arange(count) % 100) * ranks + sum(range(ranks))
    return torch.equal(values.cpu(), expected.to(dtype))


def overlapped(rank: int, ranks: int) -> bool:
    """Several reductions under way at once, each read only after its own wait."""
    parts = [torch.full((1000,), float(rank + n), device="npu") for n in range(4)]
    works = [dist.all_reduce(part, async_op=True) for part in parts]
    for work in works:
        work.wait()
    return all(part.cpu().eq(sum(range(ranks)) + n * ranks).all() for n, part in enumerate(parts))


def read_too_early(rank: int, ranks: int) -> bool:
    """Is a sum there that nobody has waited for? Only where streams do their work at once."""
    part = torch.full((1000,), float(rank), device="npu")
    work = dist.all_reduce(part, async_op=True)
    complete = part.cpu().eq(sum(range(ranks))).all().item()
    work.wait()
    return complete


def gradients(rank: int, ranks: int) -> bool:
    """DDP's mean over the ranks, bucket by bucket."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Linear(50, 2)).to("npu")
    wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank], bucket_cap_mb=1)
    wrapped(torch.full((1, 3), float(rank + 1), device="npu")).sum().backward()
    alone = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Linear(50, 2))
    alone.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    (sum(alone(torch.full((1, 3), float(r + 1))).sum() for r in range(ranks)) / ranks).backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return all(torch.allclose(one.grad.cpu(), other.grad, atol=1e-5) for one, other in pairs)


def moved(rank: int, ranks: int) -> dict[str, bool]:
    """Broadcast, gathering, scattering and messages from rank to rank."""
    mine = torch.full((3,), float(rank), device="npu")
    gathered = [torch.empty(3, device="npu") for _ in range(ranks)]
    dist.all_gather(gathered, mine)
    scattered = torch.empty(2, device="npu")
    dist.reduce_scatter_tensor(scattered, torch.arange(2.0 * ranks, device="npu"))
    objects: list[object] = [None] * ranks
    dist.all_gather_object(objects, {"rank": rank})
    sent = torch.full((3,), 7.0, device="npu") if rank == 0 else torch.zeros(3, device="npu")
    if rank == 0:
        dist.send(sent, 1)
    elif rank == 1:
        dist.recv(sent, 0)
    dist.broadcast(mine, ranks - 1)
    return {
        "all_gather": all(tensor.cpu().eq(r).all().item() for r, tensor in enumerate(gathered)),
        "reduce_scatter": torch.equal(scattered.cpu(), torch.arange(2.0 * ranks)[2 * rank : 2 * rank + 2] * ranks),
        "objects": objects == [{"rank": r} for r in range(ranks)],
        "message": rank > 1 or sent.cpu().eq(7).all().item(),
        "broadcast": mine.cpu().eq(ranks - 1).all().item(),
    }


def main() -> None:
    """What one rank found wrong, all report."""
    dist.init_process_group("hccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.npu.set_device(rank)
    types = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
    found = {f"all_reduce {dtype}": all_reduced(dtype, 7, rank, ranks) for dtype in types}
    found["long"] = all_reduced(torch.float32, LONG, rank, ranks)
    found["overlapped"] = overlapped(rank, ranks)
    found["read too early"] = read_too_early(rank, ranks)
    found |= moved(rank, ranks)
    found["DDP"] = gradients(rank, ranks)
    every: list[dict[str, bool]] = [{}] * ranks
    dist.all_gather_object(every, found)
    dist.barrier()
    if rank == 0:
        print(json.dumps({name: all(of_rank[name] for of_rank in every) for name in found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
