"""The published inference loop against ours: paired runs in alternation, a table, JSON, and the bound of arithmetic."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sd3.common import flops, paired
from sd3.common.command_line import Parser, UserError
from sd3.common.model_sizes import CLIP_TOKENS, SIZES, ModelSize, size_of
from sd3.common.paired import Variant, add_options, measure, run_benchmark
from sd3.common.tiny_sd3 import MADE, make_tiny_sd3
from sd3.inference.benchmark_run import Case, Measured, run_case
from sd3.inference.paint import T5_TOKENS
from sd3.inference.ranks import Ranks
from sd3.inference.run import check_dtype, versions
from sd3.inference.sources import find_sources


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        description="Paint the same pictures with the published loop (every part on the device, every prompt encoded "
        "for every seed, one picture at a time) and with this project's, in alternation, and compare time and memory."
    )
    add = parser.add_argument
    add(
        "--model", default="proportional", metavar="SIZE|DIR",
        help="a model directory, or random weights made here: tiny, proportional (default: SD3 medium's shares of "
        "arithmetic and memory), sd3-medium (its real size: 15 GB on the disk, 40 GB of host memory)",
    )  # fmt: skip
    add("--device", default="auto", choices=("auto", "npu", "cuda", "cpu"), help="where to paint")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="default float16, on a cpu float32")
    add("--prompts", type=int, default=8, help="number of prompts (default 8)")
    add("--seeds", type=int, default=4, help="pictures of each prompt (default 4)")
    add("--steps", type=int, default=28, help="denoising steps (default 28)")
    add("--side", type=int, help="pixels a side (default 256 for proportional, 128 for tiny, else 1024)")
    add("--guidance-scale", type=float, default=1.0, help="guidance scale (default 1, as published)")
    add("--batch-sizes", type=int, nargs="+", default=[1], help="our batch sizes, each compared apart (default 1)")
    add("--compile", action="store_true", help="also ours with a compiled transformer, reported apart")
    add_options(parser)
    return parser


def main(arguments: Sequence[str], script: Path) -> int:
    """Command line of `script`; returns the exit status."""

    def one_run(fields: dict, kind: str, folder: Path) -> Measured:
        return run_case(Case(**fields), kind == "ours", folder)

    def compare(options: argparse.Namespace) -> dict:
        with tempfile.TemporaryDirectory() as scratch:
            return _compare(options, script, Path(scratch))

    return run_benchmark(build_parser(), arguments, one_run, compare, as_table)


def _compare(options: argparse.Namespace, script: Path, scratch: Path) -> dict:
    counts = (options.prompts, options.seeds, options.steps, options.pairs, *options.batch_sizes)
    if min(counts) < 1:
        raise UserError(f"--prompts, --seeds, --steps, --pairs and --batch-sizes are at least 1; got {min(counts)}.")
    if options.side is not None and (options.side % 16 or options.side < 64):
        raise UserError(f"--side={options.side} is no multiple of 16 from 64 on; give for example 256.")
    ranks = Ranks()
    ranks.take_device(options.device)
    dtype = options.dtype or ("float32" if ranks.device == "cpu" else "float16")
    check_dtype(ranks.torch_device, dtype)
    model, side = options.model, options.side or 1024
    if options.model in MADE:
        model, side = str(scratch / "model"), options.side or 8 * SIZES[options.model].sample_size
        make_tiny_sd3(Path(model), size=options.model, half=True)
    parts = find_sources(model, local_files_only=True).parts
    if "text_encoder_3" not in parts:
        raise UserError(f"--model={model} has no T5, with which both loops are measured; give a model that has one.")
    size = size_of(parts)
    case = Case(
        model, ranks.torch_device, dtype, options.prompts, options.seeds, options.steps, side, options.guidance_scale
    )
    variants = {"published": _variant("published", case)}
    for batch_size in options.batch_sizes:
        variants[f"ours, batch {batch_size}"] = _variant("ours", dataclasses.replace(case, batch_size=batch_size))
    if options.compile:
        variants["ours, compiled"] = _variant("ours", dataclasses.replace(case, compiled=True))
    runs = measure(script, variants, options.pairs)
    return {
        "case": {**dataclasses.asdict(case), "model": options.model},
        "machine": {"processor": platform.processor() or platform.machine(), **versions(ranks.device)},
        "bound": bound(size, case),
        "runs": runs,
        "ratios": {name: ratios(runs["published"], found) for name, found in runs.items() if name != "published"},
    }


def _variant(kind: str, case: Case) -> Variant:
    """On a CPU memory is measured while one batch is painted in one step."""
    one_batch = dataclasses.replace(case, prompts=1, seeds=case.batch_size, steps=1)
    return Variant(kind, case, one_batch if case.device == "cpu" else None)


def ratios(published: Sequence[dict], ours: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Of each pair, published over ours in seconds, and ours over published in memory: min, median, max."""
    return {
        "speed": paired.ratios(published, ours, "seconds"),
        "memory": paired.ratios(ours, published, "peak_bytes"),
    }


def bound(size: ModelSize, case: Case) -> float:
    """How much faster arithmetic allows ours to be at batch 1: all operations of the published loop, over those left
    when each distinct prompt is encoded once. Guidance doubles the denoising, and the published loop's encoding."""
    guided = case.guidance_scale > 1
    denoise = case.steps * flops.transformer_cost(size, case.side, CLIP_TOKENS + T5_TOKENS).flops * (2 if guided else 1)
    decode = flops.decoder_cost(size, case.side).flops
    encode = flops.t5_cost(size, T5_TOKENS).flops + flops.clip_cost(size).flops
    pictures = case.prompts * case.seeds
    theirs = pictures * (denoise + decode + encode * (2 if guided else 1))
    return theirs / (pictures * (denoise + decode) + encode * (case.prompts + guided))


def as_table(result: dict) -> str:
    """The figures as a Markdown table, which a terminal shows just as well."""
    case, published = result["case"], result["runs"]["published"]
    lines = [
        f"{case['model']}, {case['prompts']} prompts x {case['seeds']} seeds, {case['steps']} steps, "
        f"{case['side']}x{case['side']}, guidance {case['guidance_scale']:g}, {case['dtype']}, {case['device']}, "
        f"{len(published)} pairs",
        "",
        "| run | pictures/s | speed, of published: min, median, max | peak memory, of published: min, median, max |",
        "|---|---|---|---|",
    ]
    for name, runs in result["runs"].items():
        rate = statistics.median(run["pictures"] / run["seconds"] for run in runs)
        against = result["ratios"].get(name)
        speed = paired.shown(against["speed"], 3) if against else "1"
        memory = paired.shown(against["memory"], 2) if against else "1"
        lines.append(f"| {name} | {rate:.3f} | {speed} | {memory} |")
    lines += ["", f"Bound set by arithmetic for batch 1: {result['bound']:.4f}."]
    return "\n".join(lines)
