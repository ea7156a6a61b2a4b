#!/usr/bin/env python3
"""Runs a patched training script as one rank: python rank.py SCRIPT ARGUMENTS...

The scripts are those of diffusers; a rank of the native engine sees to all this itself. Here the rank stops when its
supervisor is gone, its loader processes die with it, and one that cannot hand a batch over ends instead of keeping the
rank waiting for ever.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

PROJECT = str(Path(__file__).resolve().parents[2])
WORKERS = "--dataloader_num_workers"


def main() -> int:
    """Run the script; returns the exit status where the script does not end the process itself."""
    sys.path[0] = PROJECT
    from sd3.common import orphans, shared_memory
    from sd3.common.command_line import UserError
    from sd3.common.refusals import refuse

    orphans.stop_without_supervisor()
    orphans.forks_die_with_this()
    del sys.argv[0]
    workers = loader_processes(sys.argv)
    shared_memory.end_where_a_batch_is_lost(workers)
    try:
        if workers:
            shared_memory.check(workers)
    except UserError as error:
        return refuse(error)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except RuntimeError as error:
        if shared_memory.DEATH not in str(error):
            raise
        return refuse(shared_memory.no_loaders(workers, f"a loader process has died: {error}"))
    return 0


def loader_processes(arguments: list[str]) -> int:
    """How many the arguments ask for; what is no number is for the script to refuse."""
    given = [one.split("=", 1)[1] for one in arguments if one.startswith(f"{WORKERS}=")]
    given += [value for flag, value in zip(arguments, arguments[1:], strict=False) if flag == WORKERS]
    return int(given[-1]) if given and given[-1].isascii() and given[-1].isdigit() else 0


if __name__ == "__main__":
    sys.exit(main())
