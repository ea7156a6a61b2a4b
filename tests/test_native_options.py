"""The flags of the native engine: those of the pinned scripts with their defaults, its own, and its refusals."""

from __future__ import annotations

import argparse
import ast
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from native_parts import NEEDED
from sd3.common.command_line import UserError
from sd3.native.options import PROJECT, SECRETS, TRACKERS, block_numbers, build_parser, flags, parse, public, truth

DEFAULTS: dict[str, Any] = {
    "pretrained_model_name_or_path": None, "revision": None, "variant": None, "dataset_name": None,
    "dataset_config_name": None, "dataset_split": "train", "instance_data_dir": None, "cache_dir": None,
    "image_column": "image",
    "caption_column": None, "repeats": 1, "class_data_dir": None, "instance_prompt": None, "class_prompt": None,
    "max_sequence_length": 77, "validation_prompt": None, "num_validation_images": 4, "validation_epochs": 50,
    "with_prior_preservation": False, "prior_loss_weight": 1.0, "num_class_images": 100,
    "output_dir": "sd3-dreambooth", "seed": None, "resolution": 512, "center_crop": False, "random_flip": False,
    "train_text_encoder": False, "train_batch_size": 4, "sample_batch_size": 4, "num_train_epochs": 1,
    "max_train_steps": None, "checkpointing_steps": 500, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "learning_rate": 1e-4, "text_encoder_lr": 5e-6, "scale_lr": False, "lr_scheduler": "constant",
    "lr_warmup_steps": 500, "lr_num_cycles": 1, "lr_power": 1.0, "dataloader_num_workers": 0,
    "weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29,
    "precondition_outputs": 1, "optimizer": "AdamW", "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "prodigy_beta3": None, "prodigy_decouple": True, "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3, "adam_epsilon": 1e-8, "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True, "max_grad_norm": 1.0, "push_to_hub": False, "hub_token": None,
    "hub_model_id": None, "logging_dir": "logs", "allow_tf32": False, "report_to": "tensorboard",
    "mixed_precision": None, "prior_generation_precision": None, "local_rank": -1,
}  # fmt: skip
LORA_DEFAULTS = {
    "rank": 4, "lora_layers": None, "lora_blocks": None, "cache_latents": False, "upcast_before_saving": False
}  # fmt: skip
OWN_DEFAULTS = {
    "precompute_dir": PROJECT / "build" / "precomputed", "vae_precision": "auto", "compile_blocks": False,
    "attention": "auto", "adamw": "auto", "checkpointed_blocks": "all", "keep_every": None, "log_every": None,
    "profile": 0, "continue_on_nonfinite": False,
}  # fmt: skip
EXPECTED = {"full": DEFAULTS, "lora": DEFAULTS | LORA_DEFAULTS}
SCRIPTS = {"full": "train_dreambooth_sd3.py", "lora": "train_dreambooth_lora_sd3.py"}


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def refused(*arguments: str, kind: str = "lora") -> str:
    with pytest.raises(UserError) as error:
        parse(kind, arguments)
    assert error.value.status == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", EXPECTED)
def test_flags_and_defaults(kind: str) -> None:
    assert (len(EXPECTED["full"]), len(EXPECTED["lora"])) == (70, 75)
    found = {flag.name: flag.default for flag in flags(kind)}
    assert found == EXPECTED[kind] | OWN_DEFAULTS
    given = {"pretrained_model_name_or_path": "m", "instance_prompt": "a dog", "instance_data_dir": "d"}
    assert vars(parse(kind, NEEDED)) == found | given


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_flag_has_a_help_text(kind: str) -> None:
    assert all(flag.help and not flag.help.endswith(".") for flag in flags(kind))
    shown = build_parser(kind).format_help()
    assert all(f"--{flag.name}" in shown for flag in flags(kind))


def test_values_arrive_with_their_types() -> None:
    found = parse("lora", [*NEEDED, "--rank=8", "--learning_rate=1", "--precompute_dir=p", "--scale_lr", "--seed=0"])
    assert (found.rank, found.learning_rate, found.precompute_dir) == (8, 1.0, Path("p"))
    assert (found.scale_lr, found.seed) == (True, 0)


def test_flags_of_lora_alone_are_unknown_to_the_full_script() -> None:
    assert "unrecognized" in refused(*NEEDED, "--rank=4", kind="full")


def test_prodigy_takes_false_for_no() -> None:
    assert not parse("full", [*NEEDED, "--prodigy_decouple=False"]).prodigy_decouple
    assert truth("True") and truth("1") and not truth("no")
    assert "neither true nor false" in refused(*NEEDED, "--prodigy_decouple=maybe")


def test_the_environment_knows_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parse("full", [*NEEDED, "--local_rank=1"]).local_rank == 3


def test_one_source_of_data() -> None:
    assert "neither" in refused(*NEEDED[:2])
    assert "both" in refused(*NEEDED, "--dataset_name=x")


def test_prior_preservation_needs_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--class_data_dir" in refused(*NEEDED, "--with_prior_preservation", "--class_prompt=dog")
    assert "--class_prompt" in refused(*NEEDED, "--with_prior_preservation", "--class_data_dir=c")
    parse("full", [*NEEDED, "--class_prompt=dog"])
    assert "--class_prompt does nothing" in capsys.readouterr().err


def test_idle_flags_are_noted_by_one_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parse("full", [*NEEDED, "--checkpointed_blocks=0-1"])
    assert "without --gradient_checkpointing" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    parse("full", [*NEEDED, "--checkpointed_blocks=0-1"])
    assert not capsys.readouterr().err


