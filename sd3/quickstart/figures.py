"""What the world's own readers say of painted pictures: do they show the subject, and what their prompts name?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sd3.common.pictures import pictures_in
from sd3.tiny_world import classifier
from sd3.tiny_world.grammar import told_by
from sd3.tiny_world.subject import subject_score

SUBJECT = "sks star"  # the rare token and the class noun
# Score of the subject's detector from which a picture shows it: plain stars have 0.1 at most, a star with the stripes
# or the face alone 0.35, and the subject itself, passed through the autoencoder, 0.63 at least.
SEEN = 0.42


@dataclass(frozen=True)
class Figure:
    """How many pictures are right, of how many, in a certain respect."""

    title: str
    meaning: str
    right: int
    of: int


def world_figures(folder: Path) -> list[Figure]:
    """Of a folder of pictures with recipes: the subject, its place, and what other prompts name."""
    subject, place, others = [], [], []
    for path, recipe in pictures_in(folder):
        told = told_by(recipe.prompt)
        with Image.open(path) as image:
            found = classifier.right(image, told)
            if SUBJECT in recipe.prompt:
                subject.append(subject_score(image) >= SEEN)
                where = classifier.whole_position(image)  # stripes and a face confuse what is read for plain shapes
                place.append(found.get("background", True) and told.position in (None, where))
            else:
                others.append(all(found.values()))
    return [
        Figure("The subject", "pictures of it that show it, by a detector of its outline, stripes and face",
               sum(subject), len(subject)),
        Figure("Its place", "pictures of it with place and background as the prompt says", sum(place), len(place)),
        Figure("Other prompts", "pictures without it that show everything their prompt names",
               sum(others), len(others)),
    ]  # fmt: skip
