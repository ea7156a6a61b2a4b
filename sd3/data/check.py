"""Can a run be trained on this data? Every image is decoded, and what will be done with the data is summed up."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.pictures import picture_files
from sd3.common.seen import SeenFiles
from sd3.data.caption_lengths import caption_lengths
from sd3.data.decoding import MOST_PIXELS
from sd3.data.facts import ImageFacts
from sd3.data.known_images import look
from sd3.data.summary import DataSummary, ImageSet
from sd3.data.training_data import DataFlags, TrainingData, read_class_folder, read_training_data

MOST_NAMED = 5  # faulty images in one sentence
WORTH_A_BAR = 200


@dataclass(frozen=True)
class CheckFlags:
    """What of a run's flags the data depends on. `model`: its directory, None where it is not on this machine.

    `only_images`: the patched scripts take every file of the class folder for an image. `memory`: the directory where
    facts of images are kept between runs, None for nowhere.
    """

    data: DataFlags
    resolution: int
    instance_prompt: str
    max_sequence_length: int
    model: Path | None
    class_folder: Path | None = None
    class_images: int = 0
    class_prompt: str = ""
    only_images: bool = False
    memory: Path | None = None


def check_data(flags: CheckFlags) -> tuple[list[str], DataSummary | None]:
    """Problems with the data, one sentence each, and the summary where there are none."""
    try:
        data = read_training_data(flags.data)
        classes = _class_data(flags)
    except UserError as error:
        return [str(error)], None
    seen = SeenFiles(flags.memory, say=lambda line: print(line, file=sys.stderr))
    facts = look([*data.images, *(classes.images if classes else [])], seen, with_bar)
    facts = [_with_room(each, flags.resolution) for each in facts]
    of_images, of_class = facts[: len(data.images)], facts[len(data.images) :]
    problems = image_problems(data, of_images, flags.data.dataset is not None, f"--input_dir={flags.data.folder}")
    if classes:
        problems += image_problems(classes, of_class, False, f"--class_data_dir={flags.class_folder}")
    return (problems, None) if problems else ([], _summary(flags, data, of_images, classes, of_class))


def _class_data(flags: CheckFlags) -> TrainingData | None:
    """The class images that are there already; None without prior preservation or without the folder."""
    folder = flags.class_folder
    if folder is None or not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"--class_data_dir={folder} is a file; give a directory for class images.")
    try:
        if flags.only_images and (others := sorted(set(folder.iterdir()) - set(picture_files(folder)))):
            names = ", ".join(other.name for other in others[:MOST_NAMED])
            raise UserError(
                f"--class_data_dir={folder} contains files that are not images ({names}), which the patched diffusers "
                "scripts take for images; remove them or give --engine=native."
            )
        return read_class_folder(folder, flags.class_images)
    except OSError as error:
        raise UserError(
            f"--class_data_dir={folder} cannot be read ({error.strerror}); give a folder that you may read."
        ) from None


def _with_room(facts: ImageFacts, resolution: int) -> ImageFacts:
    """The facts; with a problem where an image is so narrow that it cannot be enlarged to the resolution."""
    short, long = sorted((facts.width, facts.height))
    if facts.problem or long * resolution**2 <= MOST_PIXELS * short:
        return facts
    why = f"is {facts.width}x{facts.height}, too narrow to be enlarged to {resolution} pixels a side"
    return dataclasses.replace(facts, problem=why)


def with_bar(items: Iterable[ImageFacts], total: int) -> Iterable[ImageFacts]:
    """The items, with a progress bar where there are many and a terminal shows it."""
    if total <= WORTH_A_BAR or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc="Checking images", total=total)


def image_problems(data: TrainingData, facts: Sequence[ImageFacts], rows: bool, option: str) -> list[str]:
    """One sentence for a folder (`option` names it) that has faulty images; one per faulty row of a data set."""
    bad = [(image, each.problem) for image, each in zip(data.images, facts, strict=True) if each.problem]
    if rows:
        return [f"{image.name} has an image that {why}; fix or remove the row." for image, why in bad[:MOST_NAMED]]
    if not bad:
        return []
    more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    named = "; ".join(f"{Path(image.name).name} {why}" for image, why in bad[:MOST_NAMED])
    return [f"{option}: {named}{more}; fix or remove these files."]


def _summary(
    flags: CheckFlags, data: TrainingData, facts: Sequence[ImageFacts], classes: TrainingData | None,
    class_facts: Sequence[ImageFacts],
) -> DataSummary:  # fmt: skip
    captions = [image.caption or flags.instance_prompt for image in data.images]
    trained_on = [*captions, *([flags.class_prompt] if flags.class_folder is not None else [])]
    captioned = flags.data.dataset is not None and flags.data.caption_column
    return DataSummary(
        resolution=flags.resolution,
        instance=ImageSet.of("images", data, facts, flags.resolution),
        captions=len(trained_on),
        distinct_captions=len(set(captions)),
        without_caption=[image.name for image in data.images if image.caption is None] if captioned else [],
        class_images=ImageSet.of("class images", classes, class_facts, flags.resolution) if classes else None,
        cuts=caption_lengths(trained_on, flags.model, flags.max_sequence_length) if flags.model else [],
    )
