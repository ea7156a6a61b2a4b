"""Optimizers and schedules by their flags: what is built, with which settings, what it computes, alone and on ranks."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler

from native_parts import options
from native_runs import finished, forked, log_of, scalars
from sd3.common.command_line import UserError
from sd3.native.loop import optimize, refuse_sharding
from sd3.native.optimizer import make_lr_schedule, make_optimizer, scaled_learning_rate
from sd3.native.options import LR_SCHEDULERS
from sd3.native.step import Batch

LOGGER = logging.getLogger("test_native_optimizer")
ADAM = {"betas": (0.9, 0.999), "weight_decay": 1e-4, "eps": 1e-8}


def make_groups(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """A transformer's parameters and a text encoder's."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 5), (7,), (4, 4))
    first, second, third = (torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes)
    return [{"params": [first, second], "lr": 1e-2}, {"params": [third], "lr": 5e-3, "weight_decay": 1e-3}]


class Recorder(torch.optim.SGD):
    """Stands in for an optimizer of a package that is not installed."""

    def __init__(self, groups: list[dict[str, Any]], **settings: object) -> None:
        self.given = settings
        super().__init__([{key: group[key] for key in ("params", "lr")} for group in groups], lr=1.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.set_to_none = set_to_none


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes, prodigyopt and torch_npu, each with a Recorder."""
    bitsandbytes = types.ModuleType("bitsandbytes")
    bitsandbytes.optim = types.SimpleNamespace(AdamW8bit=Recorder)
    prodigyopt = types.ModuleType("prodigyopt")
    prodigyopt.Prodigy = Recorder
    npu, npu_optim = types.ModuleType("torch_npu"), types.ModuleType("torch_npu.optim")
    npu_optim.NpuFusedAdamW = Recorder
    for module in (bitsandbytes, prodigyopt, npu, npu_optim):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def trained(how: str) -> list[torch.Tensor]:
    """Parameters after ten steps of AdamW on a curved loss."""
    groups = make_groups()
    optimizer = make_optimizer(options(f"--adamw={how}"), groups, "cpu", LOGGER)
    for _ in range(10):
        optimizer.zero_grad()
        sum((parameter.sin() ** 2).sum() for group in groups for parameter in group["params"]).backward()
        optimizer.step()
    return [parameter.detach() for group in groups for parameter in group["params"]]


@pytest.mark.parametrize("how", ["auto", "fused", "foreach"])
def test_every_adamw_computes_the_same(how: str) -> None:
    torch.testing.assert_close(trained(how), trained("loop"), rtol=1e-5, atol=1e-6)


def test_adamw_has_the_settings_of_the_flags() -> None:
    flags = ("--adam_beta1=0.8", "--adam_beta2=0.9", "--adam_weight_decay=0.5", "--adam_epsilon=1e-6")
    first, second = make_optimizer(options(*flags), make_groups(), "cpu", LOGGER).param_groups
    assert (first["betas"], first["weight_decay"], first["eps"], first["lr"]) == ((0.8, 0.9), 0.5, 1e-6, 1e-2)
    assert (second["betas"], second["weight_decay"], second["lr"]) == ((0.8, 0.9), 1e-3, 5e-3)


@pytest.mark.parametrize(("how", "kept"), [("fused", True), ("foreach", None), ("loop", None)])
def test_the_adamw_asked_for_is_taken(how: str, kept: bool | None) -> None:
    group = make_optimizer(options(f"--adamw={how}"), make_groups(), "cpu", LOGGER).param_groups[0]
    assert (group["fused"], group["foreach"]) == (kept, {"foreach": True, "loop": False}.get(how))


def test_without_a_fused_adamw_another_is_taken_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = torch.optim.AdamW.__init__

    def without_fused(self: torch.optim.AdamW, groups: list, fused: bool = False, **settings: object) -> None:
        """As torch 2.1 has it on a CPU: it notes its defaults in the groups, then refuses."""
        if fused:
            for group in groups:
                group["fused"] = True
            raise RuntimeError("`fused=True` requires CUDA.\nmore")
        plain(self, groups, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", without_fused)
    group = make_optimizer(options(), make_groups(), "cpu", LOGGER).param_groups[0]
    assert (group["fused"], group["foreach"]) == (None, False)
    assert make_optimizer(options(), make_groups(), "cuda", LOGGER).param_groups[0]["foreach"] is True
    with pytest.raises(UserError, match="requires CUDA.; use --adamw=auto"):
        make_optimizer(options("--adamw=fused"), make_groups(), "cpu", LOGGER)


def test_an_npu_has_its_own(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = make_optimizer(options(), make_groups(), "npu", LOGGER)
    assert isinstance(fused, Recorder) and fused.given == ADAM
    fused.zero_grad(set_to_none=True)
    assert fused.set_to_none is False
    assert type(make_optimizer(options(), make_groups(torch.bfloat16), "npu", LOGGER)) is torch.optim.AdamW
    with pytest.raises(UserError, match="float32 and float16 alone"):
        make_optimizer(options("--adamw=fused"), make_groups(torch.bfloat16), "npu", LOGGER)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert type(make_optimizer(options(), make_groups(), "npu", LOGGER)) is torch.optim.AdamW


def test_8bit_adam(packages: None) -> None:
    made = make_optimizer(options("--use_8bit_adam"), make_groups(), "cuda", LOGGER)
    assert made.given == ADAM
    assert [group["lr"] for group in made.param_groups] == [1e-2, 5e-3]


def test_prodigy_has_one_learning_rate(packages: None, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--optimizer=Prodigy", "--prodigy_beta3=0.5", "--prodigy_decouple=false", "--use_8bit_adam")
    made = make_optimizer(options(*flags), make_groups(), "cpu", LOGGER)
    own = {"beta3": 0.5, "decouple": False, "use_bias_correction": True, "safeguard_warmup": True}
    assert made.given == ADAM | own
    assert [group["lr"] for group in made.param_groups] == [1e-2, 1e-2]
    for word in ("--use_8bit_adam does nothing", "0.01 is low", "not 5e-06"):
        assert word in caplog.text


def test_prodigy_at_one_warns_of_nothing(packages: None, caplog: pytest.LogCaptureFixture) -> None:
    make_optimizer(options("--optimizer=prodigy"), [make_groups()[0] | {"lr": 1.0}], "cpu", LOGGER)
    assert not caplog.records


@pytest.mark.parametrize(
    ("flag", "package"), [("--use_8bit_adam", "bitsandbytes"), ("--optimizer=prodigy", "prodigyopt")]
)
def test_missing_packages(flag: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}") as error:
        make_optimizer(options(flag), make_groups(), "cpu", LOGGER)
    assert error.value.status == 3


def test_an_unknown_optimizer_is_adamw(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(make_optimizer(options("--optimizer=lion"), make_groups(), "cpu", LOGGER), torch.optim.AdamW)
    assert "--optimizer=lion is not known" in caplog.text


def rates(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int, calls: int) -> list[float]:
    """The transformer's learning rate of each step where the schedule is stepped `calls` times after it."""
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        for _ in range(calls):
            schedule.step()
    return found


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_one_call_a_step_is_what_one_a_rank_was(name: str, ranks: int) -> None:
    given = options(f"--lr_scheduler={name}", "--lr_warmup_steps=4", "--lr_num_cycles=2", "--lr_power=2")
    ours = make_lr_schedule(given, torch.optim.AdamW(make_groups()), 20)
    stretched = get_scheduler(
        name, torch.optim.AdamW(make_groups()), num_warmup_steps=4 * ranks, num_training_steps=20 * ranks,
        num_cycles=2, power=2.0,
    )  # fmt: skip
    found = rates(ours, 20, 1)
    assert found == pytest.approx(rates(stretched, 20, ranks))
    assert (found[0] < found[4]) == (name != "constant")
    assert found[4] == pytest.approx(1e-2)


class SkippedAt:
    """Has accelerate say that a step was skipped, as after an overflow in fp16, which no CPU trains in."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        answers = itertools.count(1)
        AcceleratedOptimizer.step_was_skipped = property(lambda self_: next(answers) == self.step)


def test_a_step_that_was_skipped_is_none_of_the_schedules(tiny_model: Path, dog_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = ("lora", output, tiny_model, [f"--instance_data_dir={dog_dir}"], "--max_train_steps=5", "--rank=2")
    assert finished(forked(*run, "--lr_scheduler=linear", before=SkippedAt(2))) == 0
    assert list(scalars(output, "lr").values()) == pytest.approx([1e-3, 8e-4, 8e-4, 6e-4, 4e-4])


@pytest.mark.parametrize(("skipped", "norm"), [(False, 2.0), (True, math.inf)])
def test_a_deepspeed_overflow_is_no_norm_of_the_step_before(skipped: bool, norm: float) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    accelerator = types.SimpleNamespace(
        accumulate=lambda model: contextlib.nullcontext(), backward=torch.Tensor.backward, sync_gradients=True,
        distributed_type=DistributedType.DEEPSPEED,
    )  # fmt: skip
    optimizer = types.SimpleNamespace(step=lambda: None, zero_grad=lambda: None, step_was_skipped=skipped)
    model = types.SimpleNamespace(get_global_grad_norm=lambda: 2.0)
    flow = types.SimpleNamespace(timesteps=range(1000), loss=lambda *_: weight.sum())
    text = (torch.zeros(1, 1, 1), torch.zeros(1, 1))
    batch = Batch(torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 2), text, [0])
    loss, found = optimize(options(), 0, accelerator, model, optimizer, flow, iter([batch]))
    assert (loss.item(), found.item()) == (1.0, norm)


def test_scaled_learning_rate() -> None:
    sizes = ("--learning_rate=1e-4", "--train_batch_size=2", "--gradient_accumulation_steps=3")
    assert scaled_learning_rate(options(*sizes), 4) == 1e-4
    assert scaled_learning_rate(options(*sizes, "--scale_lr"), 4) == pytest.approx(24e-4)


# ---- on several ranks


def launched(kind: DistributedType, stage: int | None = None) -> Any:
    """An accelerator of a launch configuration."""
    config = {} if stage is None else {"zero_optimization": {"stage": stage}}
    plugin = types.SimpleNamespace(deepspeed_config=config)
    return types.SimpleNamespace(distributed_type=kind, state=types.SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(
    ("accelerator", "named"),
    [
        (launched(DistributedType.DEEPSPEED, 3), "DeepSpeed's ZeRO stage 3"),
        (launched(DistributedType.DEEPSPEED), "DeepSpeed's ZeRO stage 0"),  # whose gradient norm is not always told
        (launched(DistributedType.FSDP), "FSDP"),
        (launched(DistributedType.MEGATRON_LM), "MEGATRON_LM"),
    ],
)
def test_launch_configurations_that_do_not_go_are_refused(accelerator: Any, named: str) -> None:
    with pytest.raises(UserError, match=f"^{named} .* is not supported.*; launch .* ZeRO stage 1 or 2") as refusal:
        refuse_sharding(accelerator)
    assert refusal.value.status == 2


def test_what_keeps_the_model_whole_is_not_refused() -> None:
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_NPU):
        refuse_sharding(launched(kind))
    for stage in (1, 2):
        refuse_sharding(launched(DistributedType.DEEPSPEED, stage))


def test_a_run_that_would_shard_ends_at_once(tmp_path: Path) -> None:
    def before() -> None:
        Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)

    output = tmp_path / "run"
    assert finished(forked("full", output, tmp_path / "no model", ["--instance_data_dir=d"], before=before)) == 2
    assert log_of(output).read_text(encoding="utf-8").startswith("FSDP in the launch configuration")
