"""The queue itself: true to the pin, and each patch explained and able to be left out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from patching import PATCHES, PROJECT, scripts_without


def queue(*arguments: str, root: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "patches/queue.sh", *arguments], cwd=root, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path: Path, upstream_checkout: Path) -> Path:
    """A copy of the queue with the checkout it needs, free to be spoilt."""
    shutil.copytree(PROJECT / "patches", tmp_path / "patches")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "diffusers").symlink_to(upstream_checkout)
    return tmp_path


def test_every_patch_says_in_its_first_line_what_breaks_without_it() -> None:
    for name in PATCHES:
        header = (PROJECT / "patches" / name).read_text(encoding="utf-8").split("diff --git ")[0]
        assert header.startswith("Without this, "), name
        for label in ("Fault: ", "Shows: ", "Fixed: ", "Origin: "):
            assert f"\n{label}" in header, (name, label)


@pytest.mark.upstream
def test_the_queue_is_true_to_the_pin(upstream_checkout: Path) -> None:
    result = queue("check")
    assert result.returncode == 0, result.stderr
    for name in (None, *(name[:4] for name in PATCHES)):
        for script in scripts_without(name).glob("*.py"):
            compile(script.read_text(encoding="utf-8"), str(script), "exec")


@pytest.mark.upstream
def test_check_refuses_a_moved_hunk_and_refresh_mends_it(copied: Path) -> None:
    patch = copied / "patches" / PATCHES[3]
    text = patch.read_text(encoding="utf-8")
    hunk = re.compile(r"@@ -(\d+),(\d+) \+(\d+),")
    moved = hunk.sub(lambda m: f"@@ -{int(m[1]) + 7},{m[2]} +{int(m[3]) + 7},", text, count=1)
    assert moved != text
    patch.write_text(moved, encoding="utf-8")
    refused = queue("check", root=copied)
    assert refused.returncode == 1
    assert "offset" in refused.stderr
    assert queue("refresh", root=copied).returncode == 0
    assert queue("check", root=copied).returncode == 0
    assert patch.read_text(encoding="utf-8") == text


@pytest.mark.upstream
def test_check_refuses_an_edit_until_ids_are_refreshed(copied: Path) -> None:
    patch = copied / "patches" / PATCHES[2]
    patch.write_text(patch.read_text(encoding="utf-8").replace("becomes a line.", "is a line."), encoding="utf-8")
    refused = queue("check", root=copied)
    assert refused.returncode == 1
    assert "expected" in refused.stderr
    before = (copied / "patches" / "upstream.env").read_text(encoding="utf-8")
    assert queue("refresh", root=copied).returncode == 0
    assert queue("check", root=copied).returncode == 0
    assert (copied / "patches" / "upstream.env").read_text(encoding="utf-8") != before


@pytest.mark.upstream
def test_check_refuses_a_patch_that_series_does_not_name(copied: Path) -> None:
    (copied / "patches" / "0099-forgotten.patch").write_text("Without this, nothing.\n", encoding="utf-8")
    refused = queue("check", root=copied)
    assert refused.returncode == 1
    assert "0099-forgotten.patch is not in series" in refused.stderr


def test_a_missing_checkout_is_named(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "patches", tmp_path / "patches")
    refused = queue("check", root=tmp_path)
    assert refused.returncode == 3
    assert "setup_env.sh --patch-only" in refused.stderr


@pytest.mark.parametrize("wrong", ["file", "commit", "extra"])
def test_a_source_that_is_not_as_after_the_queue_is_refused(tmp_path: Path, wrong: str) -> None:
    """queue_source_ok on a little upstream of our own, right first, then wrong in one way."""
    tree = tmp_path / "tree"
    tree.mkdir()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(tree)]
    subprocess.run([*git, "init", "-q"], check=True)
    (tree / "script.py").write_text("old = 1\n")
    (tree / "other.py").write_text("same = 1\n")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "pin"], check=True)

    def id_of(*arguments: str) -> str:
        return subprocess.run([*git, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    patches = tmp_path / "patches"
    patches.mkdir()
    shutil.copy(PROJECT / "patches" / "lib.sh", patches)
    before = id_of("hash-object", "script.py")
    (tree / "script.py").write_text("new = 1\n")
    after = id_of("hash-object", "script.py")
    (patches / "upstream.env").write_text(
        f'UPSTREAM_COMMIT={id_of("rev-parse", "HEAD")}\nUPSTREAM_TREE={id_of("rev-parse", "HEAD^{tree}")}\n'
        f'UPSTREAM_FILES="\nscript.py {before} {after}\n"\n'
    )

    def ok() -> subprocess.CompletedProcess[str]:
        script = 'set -eu; . "$1/lib.sh"; queue_source_ok "$2"'
        return subprocess.run(
            ["bash", "-c", script, "bash", str(patches), str(tree)], capture_output=True, text=True, env=os.environ
        )

    assert ok().returncode == 0, ok().stderr
    if wrong == "file":
        (tree / "script.py").write_text("newer = 1\n")
    elif wrong == "commit":
        subprocess.run([*git, "commit", "-qam", "another"], check=True)
    else:
        (tree / "other.py").write_text("changed = 1\n")
    assert ok().returncode != 0
    assert {"file": "script.py", "commit": "holds tree", "extra": "other.py"}[wrong] in ok().stderr
