"""Signals, locks, full disks, losses that are not finite: a run of the native engine ends with nothing lost."""

from __future__ import annotations

import errno
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import native_runs
from sd3.common.command_line import UserError
from sd3.common.supervise import descendants
from sd3.native.stop import alone_in

CHECKPOINTS = ["--seed=3", "--train_batch_size=1"]
ENDLESS = [*CHECKPOINTS, "--max_train_steps=100000", "--checkpointing_steps=100000"]


def arguments(output: Path, model: Path, data: Path, *more: str) -> list[object]:
    return ["lora", output, model, [f"--instance_data_dir={data}"], *more]


def training(output: Path, rank: int = 0) -> bool:
    """Has the run made a step?"""
    log = native_runs.log_of(output, rank)
    return log.exists() and "loss=" in log.read_text()


def wait_until_training(output: Path) -> None:
    deadline = time.monotonic() + 60
    while not training(output):
        assert time.monotonic() < deadline, native_runs.log_of(output).read_text()
        time.sleep(0.02)


class SignalIn:
    """Has one rank signalled within its nth call of a function of `sd3.native`."""

    def __init__(self, place: str, number: int = signal.SIGTERM, call: int = 1, rank: int = 0) -> None:
        self.place, self.number, self.call, self.rank = place, number, call, rank

    def __call__(self) -> None:
        owner, name = pkgutil.resolve_name(f"sd3.native.{self.place.rpartition('.')[0]}"), self.place.rpartition(".")[2]
        function, calls = getattr(owner, name), iter(range(1, 1_000_000))

        def signalled(*positional, **named):
            if next(calls) == self.call and os.environ.get("RANK", "0") == str(self.rank):
                os.kill(os.getpid(), self.number)
            return function(*positional, **named)

        setattr(owner, name, signalled)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    number: int, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = native_runs.forked(*arguments(output, tiny_model, dog_dir, *ENDLESS))
    wait_until_training(output)
    os.kill(process.pid, number)
    assert native_runs.finished(process) == 128 + number
    (checkpoint,) = output.glob("checkpoint-*")
    assert (checkpoint / "complete").exists()
    assert int(checkpoint.name.split("-")[1]) == max(native_runs.losses(output))
    assert f"{checkpoint.name} is complete" in native_runs.log_of(output).read_text()


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = native_runs.forked_ranks(*arguments(output, tiny_model, dog_dir, *ENDLESS))
    wait_until_training(output)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [native_runs.finished(rank) for rank in ranks] == [143, 143]
    (checkpoint,) = output.glob("checkpoint-*")
    assert (checkpoint / "complete").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_the_midst_of_a_step_ends_the_run_after_that_step(
    ranks: int, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = arguments(output, tiny_model, dog_dir, *ENDLESS, "--gradient_accumulation_steps=3")
    signals = SignalIn("step.FlowMatching.loss", call=5, rank=ranks - 1)  # the second of three in step 2
    processes = native_runs.forked_ranks(*run, before=signals, ranks=ranks)
    assert [native_runs.finished(process) for process in processes] == [143] * ranks
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("place", ["loop.write_result", "painting.Painter.paint"])
def test_a_signal_after_the_last_step_ends_the_run_once_the_result_is_written(
    place: str, tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = arguments(output, tiny_model, dog_dir, *CHECKPOINTS, "--max_train_steps=1", "--validation_prompt=a dog")
    process = native_runs.forked(*run, "--validation_epochs=100", before=SignalIn(place))
    assert native_runs.finished(process) == 143, native_runs.log_of(output).read_text()
    assert (output / "pytorch_lora_weights.safetensors").exists()
    assert "Stopped by signal 15; the result is written." in native_runs.log_of(output).read_text()


def test_the_processes_that_load_leave_signals_to_the_main_one(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    """A scheduler signals every process; the step that goes on still needs its batches."""

    def signalled() -> None:
        from sd3.native import step

        true_loss, calls = step.FlowMatching.loss, iter(range(1, 1000))

        def loss(*positional):
            if next(calls) == 2:
                for pid in descendants(os.getpid()):
                    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                        os.kill(pid, number)
                time.sleep(1)
            return true_loss(*positional)

        step.FlowMatching.loss = loss

    output = tmp_path / "run"
    run = arguments(output, tiny_model, dog_dir, *CHECKPOINTS, "--max_train_steps=8", "--dataloader_num_workers=1")
    process = native_runs.forked(*run, before=signalled)
    assert native_runs.finished(process) == 0, native_runs.log_of(output).read_text()


def test_a_file_system_without_locks_is_no_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failure = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def flock(*positional: object) -> None:
        raise failure

    monkeypatch.setattr("fcntl.flock", flock)
    with alone_in(tmp_path):
        assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text
    failure = OSError(errno.EWOULDBLOCK, "")
    with pytest.raises(UserError, match="in use by a run"), alone_in(tmp_path):
        pass


def test_a_second_signal_ends_the_run_at_once(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    def slow_checkpoints() -> None:
        from sd3.native import checkpoint

        checkpoint.Checkpoints.save = lambda *a: time.sleep(60)

    output = tmp_path / "run"
    process = native_runs.forked(*arguments(output, tiny_model, dog_dir, *ENDLESS), before=slow_checkpoints)
    wait_until_training(output)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)  # the same signal, sent twice: by a scheduler and by the launcher
    time.sleep(0.8)
    assert process.is_alive()
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert native_runs.finished(process) == 143
    assert time.monotonic() - began < 5


def test_two_runs_in_one_directory_are_one_too_many(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = native_runs.forked(*arguments(output, tiny_model, dog_dir, *ENDLESS))
    wait_until_training(output)
    assert native_runs.finished(native_runs.forked(*arguments(output, tiny_model, dog_dir, *ENDLESS))) == 2
    assert "is in use by a run that is still going" in native_runs.log_of(output).read_text()
    assert first.is_alive()
    first.kill()
    first.join()
    last = native_runs.forked(*arguments(output, tiny_model, dog_dir, *CHECKPOINTS, "--max_train_steps=1"))
    assert native_runs.finished(last) == 0


class LossAt:
    """Gives one step the loss `value`."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def __call__(self) -> None:
        from sd3.native import step as steps

        true_loss, calls = steps.FlowMatching.loss, iter(range(1, 1000))

        def loss(*positional):
            found = true_loss(*positional)
            return found * self.value if next(calls) == self.step else found

        steps.FlowMatching.loss = loss


def destroy_no_group() -> None:
    """Make the end of a process group, from which the process may not come back, an error."""
    from torch import distributed

    def destroyed(group: object = None) -> None:
        raise AssertionError("a process group is destroyed")

    distributed.destroy_process_group = destroyed


def test_ranks_end_without_destroying_their_groups(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    """A thread of gloo that drops a tensor and the thread that drops its group were seen to wait for each other."""
    run = arguments(tmp_path / "run", tiny_model, dog_dir, *CHECKPOINTS, "--max_train_steps=1")
    ranks = native_runs.forked_ranks(*run, before=destroy_no_group)
    assert [native_runs.finished(rank) for rank in ranks] == [0, 0]


ENDING = """
import atexit, sys
from sd3.native import loop

class Group:
    def __del__(self):
        print("collected")

def main(kind):
    loop.KEPT.append(Group())
    sys.stdout.write("last words, " + kind)
    {end}

atexit.register(print, "atexit")
loop.main = main
loop.train("full")
"""


@pytest.mark.parametrize(("end", "status", "shown"), [("return 7", 7, ""), ("raise ValueError('a bug')", 1, "a bug")])
def test_a_process_ends_with_what_it_said_and_collects_no_group(end: str, status: int, shown: str) -> None:
    """Ranks that collected their process groups were seen to wait for ever, their results written."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDING.format(end=end)], cwd=native_runs.PROJECT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (status, "last words, full")
    assert shown in ended.stderr and ("Traceback" in ended.stderr) == bool(shown)


class GradientAt:
    """Makes the gradient of a step infinite, the loss being as it should."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        import accelerate

        true_backward, calls = accelerate.Accelerator.backward, iter(range(1, 1000))

        def backward(self_: accelerate.Accelerator, loss: torch.Tensor) -> None:
            true_backward(self_, loss)
            if next(calls) == self.step:
                for model in self_._models:
                    next(p.grad for p in model.parameters() if p.grad is not None).fill_(float("inf"))

        accelerate.Accelerator.backward = backward


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (LossAt(4, float("nan")), "the loss of step 4 is nan (pictures: 0"),
        (GradientAt(4), "the gradient's norm of step 4 is"),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run_before_it_reaches_a_checkpoint(
    tiny_model: Path, dog_dir: Path, tmp_path: Path, spoil: LossAt | GradientAt, says: str
) -> None:
    output = tmp_path / "run"
    run = arguments(
        output, tiny_model, dog_dir, *CHECKPOINTS, "--max_train_steps=6", "--checkpointing_steps=2", "--log_every=50"
    )
    assert native_runs.finished(native_runs.forked(*run, before=spoil)) == 1
    log = native_runs.log_of(output).read_text()
    assert says in log
    assert f"The last good checkpoint: {output / 'checkpoint-2'}" in log
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    on = native_runs.forked(*run, "--continue_on_nonfinite", before=spoil)
    assert native_runs.finished(on) == 0


def no_room() -> None:
    """No file may grow beyond 200 kB, which ends a write as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(
    tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = ["full", *arguments(output, tiny_model, dog_dir, *CHECKPOINTS, "--checkpointing_steps=2")[1:]]
    assert native_runs.finished(native_runs.forked(*run, "--max_train_steps=2")) == 0
    resume = [*run, "--max_train_steps=6", "--resume_from_checkpoint=latest"]
    assert native_runs.finished(native_runs.forked(*resume, before=no_room)) == 1
    log = native_runs.log_of(output).read_text()
    assert f"{output / 'checkpoint-4'} could not be written" in log
    assert f"The last good checkpoint: {output / 'checkpoint-2'}" in log
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-2"]
    assert not list(output.glob(".checkpoint-*"))
    assert native_runs.finished(native_runs.forked(*resume)) == 0


def test_a_full_disk_while_the_result_is_written_is_said_and_can_be_resumed(
    tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    def full_disk() -> None:
        from sd3.native import outputs

        def sync(path: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        outputs.sync = sync

    output = tmp_path / "run"
    run = arguments(output, tiny_model, dog_dir, *CHECKPOINTS, "--checkpointing_steps=2", "--max_train_steps=2")
    assert native_runs.finished(native_runs.forked(*run, before=full_disk)) == 1
    assert "the result could not be written" in native_runs.log_of(output).read_text()
    assert not (output / "pytorch_lora_weights.safetensors").exists()
    assert native_runs.finished(native_runs.forked(*run, "--resume_from_checkpoint=latest")) == 0
    assert (output / "pytorch_lora_weights.safetensors").exists()


def test_a_disk_that_is_full_elsewhere_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from sd3.native import loop

    def run(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/class-00001.png")

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(loop, "start_accelerator", lambda options: SimpleNamespace(is_main_process=False))
    assert loop.main("lora", native_runs.flags(tmp_path / "run", tmp_path, "no") + ["--instance_data_dir=d"]) == 1
    said = capsys.readouterr().err
    assert said == "/a/class-00001.png: No space left on device; free some space and resume.\n"
    monkeypatch.setattr(loop, "run", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        loop.main("lora", native_runs.flags(tmp_path / "run", tmp_path, "no") + ["--instance_data_dir=d"])


def test_what_a_model_cannot_do_is_refused_before_anything_is_computed(
    tiny_model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    for flag, says in (
        ("--resolution=512", "--resolution=512 is more than the model was made for; give at most"),
        ("--variant=fp16", f"--variant=fp16: {tiny_model} has no such weights for transformer"),
    ):
        output = tmp_path / flag.split("=")[0]
        run = arguments(output, tiny_model, dog_dir, flag)
        assert native_runs.finished(native_runs.forked(*run)) == 2
        assert says in native_runs.log_of(output).read_text()
        assert not (tmp_path / "precomputed").exists()
