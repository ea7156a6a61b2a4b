"""Facts of images, each file looked at once: what earlier runs found is kept in the cache directory.

A file counts as the same while its path, size and times of change are, and so does a row of a table while its file is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence

from PIL import __version__ as pillow_version

from sd3.common.command_line import UserError
from sd3.common.memory import uncollected
from sd3.common.seen import SeenFiles
from sd3.data.facts import ImageFacts, facts_of, in_parallel
from sd3.data.training_data import Origin, TrainingImage, UnreadableFile

KIND = "image"
# What is found depends on them too. The number is raised when sd3/data/ judges or converts differently.
RULES = f"2 pillow {pillow_version}"
# Clocks of file systems are coarse: of a file that was changed a moment ago, a further change might not show.
YOUNG_SECONDS = 2.0


def recall(seen: SeenFiles, origins: Sequence[Origin | None]) -> list[ImageFacts | None]:
    """What is known of images, None for those that have to be looked at."""
    return _recall(seen, origins, _stamps(origins))


def _recall(
    seen: SeenFiles, origins: Sequence[Origin | None], stamps: Sequence[str | None]
) -> list[ImageFacts | None]:
    values = seen.recall(KIND, [_name(origin) for origin in origins], stamps)
    with uncollected():
        return [value and ImageFacts.from_text(value) for value in values]


def look(
    images: Sequence[TrainingImage], seen: SeenFiles,
    progress: Callable[[Iterable[ImageFacts], int], Iterable[ImageFacts]] = lambda found, _: found,
) -> list[ImageFacts]:  # fmt: skip
    """Facts of each image; what is not known is decoded on all cores, and known from then on.

    `progress` is given the facts as they are found, and how many they will be, and passes them on.
    """
    origins = [image.origin for image in images]
    stamps = _stamps(origins)  # before the files are read: what changes meanwhile is looked at again
    facts = _recall(seen, origins, stamps)
    new = [place for place, known in enumerate(facts) if known is None]
    found = progress(in_parallel(_look_at, [images[place] for place in new]), len(new))
    try:
        for place, each in zip(new, found, strict=True):
            facts[place] = each
    finally:  # also of an interrupted look
        seen.remember(KIND, [
            (_name(origins[place]), stamp, each.as_text())
            for place in new if (stamp := stamps[place]) and (each := facts[place]) and each.digest
        ])  # fmt: skip
    return [each for each in facts if each]


def _look_at(image: TrainingImage) -> ImageFacts:
    try:
        return facts_of(image.content())
    except UserError as error:
        return ImageFacts("", problem=error.reason if isinstance(error, UnreadableFile) else str(error))


def _name(origin: Origin | None) -> str:
    """An absolute path, and the row behind a character that no path has."""
    if origin is None:
        return ""
    file, row = origin
    return os.path.abspath(file) + ("" if row is None else f"\0{row}")


def _stamps(origins: Sequence[Origin | None]) -> list[str | None]:
    """By what each file is known again; None for one that is not there, or too young."""
    now, of_file = time.time(), {}
    for file in dict.fromkeys(os.fspath(origin[0]) for origin in origins if origin):  # a table has many rows
        of_file[file] = _stamp(file, now)
    return [origin and of_file[os.fspath(origin[0])] for origin in origins]


def _stamp(file: str, now: float) -> str | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    if max(found.st_mtime, found.st_ctime) > now - YOUNG_SECONDS:
        return None
    return f"{RULES} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
