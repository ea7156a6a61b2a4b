"""Which device is taken, with stand-ins for the libraries of devices that are not here."""

from __future__ import annotations

import pytest

from sd3.common import devices


@pytest.mark.parametrize(
    ("there", "taken"), [({"npu": 8, "cuda": 1}, "npu"), ({"cuda": 2}, "cuda"), ({}, "cpu")]
)
def test_auto_takes_npu_then_cuda_then_cpu(monkeypatch: pytest.MonkeyPatch, there: dict[str, int], taken: str) -> None:
    monkeypatch.setattr(devices, "count", lambda device: 1 if device == "cpu" else there.get(device, 0))
    assert devices.detect("auto") == taken


@pytest.mark.parametrize("device", ["npu", "tpu"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.main([f"--device={device}"]) == 2
    assert f"--device={device}" in capsys.readouterr().err


def test_the_cpu_is_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.main(["--device=cpu"]) == 0
    assert capsys.readouterr().out == "cpu 1\n"
