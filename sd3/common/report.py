"""The report of a run: images a second, final loss, duration; printed, written, and drawn.

    python -m sd3.common.report RUN_DIR [--exit-status N]

Reads run_settings.json and the tracker's event files; writes report.json, <CaseName>.log under the published launchers'
keys, report.png, and each validation's pictures as validation-EPOCH-N.png. It never fails a run: what cannot be
known is "n/a" and says why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from sd3.common.report_events import Events, Step, read_events

MINIMUM = 2  # timed steps that make a rate: a single one may hold anything
WARM_UP = 2  # steps at the start of each session that are not timed: caches, compilation, allocation
LAST_LOSSES = 10  # steps that the final loss is the mean of, fewer in a short run: one batch's loss is mostly noise


def intervals(events: Events, checkpointing_steps: int) -> list[tuple[Step, float]]:
    """(step, seconds it took) after the warm-up of its session, less those with a checkpoint or a validation in them.

    A step's scalars are logged after its checkpoint is written, so the checkpoint lies in the step's own interval;
    its completion, and a validation, lie in the next step's.
    """
    found = []
    done: dict[int, int] = {}
    for before, step in zip(events.steps, events.steps[1:], strict=False):
        done[before.session] = done.get(before.session, 0) + 1
        if step.session != before.session or step.number != before.number + 1 or done[before.session] < WARM_UP:
            continue
        if checkpointing_steps and (step.number % checkpointing_steps == 0 or before.number % checkpointing_steps == 0):
            continue
        if any(s == step.session and before.wall_time <= at <= step.wall_time for s, at in events.validations):
            continue
        if (seconds := step.wall_time - before.wall_time) > 0:
            found.append((step, seconds))
    return found


def throughput(events: Events, checkpointing_steps: int) -> tuple[float | None, str]:
    """Images a second over all timed steps, or None and the reason."""
    if not events.steps:
        return None, "n/a, the tracker recorded no step"
    timed = [(step.images, seconds) for step, seconds in intervals(events, checkpointing_steps)]
    if len(timed) < MINIMUM:
        return None, f"n/a, needs at least {WARM_UP + MINIMUM} steps in a row without a checkpoint or a validation"
    if any(images is None for images, _ in timed):
        return None, "n/a, the training script did not record how many images it received"
    rate = sum(images for images, _ in timed if images) / sum(seconds for _, seconds in timed)
    return rate, f"{rate:.3f}"


def final_loss(events: Events) -> tuple[float | None, str]:
    """Mean loss of the last steps, or None and the reason."""
    if not events.steps:
        return None, "n/a, the tracker recorded no step"
    loss = statistics.fmean(step.loss for step in events.steps[-LAST_LOSSES:])
    return (loss, f"{loss:.6f}") if math.isfinite(loss) else (None, f"n/a, the loss is {loss} (the training diverged)")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def draw(events: Events, checkpointing_steps: int, title: str) -> bytes | None:
    """Loss and images a second over the steps as a PNG, None without a step."""
    if not events.steps:
        return None
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    top.plot([step.number for step in events.steps], [step.loss for step in events.steps], marker=".", linewidth=1)
    top.set(title=title, ylabel="loss")
    timed = [(s.number, s.images / sec) for s, sec in intervals(events, checkpointing_steps) if s.images is not None]
    if timed:
        bottom.plot(*zip(*timed, strict=True), marker=".", linewidth=1, color="tab:green")
        bottom.set_ylim(bottom=0)
    else:
        bottom.text(0.5, 0.5, "n/a: too few steps", ha="center", transform=bottom.transAxes)
    bottom.set(xlabel="step", ylabel="images/s")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)
    return stream.getvalue()


def report(run_dir: Path, exit_status: int | None) -> list[str]:
    """Write the report's files into run_dir; returns the lines to print."""
    settings = json.loads((run_dir / "run_settings.json").read_text(encoding="utf-8"))
    checkpointing_steps = int(settings["checkpointing_steps"])
    events = read_events(run_dir)
    duration = time.time() - float(settings["started_at"])
    rate, rate_text = throughput(events, checkpointing_steps)
    loss, loss_text = final_loss(events)
    lines = [
        f"Final Performance images/sec : {rate_text}",
        f"Final Train Loss : {loss_text}",
        f"E2E Training Duration sec : {duration:.1f}",
    ]
    result = {
        "images_per_second": rate,
        "images_per_second_text": rate_text,
        "final_train_loss": loss,
        "final_train_loss_text": loss_text,
        "e2e_duration_seconds": round(duration, 3),
        "steps": len(events.steps),
        "last_step": events.steps[-1].number if events.steps else 0,
        "sessions": len({step.session for step in events.steps}),
        "images_received": sum(step.images or 0 for step in events.steps),
        "timed_steps": len(intervals(events, checkpointing_steps)),
        "exit_status": exit_status,
        "settings": settings,
    }
    write(run_dir / "report.json", json.dumps(result, indent=2, sort_keys=True).encode() + b"\n")
    timed = [seconds for _, seconds in intervals(events, checkpointing_steps)]
    published = {
        "Network": settings.get("script", "n/a"),
        "BatchSize": settings.get("batch_size", "n/a"),
        "DeviceType": platform.machine(),
        "CaseName": settings["case_name"],
        "ActualFPS": rate_text,
        "TrainingTime": f"{statistics.fmean(timed):.3f}" if len(timed) >= MINIMUM else "n/a",  # s a step, as published
        "ActualLoss": loss_text,
        "E2ETrainingTime": f"{duration:.1f}",
    }
    rows = [f"{key} = {value}" for key, value in {**dict(sorted(settings.items())), **published}.items()]
    write(run_dir / f"{settings['case_name']}.log", ("\n".join([*rows, *lines]) + "\n").encode())
    try:
        picture = draw(events, checkpointing_steps, settings["case_name"])
    except Exception as error:  # whatever a drawing library may do, the figures are worth more than the plot
        print(f"note: no report.png ({type(error).__name__}: {error}).", file=sys.stderr)
        picture = None
    if picture is not None:
        write(run_dir / "report.png", picture)
    for tag, epoch, index, png in events.pictures:
        write(run_dir / f"{tag}-{epoch}-{index}.png", png)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Report on a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--exit-status", type=int)
    options = parser.parse_args(arguments)
    try:
        print("\n".join(report(options.run_dir, options.exit_status)))
    except (OSError, KeyError, ValueError) as error:
        print(f"{options.run_dir} is no run directory that can be reported on ({error}).", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
