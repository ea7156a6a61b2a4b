"""Everything that an evaluation reads before it measures: reference pictures, prompts, and the pictures compared."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from sd3.common.command_line import UserError
from sd3.evaluation.baseline import Split, read_split
from sd3.evaluation.candidates import PictureSet, align, read_folder
from sd3.evaluation.feature_models import INCEPTION, check_name
from sd3.evaluation.images import ImageSource, images_in
from sd3.evaluation.painting import Inference, paint
from sd3.evaluation.prompts import read_prompts


@dataclasses.dataclass(frozen=True)
class References:
    """Real pictures: of the subject, for KID and FID, and the split of the data set if there is one."""

    subject: list[ImageSource]
    images: list[ImageSource]
    split: Split | None

    def describe_split(self) -> dict[str, Any] | None:
        """For metrics.json, less the pictures."""
        if self.split is None:
            return None
        names = ("dataset", "seed", "fraction", "total", "rows", "captions")
        return {name: getattr(self.split, name) for name in names}


def read_references(options: argparse.Namespace) -> References:
    """The real pictures that the flags name, as far as a metric needs them.

    Raises:
        UserError: a folder or data set cannot be used, or holds too few pictures for KID and FID.
    """
    with_kid = {"kid", "fid"} & set(options.metrics)
    with_subject = {"clip-i", "dino"} & set(options.metrics)
    subject = images_in(options.subject_dir, "--subject-dir") if with_subject else []
    split = None
    if options.dataset:
        split = read_split(options.dataset, options.held_out, options.split_seed, options.caption_column)
    images = split.images if split else images_in(options.reference_dir, "--reference-dir") if with_kid else []
    if with_kid and len(images) < 2:
        where = f"--held-out={options.held_out:g}" if split else f"--reference-dir={options.reference_dir}"
        raise UserError(f"{where} gives {len(images)} reference picture; KID and FID need at least 2.")
    return References(subject, images, split)


def check_models(options: argparse.Namespace) -> None:
    """Refuse model names that cannot be right, before hours of painting.

    Raises:
        UserError: one is neither there nor a hub name.
    """
    metrics = set(options.metrics)
    if metrics & {"clip-t", "clip-i"}:
        check_name("--clip-model", options.clip_model, "a CLIP model")
    if "dino" in metrics:
        check_name("--dino-model", options.dino_model, "a vision transformer")
    if metrics & {"kid", "fid"} and options.kid_model != INCEPTION and not Path(options.kid_model).is_file():
        check_name("--kid-model", options.kid_model, "inception-v3, a file of its weights, or a vision transformer")


def gather(
    options: argparse.Namespace, split: Split | None, device: str, inference: Inference
) -> list[PictureSet]:
    """The pictures of all candidates, painted where they have to be, in one order; the base first.

    Raises:
        UserError, GenerationFailed: as the parts do; folders are compared before anything is painted.
    """
    folders = [read_folder(each.label, each.folder) for each in options.candidates if each.folder]
    if folders:
        align(folders)
    prompts = []
    if options.candidate:
        prompts = split.prompts() if split else read_prompts(options.prompt_set, options.subject)
    flags = [*options.painting_flags, f"--device={options.device}", f"--batch-size={options.painting_batch_size or 1}"]
    if options.local_files_only:
        flags.append("--local-files-only")
    # Said to the inference code too, so that pictures of a card and of a CPU do not share a folder.
    dtype = options.dtype or ("float32" if device == "cpu" else "float16")
    painted = [
        paint(each, prompts, options.seeds, dtype, flags, options.output_dir, inference)
        for each in options.candidates
        if not each.folder
    ]
    return align(sorted([*folders, *painted], key=lambda pictures: pictures.label != options.base))
