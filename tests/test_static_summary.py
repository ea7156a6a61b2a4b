"""tests/run.sh must not call a run green in which nothing was executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from summary import summarize

PASSED = '<testcase name="a"/>'
FAILED = '<testcase name="b"><failure message="no"/></testcase>'
SKIPPED = '<testcase name="c"><skipped message="the source is out of reach"/></testcase>'


@pytest.mark.parametrize(
    ("cases", "closing", "status"),
    [
        (PASSED + SKIPPED, "1 passed, 0 failed, 1 skipped", 0),
        (PASSED + FAILED, "1 passed, 1 failed, 0 skipped", 1),
        (SKIPPED, "0 passed, 0 failed, 1 skipped", 1),
        ("", "0 passed, 0 failed, 0 skipped", 1),
    ],
)
def test_counts_and_status(tmp_path: Path, cases: str, closing: str, status: int) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    lines, code = summarize(junit)
    assert lines[-1] == closing
    assert code == status
    assert ("Skipped 1: the source is out of reach" in lines) == ("skipped" in cases)


def test_missing_results_fail(tmp_path: Path) -> None:
    lines, code = summarize(tmp_path / "none.xml")
    assert code == 1
    assert "none.xml" in lines[0]
