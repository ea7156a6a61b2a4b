"""What the runs of the benchmark come to: ratios, the bound of arithmetic, when the precompute has paid; a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sd3.common import flops, paired
from sd3.common.model_sizes import CLIP_TOKENS, ModelSize
from sd3.native.benchmark_run import Case
from sd3.native.utilization import peak_of

T5_TOKENS = 77  # of both engines' --max_sequence_length
GOAL = 0.95  # of the bound, for a proportional model on a CPU
ENGINES = ("upstream", "native")


def needed_passes(case: Case) -> int:
    """What forward and backward cost together, in forward passes: LoRA leaves out the gradients of the weights."""
    return 2 if case.kind == "lora" else 3


def costs(size: ModelSize, case: Case) -> dict[str, int]:
    """Operations that a step needs for one picture, by part; a multiply-add counts as two.

    `transformer`: forward and backward, which costs as much to the activations and, in full fine-tuning, once more to
    the weights; and forward again where activations are checkpointed. The low-rank matrices are not counted. `text`: 0
    where one prompt serves for all, for then both engines encode it before the training.
    """
    forward = flops.transformer_cost(size, case.resolution, CLIP_TOKENS + T5_TOKENS).flops
    passes = needed_passes(case) + case.checkpointing
    text = flops.t5_cost(size, T5_TOKENS).flops + flops.clip_cost(size).flops
    return {
        "transformer": passes * forward,
        "vae": flops.encoder_cost(size, case.resolution).flops,
        "text": text if case.captions == "each" else 0,
    }


def bound(parts: Mapping[str, int]) -> float:
    """How much faster arithmetic allows a step without VAE and text encoders to be, all at one speed."""
    return sum(parts.values()) / parts["transformer"]


def pays_after(precompute_seconds: float, upstream_step: float, native_step: float) -> int | None:
    """Steps after which what they save exceeds the seconds of the precompute; None where they save nothing."""
    saved = upstream_step - native_step
    return math.ceil(precompute_seconds / saved) if saved > 0 else None


def utilization(
    case: Case, parts: Mapping[str, int], step: Mapping[str, float], device: str
) -> dict[str, dict[str, float]] | None:
    """By engine what a step needs and what it computes, over what the device could at its peak; None where that is not
    known.

    `model`: forward and backward of the transformer; `hardware`: with what is computed again under gradient
    checkpointing, and upstream with VAE and text encoders.
    """
    peak = peak_of(device)
    if peak is None:
        return None
    passes = needed_passes(case)
    needed = parts["transformer"] * passes / (passes + case.checkpointing)
    computed = {"upstream": sum(parts.values()), "native": parts["transformer"]}
    found = {}
    for name in ENGINES:
        rate = case.batch_size / step[name] / peak
        found[name] = {"model": rate * needed, "hardware": rate * computed[name]}
    return found


def figures(size: ModelSize, case: Case, runs: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Everything derived from the runs of both engines."""
    upstream, native = (runs[name] for name in ENGINES)
    parts = costs(size, case)
    limit = bound(parts)
    speed = paired.ratios(upstream, native, "seconds")
    step = {name: statistics.median(run["seconds"] for run in runs[name]) / case.steps for name in ENGINES}
    precompute = statistics.median(run["precompute_seconds"] for run in native)
    return {
        "step_seconds": step,
        "speed": speed,
        "memory": paired.ratios(native, upstream, "peak_bytes"),
        "flops_per_picture": parts,
        "utilization": utilization(case, parts, step, native[0]["device"]),
        "bound": limit,
        "median_over_bound": speed["median"] / limit,
        "precompute": {
            "seconds": precompute,
            "paid_after_steps": pays_after(precompute, step["upstream"], step["native"]),
        },
    }


def as_table(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table with a few sentences, which a terminal shows just as well."""
    case, found, runs = result["case"], result["figures"], result["runs"]
    cpu = case["device"] == "cpu"
    lines = [
        f"{result['model']}, {case['kind']}, captions: {case['captions']}, {case['resolution']}x{case['resolution']}, "
        f"batch {case['batch_size']}, {'with' if case['checkpointing'] else 'without'} gradient checkpointing, "
        f"{'fp32' if case['precision'] == 'no' else case['precision']}, {case['device']}, "
        f"threads: {runs['native'][0]['threads']}, {len(runs['native'])} pairs of {case['steps']} steps after "
        f"{case['warm_up']}",
        "",
        "| engine | pictures/s | times upstream: min, median, max | peak MB | times upstream: min, median, max |",
        "|---|---|---|---|---|",
    ]
    for name in ENGINES:
        rate = case["batch_size"] / found["step_seconds"][name]
        peak = statistics.median(run["peak_bytes"] for run in runs[name]) / 1e6
        speed, memory = "1", "1"
        if name == "native":
            speed, memory = paired.shown(found["speed"], 3), paired.shown(found["memory"], 2)
        lines.append(f"| {name} | {rate:.3f} | {speed} | {peak:.0f} | {memory} |")
    lines += ["", _of_bound(result["model"], cpu, found), _payment(case["pictures"], found["precompute"])]
    if found["utilization"]:
        each = found["utilization"].items()
        used = ", ".join(f"{name} {one['model']:.1%} and {one['hardware']:.1%}" for name, one in each)
        lines.append(f"Of the peak of {runs['native'][0]['device']}, needed and computed: {used}.")
    if cpu:
        lines.append(
            "Times are the processes' CPU time, since others may share the machine; memory is that of short runs of "
            "their own, beyond what a process holds before it loads the first weight."
        )
    return "\n".join(lines)


def _of_bound(model: str, cpu: bool, found: Mapping[str, Any]) -> str:
    parts = found["flops_per_picture"]
    counted = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in parts.items())
    said = (
        f"Bound set by arithmetic: {found['bound']:.3f} (GFLOP for one picture: {counted}); the median is "
        f"{found['median_over_bound']:.1%} of it"
    )
    if not (cpu and model.startswith("proportional")):
        return f"{said}."
    return f"{said}, the goal of {GOAL:.0%} is {'reached' if found['median_over_bound'] >= GOAL else 'missed'}."


def _payment(pictures: int, precompute: Mapping[str, Any]) -> str:
    steps = precompute["paid_after_steps"]
    paid = "which the steps do not repay" if steps is None else f"paid for after {steps} steps"
    return f"Precompute of the native engine: {precompute['seconds']:.2f} s for {pictures} pictures, {paid}."
