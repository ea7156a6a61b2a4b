"""Runs of the native engine on the tiny model: whole, stopped, killed, resumed; and what they left, to be compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from patching import PROJECT, SCRIPTS, free_port
from safetensors.torch import load_file


def command(
    kind: str, output: Path, model: Path, data: list[str], *arguments: str, ranks: int = 1, deepspeed: bool = False,
    precision: str = "no",
) -> tuple[list[str], dict[str, str]]:
    """The command of a run, and its environment."""
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--dynamo_backend=no"),
        *(f"--num_processes={ranks}", f"--mixed_precision={precision}", f"--main_process_port={free_port()}"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    env.pop("ACCELERATE_USE_CPU", None)
    if deepspeed:
        launch += ["--use_deepspeed", "--zero_stage=2", "--deepspeed_multinode_launcher=standard"]
        launch += ["--gradient_accumulation_steps=1"]
    else:
        env["ACCELERATE_USE_CPU"] = "true"
        launch.append("--cpu" if ranks == 1 else "--multi_gpu")
    return [
        *(*launch, str(PROJECT / "sd3" / "native" / SCRIPTS[kind])),
        *(f"--pretrained_model_name_or_path={model}", f"--output_dir={output}", f"--mixed_precision={precision}"),
        *("--instance_prompt=a photo of sks dog", "--resolution=64", "--learning_rate=1e-3", "--lr_warmup_steps=0"),
        *(f"--precompute_dir={output.parent / 'precomputed'}", *data, *arguments),
    ], env


def start(*arguments: Any, **settings: Any) -> subprocess.Popen[str]:
    """A run that goes on while the test does something to it; in a process group of its own."""
    line, env = command(*arguments, **settings)
    return subprocess.Popen(
        line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(*arguments: Any, timeout: float = 240, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A run to its end."""
    process = start(*arguments, **settings)
    try:
        log, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        log, _ = process.communicate()
        raise AssertionError(f"the run hung:\n{log}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, log)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Signal a run and all its ranks."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def wait_for(found: Any, process: subprocess.Popen[str], seconds: float = 120) -> bool:
    """Wait until `found()` is true, or the process has ended; was it true?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found():
            return True
        if process.poll() is not None:
            return bool(found())
        time.sleep(0.01)
    return False


def losses(output: Path) -> dict[int, float]:
    """Loss of each step over all sessions; a step made again must have come out the same."""
    from sd3.common.report_events import event_messages, scalar

    found: dict[int, float] = {}
    for file in output.glob("logs/**/events.*"):
        for message in event_messages(file):
            for value in message.summary.value:
                if value.tag == "loss":
                    loss = scalar(value)
                    assert found.setdefault(message.step, loss) == loss, f"step {message.step} differs between sessions"
    return found


def state(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint by name: tensors, and what its JSON says."""
    found: dict[str, Any] = {}
    for file in sorted(checkpoint.rglob("*")):
        name = file.relative_to(checkpoint).as_posix()
        if file.suffix == ".safetensors":
            found |= {f"{name}:{key}": tensor for key, tensor in load_file(file).items()}
        elif file.name == "state.json":
            found |= {f"{name}:{key}": value for key, value in json.loads(file.read_text(encoding="utf-8")).items()}
        elif file.suffix == ".pt":
            found |= dict(_tensors(name, torch.load(file, weights_only=False)))
    return found


def _tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors anywhere inside a nested structure, by their path."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in _tensors(f"{name}/{key}", inner)]
    if isinstance(value, list | tuple):
        return [found for i, inner in enumerate(value) for found in _tensors(f"{name}/{i}", inner)]
    return []


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both states hold the same, bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
