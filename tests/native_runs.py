"""Runs of the native engine on the tiny model: whole, stopped, killed, resumed; and what they left, to be compared."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from patching import PROJECT, SCRIPTS, free_port


def command(
    kind: str,
    output: Path,
    model: Path,
    data: list[str],
    *arguments: str,
    ranks: int = 1,
    deepspeed: bool = False,
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
    script = str(PROJECT / "sd3" / "native" / SCRIPTS[kind])
    return [*launch, script, *flags(output, model, precision), *data, *arguments], env


def flags(output: Path, model: Path, precision: str) -> list[str]:
    """What all runs have in common."""
    return [
        *(f"--pretrained_model_name_or_path={model}", f"--output_dir={output}", f"--mixed_precision={precision}"),
        *("--instance_prompt=a photo of sks dog", "--resolution=64", "--learning_rate=1e-3", "--lr_warmup_steps=0"),
        f"--precompute_dir={output.parent / 'precomputed'}",
    ]


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


def forked(
    kind: str,
    output: Path,
    model: Path,
    data: list[str],
    *arguments: str,
    before: Callable[[], None] | None = None,
    entry: Callable[[str, list[str]], int] | None = None,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
) -> multiprocessing.Process:
    """Start one rank of a run in a fork of this process, which spares it the imports; its output goes to a log.

    `before` is called in the fork ahead of the run: to break something, or to have it killed. `entry` is called with
    kind and command line instead of this engine's `main`.
    """
    import sd3.native.loop  # here, once, and not in each fork

    line = [*flags(output, model, "no"), *data, *arguments]
    environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if ranks > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(
        target=_forked, args=(kind, line, log_of(output, rank), environment, before, entry or sd3.native.loop.main)
    )
    process.start()
    return process


def forked_ranks(*arguments: Any, ranks: int = 2, **settings: Any) -> list[multiprocessing.Process]:
    """Start all ranks of a run on one machine."""
    port = free_port()
    return [forked(*arguments, rank=rank, ranks=ranks, port=port, **settings) for rank in range(ranks)]


def log_of(output: Path, rank: int = 0) -> Path:
    """Where a forked rank's output goes."""
    return output.with_name(f"{output.name}-{rank}.log")


def _forked(
    kind: str, line: list[str], log: Path, environment: dict[str, str], before: Callable[[], None] | None,
    entry: Callable[[str, list[str]], int],
) -> None:  # fmt: skip
    os.environ.update(environment)
    sys.stdout = sys.stderr = log.open("a", buffering=1)  # pytest's own are not descriptors 1 and 2
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    torch.set_num_threads(1)
    logging.root.handlers.clear()  # pytest's
    AcceleratorState._reset_state(reset_partial_state=True)  # a test may have made it, of one process
    if before is not None:
        before()
    status = 1
    try:
        status = entry(kind, line)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def finished(process: multiprocessing.Process, seconds: float = 120) -> int:
    """Wait for a forked run to end; returns its exit status, negative for a signal."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError("the run hung")
    assert process.exitcode is not None
    return process.exitcode


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
    found: dict[int, float] = {}
    for session in _sessions(output, "loss"):
        for step, loss in session.items():
            assert found.setdefault(step, loss) == loss, f"step {step} differs between sessions"
    return found


def losses_of_last_session(output: Path) -> dict[int, float]:
    """Loss of each step since the last start of the run."""
    return _sessions(output, "loss")[-1]


def scalars(output: Path, tag: str) -> dict[int, float]:
    """What the tracker has of each step, of a run that was started once."""
    (session,) = _sessions(output, tag)
    return session


def _sessions(output: Path, tag: str) -> list[dict[int, float]]:
    """A scalar by step, of each start of the run."""
    from sd3.common.report_events import event_messages, scalar

    loaded = [messages for file in output.glob("logs/**/events.*") if (messages := event_messages(file))]
    sessions = []
    for messages in sorted(loaded, key=lambda found: found[0].wall_time):
        found = {
            message.step: scalar(value)
            for message in messages
            for value in message.summary.value
            if value.tag == tag
        }
        if found:
            sessions.append(found)
    return sessions


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


def weights_in(folder: Path) -> dict[str, Any]:
    """The tensors of the safetensors files of one folder, by file and name; none where it is not there."""
    return {
        f"{file.name}:{key}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


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
