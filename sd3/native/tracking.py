"""A tracker that cannot write is no reason to end a training."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from accelerate import Accelerator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def forgiven(accelerator: Accelerator) -> Iterator[None]:
    """Where what is done here with the trackers fails for want of room or the like, the run goes on without them."""
    try:
        yield
    except OSError as error:
        logger.warning("The run goes on without its trackers, which cannot write (%s).", error)
        accelerator.trackers.clear()