def test_a_token_is_not_shown_to_wandb() -> None:
    message = refused(*NEEDED, "--report_to=wandb", "--hub_token=hf_secret")
    assert "--hub_token" in message and "hf_secret" not in message


@pytest.mark.parametrize(("side", "remedy"), [(72, "64 or 80"), (500, "496 or 512"), (8, "16"), (513, "512 or 528")])
def test_a_resolution_that_the_model_cannot_have(side: int, remedy: str) -> None:
    assert refused(*NEEDED, f"--resolution={side}") == (
        f"--resolution={side} is no multiple of 16, as the model needs; give {remedy}."
    )
    assert parse("full", [*NEEDED, "--resolution=1040"]).resolution == 1040


def test_an_unknown_tracker() -> None:
    message = refused(*NEEDED, "--report_to=bogus")
    assert message.startswith("--report_to=bogus is not known; use one of tensorboard, wandb, comet_ml, all")


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml"])
def test_a_tracker_that_is_not_installed(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UserError, match=f"^--report_to={tracker} needs {tracker}.*; pip install {tracker}") as error:
        parse("lora", [*NEEDED, f"--report_to={tracker}"])
    assert error.value.status == 3
    there = types.ModuleType(tracker)
    there.__spec__ = importlib.machinery.ModuleSpec(tracker, None)
    monkeypatch.setitem(sys.modules, tracker, there)
    assert parse("lora", [*NEEDED, f"--report_to={tracker}"]).report_to == tracker


def test_every_tracker_is_one_that_accelerate_has() -> None:
    from accelerate.utils import LoggerType

    assert set(TRACKERS) <= set(LoggerType.list())


def test_a_profile_that_the_run_is_too_short_for_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, profiled in (("3", "1"), ("1", "0")):
        parse("full", [*NEEDED, "--profile=5", f"--max_train_steps={steps}"])
        assert f"--profile=5 will profile {profiled} steps" in capsys.readouterr().err
    parse("full", [*NEEDED, "--profile=5", "--max_train_steps=7"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "argument",
    [
        "--train_batch_size=0", "--rank=-1", "--learning_rate=nan", "--learning_rate=inf", "--adam_beta1=1",
        "--lr_warmup_steps=-1", "--max_grad_norm=0", "--seed=-1", "--seed=4294967296", "--keep_every=0",
        "--precondition_outputs=2", "--logit_mean=nan", "--prodigy_beta3=1.5",
    ],
)  # fmt: skip
def test_numbers_out_of_range(argument: str) -> None:
    assert refused(*NEEDED, argument).startswith(f"{argument.split('=')[0]}=")


@pytest.mark.parametrize(
    "argument",
    [
        "--weighting_scheme=x", "--rank=four", "--lr_scheduler=piecewise_constant", "--lora_blocks=1-3",
        "--lora_blocks=", "--checkpointed_blocks=x", "--inst=abbreviated", "--adamw=x", "--report=wandb",
    ],
)  # fmt: skip
def test_texts_without_a_meaning(argument: str) -> None:
    assert argument.split("=")[0] in refused(*NEEDED, argument)


def test_block_numbers() -> None:
    assert block_numbers("all", 4) == {0, 1, 2, 3}
    assert block_numbers("none", 4) == set()
    assert block_numbers("0-2,5", 6) == {0, 1, 2, 5}


@pytest.mark.parametrize(
    ("spec", "why"),
    [("0-6", "0 to 5"), ("6", "0 to 5"), ("3-1", "backwards"), ("1,,2", "not known"), ("", "not known")],
)
def test_wrong_block_numbers(spec: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        block_numbers(spec, 6)


def test_secrets_are_not_public() -> None:
    shown = public(parse("lora", [*NEEDED, "--hub_token=hf_secret"]))
    assert set(shown) == set(EXPECTED["lora"] | OWN_DEFAULTS) - SECRETS
    assert "hf_secret" not in repr(shown)
    assert all(isinstance(value, bool | int | float | str | None) for value in shown.values())


def declared(script: Path) -> dict[str, dict[str, Any]]:
    """What add_argument is given in a script, by flag: type as its name, everything else as its value."""
    found = {}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            settings = {
                word.arg: word.value.id if word.arg == "type" else ast.literal_eval(word.value)
                for word in node.keywords
                if word.arg != "help"
            }
            found[ast.literal_eval(node.args[0])] = settings
    return found


def as_declared(action: argparse.Action) -> dict[str, Any]:
    """An action of our parser in the same words, with argparse's own defaults filled in."""
    kind = action.type or str
    return {
        "type": "bool" if kind is truth else kind.__name__,
        "default": action.default,
        "choices": action.choices and list(action.choices),
        "required": action.required,
        "action": "store_true" if action.nargs == 0 else "store",
    }


@pytest.mark.upstream
@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_pinned_script_has_the_same_flags(kind: str, upstream_checkout: Path) -> None:
    theirs = declared(upstream_checkout / "examples" / "dreambooth" / SCRIPTS[kind])
    ours = {action.option_strings[0]: action for action in build_parser(kind)._actions if action.dest != "help"}
    assert set(ours) - set(theirs) == {f"--{name}" for name in OWN_DEFAULTS}
    for name, settings in theirs.items():
        is_switch = settings.get("action") == "store_true"
        filled = {"type": "str", "default": False if is_switch else None, "choices": None, "required": False}
        assert as_declared(ours[name]) == filled | {"action": "store"} | settings, name
        assert ours[name].dest == name.removeprefix("--")
