"""Each YAML and JSON under sd3/ is accepted by the pinned accelerate and DeepSpeed, and holds no key they ignore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from repository import MODELS, PROJECT, relative, tracked_files

SD3 = PROJECT / "sd3"
YAMLS = [path for path in tracked_files() if path.suffix in {".yaml", ".yml"} and SD3 in path.parents]
JSONS = [
    path
    for path in tracked_files()
    if path.suffix == ".json" and SD3 in path.parents and not relative(path).startswith(tuple(MODELS))
]
# What accelerate puts in place of "auto" when a run starts.
AUTO = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 1,
    "gradient_clipping": 1.0,
}


def validated(path: Path, *extra: str):
    """The launch arguments accelerate makes of a configuration file; raises where it refuses."""
    arguments = ["--config_file", str(path), "--num_processes", "2", *extra, "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def ignored_keys(path: Path) -> list[str]:
    """Keys in a YAML's inner tables that are no launch argument: accelerate takes them and forgets them."""
    known = vars(launch_command_parser().parse_args(["train.py"]))
    tables = [table for table in yaml.safe_load(path.read_text(encoding="utf-8")).values() if isinstance(table, dict)]
    return [key for table in tables for key in table if key not in known]


def without_auto(config: dict) -> dict:
    """The configuration with each "auto" filled in, as accelerate does, or left out."""
    filled = {}
    for key, value in config.items():
        if isinstance(value, dict):
            filled[key] = without_auto(value)
        elif value != "auto":
            filled[key] = value
        elif key in AUTO:
            filled[key] = AUTO[key]
    return filled


def parsed_by_deepspeed(config: dict) -> list[str]:
    """Has DeepSpeed parse a configuration; returns the top-level keys it does not know."""
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime import constants, zero
    from deepspeed.runtime.activation_checkpointing import config as activation_checkpointing

    runtime.DeepSpeedConfig(without_auto(config))
    known = {
        value
        for module in (constants, zero.config, runtime, activation_checkpointing)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    return [key for key in config if key not in known]


def test_there_are_configurations() -> None:
    assert {path.name for path in YAMLS} >= {
        "accelerate_config.yaml",
        "bf16_accelerate_config.yaml",
        "fp16_accelerate_config.yaml",
    }
    assert {path.name for path in JSONS} >= {"deepspeed_fp16.json"}


@pytest.mark.parametrize("path", YAMLS, ids=relative)
def test_accelerate_accepts(path: Path) -> None:
    assert load_config_from_file(str(path)) is not None
    arguments = validated(path)
    assert arguments.num_processes == 2
    assert not ignored_keys(path)
    if "deepspeed" not in path.read_text(encoding="utf-8").lower():
        assert not arguments.use_deepspeed


@pytest.mark.parametrize("path", JSONS, ids=relative)
def test_deepspeed_accepts(path: Path) -> None:
    assert parsed_by_deepspeed(json.loads(path.read_text(encoding="utf-8"))) == []


def test_a_wrong_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("distributed_type: 'NO'\nno_such_key: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no_such_key"):
        validated(path)
    path.write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stge: 2\n", encoding="utf-8")
    assert ignored_keys(path) == ["zero_stge"]


@pytest.mark.parametrize(
    "wrong", [{"zero_optimization": {"stge": 2}}, {"zero_optimization": {"stage": 9}}, {"train_batch_size": 0}]
)
def test_a_wrong_json_is_refused(wrong: dict) -> None:
    with pytest.raises((ValueError, AssertionError)):
        parsed_by_deepspeed({"train_micro_batch_size_per_gpu": 1, **wrong})


def test_an_unknown_json_key_is_seen() -> None:
    assert parsed_by_deepspeed({"train_micro_batch_size_per_gpu": 1, "fp_16": {"enabled": True}}) == ["fp_16"]
