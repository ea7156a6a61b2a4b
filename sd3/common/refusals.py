"""How a rank's refusal gets past the launcher process that stands between it and the supervisor.

Whatever a rank's exit status is, accelerate's own is 1; with several ranks it adds a stack trace, and each rank would
say the same sentence. So a supervised rank tells the supervisor, over a socket that only this user can reach, and waits
until the launcher process is held still. The supervisor says each sentence once and takes over the status.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

from sd3.common.command_line import UserError

ADDRESS = "SD3_SUPERVISOR"  # the environment variable that names the socket
PATIENCE = 30.0  # s that a rank waits for the supervisor


def refuse(error: UserError) -> int:
    """Say why this process ends, or have the supervisor say it; returns the exit status."""
    if not _told(error):
        print(error, file=sys.stderr)
    return error.status


def _told(error: UserError) -> bool:
    """Is there a supervisor that has taken note?"""
    noted = False
    if ADDRESS in os.environ:
        message = {"pid": os.getpid(), "status": error.status, "sentence": str(error)}
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(PATIENCE)
                link.connect(os.environ[ADDRESS])
                link.sendall(json.dumps(message).encode())
                link.shutdown(socket.SHUT_WR)
                noted = bool(link.recv(1))
                link.recv(1)  # comes to its end when this rank may end
        except OSError:
            pass
    return noted


class Refusals:
    """The supervisor's side: what ranks refused with, and the ranks that wait to be let go."""

    def __init__(self, folder: Path) -> None:
        """Opens the socket, in `folder`; where that fails the ranks speak for themselves."""
        self.sentences: list[str] = []
        self.status = 0
        self.pids: set[int] = set()
        self.began = 0.0
        self.waiting: list[socket.socket] = []
        self.environment: dict[str, str] = {}
        self.server: socket.socket | None = None
        try:
            self.server = socket.socket(socket.AF_UNIX)
            self.server.bind(str(folder / "socket"))
            self.server.listen(1024)
            self.environment[ADDRESS] = self.server.getsockname()
        except OSError:  # a full disk, a path that is too long
            self.server = None

    def take(self) -> None:
        """Take note of one rank's refusal, that `server` has ready."""
        assert self.server is not None
        link, _ = self.server.accept()
        link.settimeout(1)
        try:
            with link.makefile("rb") as stream:
                message = json.loads(stream.read())
            pid, status, sentence = int(message["pid"]), int(message["status"]), str(message["sentence"])
            link.sendall(b"+")
        except (OSError, ValueError, LookupError, TypeError):
            link.close()
            return
        if not self.pids:
            self.status, self.began = status, time.monotonic()
        self.pids.add(pid)
        if sentence not in self.sentences:
            self.sentences.append(sentence)
        self.waiting.append(link)

    def release(self) -> None:
        """Let the ranks that wait end."""
        for link in self.waiting:
            link.close()
        self.waiting.clear()

    def close(self) -> None:
        """Let everybody go."""
        self.release()
        if self.server is not None:
            self.server.close()
