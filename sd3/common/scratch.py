"""One directory for all temporary files of a run, removed with it; that of a killed run is removed by the next one.

Everything below a supervisor gets it as TMPDIR. It lies where TMPDIR was, or, where that is too long for the sockets
that Python makes below it, in /tmp. A lock that is shared by all that use the directory tells whether it is in use:
process ids alone would not, where two containers share /tmp. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.orphans import SCRATCH_LOCK

PREFIX = "sd3-"
LOCK = ".lock"
# Bytes that the address of a socket has for a file's path, less those of what is made below the directory:
# /pymp-xxxxxxxx/listener-xxxxxxxx by Python, /torch-shm-dir-xxxxxx/manager.sock by torch.
LONGEST = 107 - 36
OTHER_PLACES = ("/tmp", "/var/tmp")
LEFTOVER_AGE = 24 * 3600  # s; no maker takes so long to lock its directory


class Scratch:
    """The temporary directory of this process and all below it."""

    def __init__(self) -> None:
        """Sweep what killed runs of this user left, and make the directory.

        Raises:
            UserError: no place is there for it.
        """
        usual = _usual_place()
        self.note = ""
        self.folder = self._make(usual)
        # Compiled kernels are for later runs too.
        user = re.sub(r'[\\/:*?"<>|]', "_", _user())
        kernels = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(usual, f"torchinductor_{user}")
        self.environment = {"TMPDIR": str(self.folder), "TORCHINDUCTOR_CACHE_DIR": kernels}
        self._lock()

    def _make(self, usual: str) -> Path:
        tried = list(dict.fromkeys([usual, *OTHER_PLACES]))
        for place in tried:
            with contextlib.suppress(OSError):
                sweep(Path(place))
                made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place))
                if len(os.fsencode(made)) <= LONGEST:
                    if place != usual:
                        self.note = (
                            f"TMPDIR={usual} is too long for sockets or cannot be written; temporary files of this "
                            f"run are in {made}."
                        )
                    return made
                made.rmdir()
        raise UserError(
            f"TMPDIR: none of {', '.join(tried)} can be written and has a name short enough for sockets; set TMPDIR to "
            f"a directory with at most {LONGEST - 24} characters."
        )

    def _lock(self) -> None:
        """Hold the lock before others can see that there is one."""
        new = self.folder / f"{LOCK}.new"
        with contextlib.suppress(OSError):  # a file system without locks: swept by nobody
            self._held = new.open("wb")
            fcntl.flock(self._held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            new.rename(self.folder / LOCK)
            self.environment[SCRATCH_LOCK] = str(self.folder / LOCK)

    def remove(self) -> None:
        """Remove the directory and what is in it; call it when no process uses it any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _usual_place() -> str:
    """Where temporary files go; raises UserError where nothing can be written."""
    try:
        return os.path.abspath(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UserError(f"TMPDIR: {error.strerror}; set TMPDIR to a directory that you may write.") from None


def _user() -> str:
    """The user's name, as torch asks for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def sweep(place: Path) -> list[Path]:
    """Remove the directories in `place` that killed runs of this user left; returns them."""
    return [folder for folder in place.glob(f"{PREFIX}[0-9]*-*") if _own(folder) and _removed(folder)]


def _own(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _removed(folder: Path) -> bool:
    """Remove a directory if nobody holds its lock."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        abandoned = time.time() - folder.stat().st_mtime > LEFTOVER_AGE
        if abandoned:
            shutil.rmtree(folder, ignore_errors=True)
        return abandoned
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_files() -> Iterator[None]:
    """A directory of its own for what this process and all below it make meanwhile, but where a supervisor gave one.

    Raises:
        UserError: no place is there for it.
    """
    if SCRATCH_LOCK in os.environ:
        yield
        return
    made = Scratch()
    before = {name: os.environ.get(name) for name in made.environment}
    os.environ.update(made.environment)
    tempfile.tempdir = None
    try:
        yield
    finally:
        made.remove()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        tempfile.tempdir = None
