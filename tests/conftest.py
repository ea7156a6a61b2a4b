"""What the tests share: prepared directories, made once, and an honest account of what was skipped."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulated_npu import EmulatedNpu, built_or_skipped
from prepared import PROJECT, prepared

MAY_SKIP = ("upstream", "npu")  # markers of tests that need something a machine may not have

# A shell that starts the tests in the background has them ignore Ctrl-C, nohup a closed terminal, and all that they
# start ignores it too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --full the long tests are left out, which is not the same as skipped."""
    if config.getoption("--full"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that skips without a marker of MAY_SKIP is a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not any(map(item.get_closest_marker, MAY_SKIP)) and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        may = " or ".join(f"`{name}`" for name in MAY_SKIP)
        report.longrepr = f"{item.nodeid} was skipped, but only tests marked {may} may be: {report.longrepr}"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A whole SD3 pipeline directory with random weights."""
    from sd3.common.tiny_sd3 import make_tiny_sd3

    return prepared("tiny-sd3", make_tiny_sd3)


@pytest.fixture(scope="session")
def dog_dir() -> Path:
    """Five pictures of one subject."""
    from sd3.common.synthetic_data import make_dog

    return prepared("dog", make_dog)


@pytest.fixture(scope="session")
def pokemon_dir() -> Path:
    """Eight captioned pictures in a parquet file."""
    from sd3.common.synthetic_data import make_pokemon

    return prepared("pokemon", make_pokemon)


@pytest.fixture(scope="session")
def upstream_state() -> str:
    """Empty where build/diffusers is the patched checkout, else why it is not."""
    result = subprocess.run(
        ["bash", "-c", '. patches/lib.sh; queue_source_ok "$PWD/build/diffusers"'],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    return "" if result.returncode == 0 else result.stderr.strip() or "queue_source_ok failed"


@pytest.fixture
def upstream_checkout(upstream_state: str, request: pytest.FixtureRequest) -> Path:
    """The patched checkout. Only a test marked `upstream` may ask for it; it is skipped where there is none."""
    assert request.node.get_closest_marker("upstream"), "a test that needs upstream_checkout must be marked `upstream`"
    if upstream_state:
        pytest.skip(f"needs the patched diffusers source: {upstream_state}")
    return PROJECT / "build" / "diffusers"


@pytest.fixture(scope="session")
def _emulated_npu() -> EmulatedNpu:
    return built_or_skipped()


@pytest.fixture
def emulated_npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    """The real torch_npu on emulated CANN. Only a test marked `npu` may ask for it."""
    assert request.node.get_closest_marker("npu"), "a test that needs emulated_npu must be marked `npu`"
    return request.getfixturevalue("_emulated_npu")
