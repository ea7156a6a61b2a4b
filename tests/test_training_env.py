"""The Ascend variables: defaults, ranges, and that the user's export wins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
NAMES = (
    "ASCEND_SLOG_PRINT_TO_STDOUT", "ASCEND_GLOBAL_LOG_LEVEL", "ASCEND_GLOBAL_EVENT_ENABLE", "TASK_QUEUE_ENABLE",
    "COMBINED_ENABLE", "HCCL_WHITELIST_DISABLE", "CPU_AFFINITY_CONF", "HCCL_CONNECT_TIMEOUT", "ACLNN_CACHE_LIMIT",
    "TOKENIZERS_PARALLELISM", "PYTORCH_NPU_ALLOC_CONF", "OMP_NUM_THREADS", "HCCL_EXEC_TIMEOUT",
)  # fmt: skip


def environment_on(device: str, **env: str) -> tuple[int, dict[str, str], str]:
    clean = {key: value for key, value in os.environ.items() if key not in NAMES}
    result = subprocess.run(
        ["bash", "-c", 'set -eu; . sd3/launch/ascend_env.sh; set_training_env "$1"; env', "bash", device],
        cwd=PROJECT, env={**clean, **env}, capture_output=True, text=True,
    )  # fmt: skip
    pairs = (line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    return result.returncode, {key: value for key, value in pairs if key in NAMES}, result.stderr


def test_an_npu_gets_all_of_them() -> None:
    status, seen, _ = environment_on("npu")
    assert status == 0
    assert set(seen) == set(NAMES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_elsewhere_only_what_means_something_is_set(device: str) -> None:
    assert set(environment_on(device)[1]) == {"TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"}


def test_the_users_export_wins() -> None:
    _, seen, _ = environment_on("npu", HCCL_CONNECT_TIMEOUT="7200", CPU_AFFINITY_CONF="2,npu0:0-3")
    assert seen["HCCL_CONNECT_TIMEOUT"] == "7200"
    assert seen["CPU_AFFINITY_CONF"] == "2,npu0:0-3"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HCCL_CONNECT_TIMEOUT", "119"), ("HCCL_CONNECT_TIMEOUT", "7201"), ("HCCL_CONNECT_TIMEOUT", "long"),
        ("TASK_QUEUE_ENABLE", "3"), ("ASCEND_GLOBAL_LOG_LEVEL", "5"), ("COMBINED_ENABLE", "yes"),
        ("TOKENIZERS_PARALLELISM", "1"), ("OMP_NUM_THREADS", "0"),
    ],
)  # fmt: skip
def test_a_value_out_of_its_range_is_refused_by_name(name: str, value: str) -> None:
    status, _, said = environment_on("npu", **{name: value})
    assert status == 2
    assert f"{name}={value} is out of range; expected" in said
