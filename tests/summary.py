"""The last lines of tests/run.sh: what was skipped and why, and one closing line with the counts.

Usage: python tests/summary.py JUNIT_XML. Exits 1 where the file is missing or no test was executed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path


def summarize(junit: Path) -> tuple[list[str], int]:
    """Lines to print for a pytest JUnit file, and the exit status that goes with them."""
    try:
        cases = list(ET.parse(junit).getroot().iter("testcase"))
    except (OSError, ET.ParseError) as error:
        return [f"No test results in {junit}: {error}", "0 passed, 1 failed"], 1
    skips: Counter[str] = Counter()
    failed = 0
    for case in cases:
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif skipped is not None:
            skips[skipped.get("message") or "no reason given"] += 1
    skipped_count = sum(skips.values())
    passed = len(cases) - failed - skipped_count
    lines = [f"Skipped {count}: {reason}" for reason, count in skips.most_common()]
    if passed + failed == 0:
        lines.append("No test was executed.")
    lines.append(f"{passed} passed, {failed} failed, {skipped_count} skipped")
    return lines, 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python tests/summary.py JUNIT_XML")
    text, code = summarize(Path(sys.argv[1]))
    print("\n".join(text))
    sys.exit(code)
