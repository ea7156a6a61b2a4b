"""The training loop that all parts share: AdamW, a warm-up, a cosine, clipped gradients, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sd3.common.files import new_file

EMA = 0.999
_KEPT = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


def rate(step: int, steps: int, warm_up: int) -> float:
    """Share of the highest learning rate at a step: a straight rise, then half a cosine to nothing."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class Trainer:
    """Fits the weights of a module, keeps their moving average, and can stop and go on in the same bits."""

    def __init__(self, module: torch.nn.Module, learning_rate: float, steps: int, weight_decay: float = 0.01) -> None:
        """`steps`: of the whole training, which the learning rate follows."""
        self.weights = dict(module.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.learning_rate, self.steps, self.step = learning_rate, steps, 0
        self.losses: list[float] = []

    def run(
        self, loss_at: Callable[[int], torch.Tensor], name: str, until: int | None = None,
        kept: Path | None = None, every: int = 500,
    ) -> None:  # fmt: skip
        """Train up to step `until` (default: the last) with the losses that `loss_at` gives for the steps; `kept` is
        the checkpoint file, written every so many steps."""
        until = self.steps if until is None else until
        bar = tqdm(range(self.step, until), name, total=until, initial=self.step, mininterval=1)
        for step in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * rate(step, self.steps, min(300, self.steps // 10))
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._follow(step)
            self.losses.append(loss.item())
            self.step = step + 1
            if step % 20 == 0:
                recent = self.losses[-100:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
            if kept and self.step % every == 0:
                self.save(kept)
        bar.close()

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        share = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [w.detach() for w in self.weights.values()], 1 - share)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the module the moving average of its weights."""
        for name, weight in self.weights.items():
            weight.copy_(self.average[name])

    def save(self, file: Path) -> None:
        """Write a checkpoint: weights, their average, and the optimizer's memory."""
        tensors = {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, weight in self.weights.items():
            tensors[f"weight.{name}"] = weight.detach()
            tensors |= {f"{part}.{name}": self.optimizer.state[weight][part] for part in _KEPT}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        with new_file(file) as aside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Go on from a checkpoint."""
        tensors = load_file(file)
        self.losses = tensors["losses"].tolist()
        self.step = len(self.losses)
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            self.optimizer.state[weight] = {part: tensors[f"{part}.{name}"] for part in _KEPT} | {
                "step": torch.tensor(float(self.step))
            }


def seeded(module: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """A module made with its random numbers seeded, the caller's untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module()


def rounded(modules: Iterable[torch.nn.Module]) -> None:
    """Round weights to those of float16, in which they ship, so that what comes next learns from what ships."""
    for module in modules:
        module.half().float().requires_grad_(False).eval()
