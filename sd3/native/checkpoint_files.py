"""Checkpoint directories: complete or absent, checked before they are believed, and the last good one never removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.files import sync
from sd3.common.model_files import file_hash

MANIFEST = "manifest.json"
COMPLETE = "complete"  # what launchers and inference scripts look for, whichever engine wrote it
NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(NAME.fullmatch(folder.name).group(1))  # type: ignore[union-attr]


def complete_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def finish(aside: Path, folder: Path) -> None:
    """List the files of `aside` with sizes and hashes, bring all to the disk, and rename it to `folder`."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    facts = {
        path.relative_to(aside).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files
    }
    (aside / MANIFEST).write_text(json.dumps({"files": facts}, indent=1) + "\n", encoding="utf-8")
    (aside / COMPLETE).touch()
    for path in (*aside.rglob("*"), aside):
        sync(path)
    former = folder.with_name(f".{folder.name}.former")
    if folder.exists():  # of a past that the run has gone back behind
        os.replace(folder, former)
    os.replace(aside, folder)
    sync(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def clear_leftovers(output: Path, newer_than: int) -> None:
    """Remove what a killed run left: unfinished checkpoints newer than the step to resume from."""
    for path in output.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in output.glob("checkpoint-*"):
        if NAME.fullmatch(path.name) and step_of(path) > newer_than and not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)


def set_aside(output: Path, newer_than: int) -> list[Path]:
    """Rename checkpoints newer than the step that a run goes on from; returns their new names.

    They are of a past that the run has gone back behind, or damaged: among the run's own they would be taken for the
    newest, by rotation and by the next resume.
    """
    moved = []
    for path in output.glob("checkpoint-*"):
        if NAME.fullmatch(path.name) and step_of(path) > newer_than:
            name = output / f"abandoned-{path.name}"
            names = (name.with_name(f"{name.name}{suffix}") for suffix in ("", *(f".{n}" for n in range(2, 1000))))
            target = next(path for path in names if not path.exists())
            os.replace(path, target)
            moved.append(target)
    return sorted(moved)


def rotate(output: Path, limit: int | None, keep_every: int | None) -> None:
    """Remove all but the `limit` newest complete checkpoints; those at multiples of `keep_every` stay."""
    if not limit:
        return
    passing = [path for path in complete_checkpoints(output) if not keep_every or step_of(path) % keep_every]
    for path in passing[:-limit]:
        # Renamed first: a kill in between leaves no half of a checkpoint under its name.
        gone = path.with_name(f".{path.name}.former")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def advice(folder: Path) -> str:
    """What to do about a checkpoint that cannot be resumed from: the one before, if there is one."""
    before = [path for path in complete_checkpoints(folder.parent) if step_of(path) < step_of(folder)]
    return f"resume from the one before, {before[-1].name}" if before else "there is none before it; start anew"


def unusable(folder: Path, file: str, reason: object) -> UserError:
    """The refusal of a checkpoint for what one of its files holds."""
    return UserError(f"{folder} cannot be read ({file}: {reason}); {advice(folder)}.")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint of this engine, None if all is as its manifest says."""
    try:
        return _damage(folder)
    except OSError as error:
        name = Path(error.filename).name if error.filename else "a file"
        return f"{ascii(name)[1:-1]} cannot be read: {error.strerror}"


def _expected(folder: Path) -> dict[Path, tuple[int, str]]:
    """Size and hash of each file that a manifest lists.

    Raises:
        ValueError, OSError: it cannot be read, or names a file that is outside of the checkpoint.
    """
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in facts.items()}
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError from None
    for path, name in zip(expected, facts, strict=True):
        if Path(name).is_absolute() or ".." in path.relative_to(folder).parts or not name.isprintable():
            raise ValueError
    return expected


def _damage(folder: Path) -> str | None:
    """As `damage`; raises OSError where a file cannot be read."""
    try:
        expected = _expected(folder)
    except (ValueError, OSError):
        return f"{MANIFEST} cannot be read"
    for path, (size, digest) in expected.items():
        name = path.relative_to(folder)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {str(size)[:60]}"
        if file_hash(path) != digest:
            return f"{name} is not what was written"
    present = {path for path in folder.rglob("*") if path.is_file()} - {folder / MANIFEST, folder / COMPLETE}
    return f"{(present - set(expected)).pop().relative_to(folder)} does not belong" if present - set(expected) else None


def find(output: Path, wanted: str) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, known to be whole; None where `latest` finds none.

    Raises:
        UserError: it is not there, is another engine's, or is damaged; the text offers the one before.
    """
    known = complete_checkpoints(output)
    if wanted == "latest":
        if not known:
            return None
        folder = known[-1]
    else:
        folder = output / Path(wanted).name
        elsewhere = len(Path(wanted).parts) > 1 and Path(wanted).resolve() != folder.resolve()
        if elsewhere or folder not in known:
            names = ", ".join(path.name for path in known) or "none"
            raise UserError(
                f"--resume_from_checkpoint={wanted} is no complete checkpoint of {output}; there is: {names}."
            )
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} was not written by the native engine; resume with --engine=diffusers.")
    if wrong := damage(folder):
        raise UserError(f"{folder} is damaged ({wrong}); {advice(folder)}.")
    return folder
