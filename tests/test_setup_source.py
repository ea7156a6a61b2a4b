"""Getting, proving and patching the source, or doing without it, on a little upstream of our own: no network."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = "examples/script.py"
NOWHERE = "http://127.0.0.1:9/none.git"
# In the place of the environment's Python: it writes down what pip is asked for, and installs nothing.
RECORDER = """#!/usr/bin/env bash
here="$(dirname "$0")"
case "$*" in
  *"pip --version") ;;
  *"pip install"*) echo "${*: -1}" >>"$here/installed"; exit "${PIP_STATUS:-0}" ;;
  *setup_summary.py*) echo "summary: ${*:2}" ;;
  *sys.prefix*) dirname "$here" ;;
  *) exec %s "$@" ;;
esac
"""
FIX = f"""Without this, nothing.

diff --git a/{SCRIPT} b/{SCRIPT}
--- a/{SCRIPT}
+++ b/{SCRIPT}
@@ -1 +1 @@
-old = 1
+new = 1
"""


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(folder), *arguments],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


class Place:
    """A project whose pin is a commit of a little repository beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.upstream = root / "upstream"
        (self.upstream / "examples").mkdir(parents=True)
        (self.upstream / SCRIPT).write_text("old = 1\n")
        (self.upstream / "other.txt").write_bytes(b"line ends stay\r\nas they are\n")
        (self.upstream / ".gitattributes").write_text("*.txt text eol=lf\n")
        (self.upstream / ".gitignore").write_text("ignored\n")
        git(self.upstream, "init", "-q", "-b", "main")
        git(self.upstream, "-c", "core.autocrlf=false", "add", "-A", "-f")
        git(self.upstream, "commit", "-qm", "pin")
        before = git(self.upstream, "rev-parse", f"HEAD:{SCRIPT}")
        self.commit = git(self.upstream, "rev-parse", "HEAD")
        tree = git(self.upstream, "rev-parse", "HEAD^{tree}")
        # What came later is not the pin: only the commit by its id will do.
        (self.upstream / "later.txt").write_text("later\n")
        git(self.upstream, "add", "-A")
        git(self.upstream, "commit", "-qm", "later")
        self.project = root / "a project"
        (self.project / "patches").mkdir(parents=True)
        for name in ("setup_env.sh", "requirements_sd3.txt"):
            shutil.copy(PROJECT / name, self.project)
        shutil.copytree(PROJECT / "sd3", self.project / "sd3", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(PROJECT / "patches" / "lib.sh", self.project / "patches")
        (self.project / "patches" / "0001-fix.patch").write_text(FIX)
        (self.project / "patches" / "series").write_text("0001-fix.patch\n")
        new = root / "new.py"
        new.write_text("new = 1\n")
        after = git(root, "hash-object", str(new))
        (self.project / "patches" / "upstream.env").write_text(
            f"UPSTREAM_URL=file://{self.upstream}\nUPSTREAM_COMMIT={self.commit}\nUPSTREAM_TREE={tree}\n"
            f'UPSTREAM_FILES="\n{SCRIPT} {before} {after}\n"\n'
        )
        self.checkout = self.project / "build" / "diffusers"

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.project / "setup_env.sh"), *arguments],
            cwd=self.root, env={**os.environ, **env}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def set_up(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("--patch-only", *arguments, **env)

    def set_up_all(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Packages too, into an environment that only writes them down."""
        python = self.root / "venv" / "bin" / "python"
        if not python.exists():
            python.parent.mkdir(parents=True)
            python.write_text(RECORDER % sys.executable)
            python.chmod(0o755)
        return self.run(f"--venv={self.root / 'venv'}", "--device=cpu", f"--python={sys.executable}", *arguments, **env)

    def installed(self) -> list[str]:
        """What pip was asked for last in each call, in order."""
        record = self.root / "venv" / "bin" / "installed"
        return record.read_text().splitlines() if record.exists() else []

    def edit_pin(self, old: str, new: str) -> None:
        pin = self.project / "patches" / "upstream.env"
        assert old in pin.read_text()
        pin.write_text(pin.read_text().replace(old, new))

    def assert_right(self) -> None:
        assert (self.checkout / SCRIPT).read_text() == "new = 1\n"
        assert not (self.checkout / "later.txt").exists()
        assert git(self.checkout, "status", "--porcelain") == f"M {SCRIPT}"
        assert [path.name for path in self.checkout.parent.iterdir() if path.name.startswith(".diffusers")] == []

    def export(self) -> Path:
        """The pinned tree as plain files in a folder."""
        folder = self.root / "diffusers-pin"
        folder.mkdir()
        git(self.upstream, f"--work-tree={folder}", "checkout", "-q", self.commit, "--", ".")
        git(self.upstream, "checkout", "-q", "main", "--", ".")
        return folder

    def archive(self, kind: str, folder: Path) -> Path:
        return Path(shutil.make_archive(str(self.root / "tree"), kind, folder.parent, folder.name))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_from_the_pins_address_and_only_that_commit(place: Place) -> None:
    result = place.set_up()
    assert result.returncode == 0, result.stderr
    place.assert_right()
    assert git(place.checkout, "rev-list", "--all", "--count") == "1" or git(place.checkout, "log", "--oneline")
    assert (place.checkout / ".git" / "shallow").exists()


def test_twice_is_as_good_as_once(place: Place) -> None:
    place.set_up()
    stamp = (place.checkout / SCRIPT).stat().st_mtime_ns
    again = place.set_up()
    assert again.returncode == 0
    assert "already holds the pinned commit" in again.stdout
    assert (place.checkout / SCRIPT).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("bare", [False, True])
def test_from_a_local_repository(place: Place, bare: bool) -> None:
    source = place.upstream
    if bare:
        source = place.root / "bare.git"
        subprocess.run(["git", "clone", "-q", "--bare", str(place.upstream), str(source)], check=True)
    result = place.set_up(f"--diffusers-src={source}")
    assert result.returncode == 0, result.stderr
    place.assert_right()


@pytest.mark.parametrize("kind", ["gztar", "zip"])
def test_from_an_archive(place: Place, kind: str) -> None:
    result = place.set_up("--diffusers-src", str(place.archive(kind, place.export())))
    assert result.returncode == 0, result.stderr
    place.assert_right()


@pytest.mark.parametrize("spoil", ["changed", "added", "removed"])
def test_an_archive_of_another_tree_is_refused(place: Place, spoil: str) -> None:
    folder = place.export()
    if spoil == "changed":
        (folder / "other.txt").write_bytes(b"line ends stay\nbut not this\n")
    elif spoil == "added":
        (folder / "ignored").write_text("not even an ignored file\n")
    else:
        (folder / "other.txt").unlink()
    result = place.set_up(f"--diffusers-src={place.archive('gztar', folder)}")
    assert result.returncode == 2
    assert "it was not used" in result.stderr
    assert not place.checkout.exists()


def test_a_repository_without_the_commit_is_refused_with_the_other_ways(place: Place) -> None:
    other = place.root / "other"
    other.mkdir()
    git(other, "init", "-q")
    (other / "file").write_text("x")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "x")
    result = place.set_up(f"--diffusers-src={other}")
    assert result.returncode == 3
    for way in ("URL of a mirror", "local clone or bare repository", ".tar.gz or .zip"):
        assert way in result.stderr
    assert not place.checkout.exists()


def test_an_address_out_of_reach_exits_3(place: Place) -> None:
    result = place.set_up(f"--diffusers-src={NOWHERE}")
    assert result.returncode == 3
    assert f"cannot be had from {NOWHERE}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_a_source_in_reach_the_library_comes_from_the_registry(place: Place) -> None:
    place.edit_pin(f"file://{place.upstream}", NOWHERE)
    result = place.set_up_all()
    assert result.returncode == 0, result.stderr
    assert place.installed()[-1] == "diffusers==0.33.1"
    note = result.stderr[result.stderr.index("NOTE") :]
    missing = f"Commit {place.commit} of diffusers cannot be had from {NOWHERE}"
    assert all(said in note for said in (missing, "--engine=native", "--diffusers-src="))
    assert result.stdout.splitlines()[-1].endswith("native")
    assert "diffusers, native" not in result.stdout
    assert (place.project / "build" / "venv.path").exists()
    assert [path.name for path in place.checkout.parent.iterdir() if "diffusers" in path.name] == []
    # Later, with a network, the checkout takes the release's place.
    place.edit_pin(NOWHERE, f"file://{place.upstream}")
    again = place.set_up_all()
    assert again.returncode == 0, again.stderr
    assert "NOTE" not in again.stderr
    assert place.installed()[-1] == str(place.checkout)
    assert again.stdout.splitlines()[-1].endswith("diffusers, native")
    place.assert_right()


@pytest.mark.parametrize(
    ("spoil", "arguments", "status"),
    [
        (("file:", "file:"), [f"--diffusers-src={NOWHERE}"], 3),  # a source that was asked for
        (("UPSTREAM_TREE=", "UPSTREAM_TREE=0"), [], 2),  # one that holds something else
        (("\nexamples/script.py ", "\nexamples/script.py 0"), [], 2),
    ],
)
def test_a_source_that_fails_otherwise_is_an_error(
    place: Place, spoil: tuple[str, str], arguments: list[str], status: int
) -> None:
    place.edit_pin(*spoil)
    result = place.set_up_all(*arguments)
    assert result.returncode == status
    assert "NOTE" not in result.stderr
    assert place.installed() == []


def test_a_queue_that_does_not_apply_is_an_error(place: Place) -> None:
    (place.project / "patches" / "0001-fix.patch").write_text(FIX.replace("-old = 1", "-older = 1"))
    result = place.set_up_all()
    assert result.returncode == 2
    assert "does not apply" in result.stderr
    assert place.installed() == []


def test_patch_only_is_nothing_without_a_source(place: Place) -> None:
    place.edit_pin(f"file://{place.upstream}", NOWHERE)
    result = place.set_up()
    assert result.returncode == 3
    assert "--diffusers-src=URL of a mirror" in result.stderr


def test_packages_only_asks_no_source(place: Place) -> None:
    place.edit_pin(f"file://{place.upstream}", NOWHERE)
    result = place.set_up_all("--packages-only")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert place.installed()[-1] == "diffusers==0.33.1"


def test_packages_that_cannot_be_had_are_an_error_without_a_source_too(place: Place) -> None:
    place.edit_pin(f"file://{place.upstream}", NOWHERE)
    result = place.set_up_all(PIP_STATUS="1")
    assert result.returncode == 3
    assert "pip could not install" in result.stderr
    assert not (place.project / "build" / "venv.path").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/sd3-test-outside", "a/../../outside"])
@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_an_archive_cannot_write_outside(place: Place, name: str, kind: str) -> None:
    archive = place.root / f"evil.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr(name, "evil")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
    result = place.set_up(f"--diffusers-src={archive}")
    assert result.returncode == 2
    assert "outside its directory" in result.stderr
    assert list(place.root.rglob("outside")) == []


def test_an_archive_cannot_write_through_a_link(place: Place) -> None:
    archive = place.root / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("tree/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(place.root)
        tar.addfile(link)
        member = tarfile.TarInfo("tree/link/outside")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    result = place.set_up(f"--diffusers-src={archive}")
    assert result.returncode == 2
    assert "links or special files" in result.stderr
    assert not (place.root / "outside").exists()


def test_a_dirty_checkout_is_refused_by_name_and_reset_by_force(place: Place) -> None:
    place.set_up()
    (place.checkout / "other.txt").write_text("edited\n")
    refused = place.set_up()
    assert refused.returncode == 2
    assert "other.txt" in refused.stderr
    assert "--force" in refused.stderr
    assert (place.checkout / "other.txt").read_text() == "edited\n"
    assert place.set_up("--force").returncode == 0
    place.assert_right()


def newer_queue(place: Place) -> None:
    """What a pull may bring: the same pin, another patch."""
    (place.project / "patches" / "0001-fix.patch").write_text(FIX.replace("+new = 1", "+newer = 1"))
    newer = place.root / "newer.py"
    newer.write_text("newer = 1\n")
    old_id = (place.project / "patches" / "upstream.env").read_text().split()[-2]
    place.edit_pin(old_id, git(place.root, "hash-object", str(newer)))


def test_a_checkout_of_an_older_queue_is_made_anew(place: Place) -> None:
    assert place.set_up().returncode == 0
    newer_queue(place)
    pulled = place.set_up()
    assert pulled.returncode == 0, pulled.stderr
    assert "older queue" in pulled.stdout
    assert (place.checkout / SCRIPT).read_text() == "newer = 1\n"
    assert "already holds" in place.set_up().stdout


@pytest.mark.parametrize("touched", [SCRIPT, "other.txt", "mine.txt"])
def test_a_checkout_of_an_older_queue_with_work_in_it_is_refused(place: Place, touched: str) -> None:
    assert place.set_up().returncode == 0
    newer_queue(place)
    (place.checkout / touched).write_text("precious\n")
    refused = place.set_up()
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert (place.checkout / touched).read_text() == "precious\n"


def test_a_wrong_commit_is_refused_and_reset_by_force(place: Place) -> None:
    place.set_up()
    git(place.checkout, "commit", "-qam", "another")
    refused = place.set_up()
    assert refused.returncode == 2
    assert "holds tree" in refused.stderr
    assert place.set_up("--force").returncode == 0
    place.assert_right()


@pytest.mark.parametrize("after", [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
def test_killed_at_any_moment_and_run_again(place: Place, after: float) -> None:
    process = subprocess.Popen(
        ["bash", str(place.project / "setup_env.sh"), "--patch-only"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    time.sleep(after)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    result = place.set_up()
    assert result.returncode == 0, result.stderr
    place.assert_right()


def test_two_at_once_are_told_apart(place: Place) -> None:
    (place.project / "build").mkdir()
    lock = place.project / "build" / ".setup.lock"
    with subprocess.Popen(["flock", str(lock), "sleep", "20"], start_new_session=True) as holder:
        time.sleep(0.5)
        result = place.set_up()
        os.killpg(holder.pid, signal.SIGKILL)
    assert result.returncode == 2
    assert "another set-up is running" in result.stderr


def test_patch_only_needs_no_python(place: Place) -> None:
    tools = place.root / "bin"
    tools.mkdir()
    for path in os.environ["PATH"].split(os.pathsep):
        for tool in Path(path).iterdir() if Path(path).is_dir() else []:
            if "python" not in tool.name and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    assert shutil.which("python3", path=str(tools)) is None
    result = place.set_up(PATH=str(tools))
    assert result.returncode == 0, result.stderr
    place.assert_right()


def test_the_users_hooks_and_line_end_settings_do_not_matter(place: Place) -> None:
    home = place.root / "home"
    (home / "hooks").mkdir(parents=True)
    hook = home / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {place.root}/hook-ran\n")
    hook.chmod(0o755)
    (home / ".gitconfig").write_text(f"[core]\nautocrlf = true\nhooksPath = {home}/hooks\n[commit]\ngpgSign = true\n")
    result = place.set_up(HOME=str(home))
    assert result.returncode == 0, result.stderr
    assert not (place.root / "hook-ran").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device=tpu"], "--device=tpu is not known"),
        (["--stack=torch3"], "--stack=torch3 is not known"),
        (["--diffusers-src"], "--diffusers-src needs a value"),
        (["--nonsense"], "unknown option --nonsense"),
        (["--force=yes"], "--force takes no value"),
        (["--packages-only"], "exclude each other"),
    ],
)
def test_bad_options_are_refused_in_one_line(place: Place, arguments: list[str], said: str) -> None:
    result = place.set_up(*arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (place.project / "build" / "diffusers").exists()
