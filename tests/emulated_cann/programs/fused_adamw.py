"""NpuFusedAdamW under the native engine's own DDP settings, on two cards, against AdamW on a CPU; prints JSON."""

from __future__ import annotations

import json
import logging
import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from torch_npu.optim import NpuFusedAdamW

from sd3.native.loop import start_accelerator
from sd3.native.optimizer import make_optimizer
from sd3.native.options import parse

STEPS = 4


class Small(torch.nn.Module):
    """Two layers and a constant."""

    def __init__(self) -> None:
        """The same on all ranks."""
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        self.register_buffer("table", torch.zeros(2))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """[B, 4] to [B, 2]."""
        return self.layers(given) + self.table


def inputs(step: int) -> torch.Tensor:
    """One step's inputs of both ranks [2, 3, 4]."""
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(step))


def vector(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector on the CPU."""
    return torch.cat([one.detach().cpu().flatten() for one in model.parameters()])


def on_cpu(ranks: int) -> torch.Tensor:
    """What AdamW makes of the mean of all ranks' losses."""
    alone = Small()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2, weight_decay=1e-4)
    for step in range(STEPS):
        optimizer.zero_grad()
        sum((alone(half) + rank).sin().sum() for rank, half in enumerate(inputs(step))).div(ranks).backward()
        optimizer.step()
    return vector(alone)


def bucket_views(device: torch.device) -> str:
    """What NpuFusedAdamW raises where gradients are views of DDP's buckets."""
    model = DistributedDataParallel(Small().to(device), device_ids=[device.index], gradient_as_bucket_view=True)
    optimizer = NpuFusedAdamW(model.parameters(), lr=1e-2)
    try:
        for step in range(2):
            model(inputs(step)[0].to(device)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    """Train as the engine does, then as it must not."""
    options = parse("full", sys.argv[1:])
    accelerator = start_accelerator(options)
    model = Small()
    model.table.add_(accelerator.process_index)  # as it never is; a broadcast of buffers would show
    model = accelerator.prepare(model)
    groups = [{"params": list(model.parameters()), "lr": 1e-2, "weight_decay": 1e-4}]
    optimizer = make_optimizer(options, groups, accelerator.device.type, logging.getLogger())
    for step in range(STEPS):
        optimizer.zero_grad()
        mine = inputs(step)[accelerator.process_index].to(accelerator.device)
        model(mine).sin().sum().backward()
        optimizer.step()
    tables = [torch.empty_like(model.module.table) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(tables, model.module.table)
    found = {
        "tables": [table.tolist() for table in tables],
        "optimizer": [kind.__name__ for kind in type(optimizer).__mro__],
        "difference": (vector(model) - on_cpu(accelerator.num_processes)).abs().max().item(),
        "bucket views": bucket_views(accelerator.device),
    }
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
