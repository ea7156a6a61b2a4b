"""From pictures to what the metrics are made of: one pass for each feature model, under one progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sd3.common.command_line import UserError
from sd3.data.caption_lengths import EncoderCut, cut_sentence
from sd3.evaluation.candidates import PictureSet
from sd3.evaluation.feature_cache import FeatureCache
from sd3.evaluation.feature_models import ClassTokenModel, ClipModel, FeatureModel, load_kid_model
from sd3.evaluation.features import extract
from sd3.evaluation.images import ImageSource
from sd3.evaluation.metrics import prompt_fidelity, subject_fidelity


@dataclasses.dataclass(frozen=True)
class Request:
    """What is measured, against which pictures, with which models."""

    metrics: Sequence[str]
    subject: Sequence[ImageSource]
    references: Sequence[ImageSource]
    text_of: Callable[[str], str]
    clip_model: str
    dino_model: str
    kid_model: str
    device: str
    batch_size: int
    local_files_only: bool


@dataclasses.dataclass
class Measured:
    """`values`: of each picture, by metric, an array [n] for each candidate. `kid_features`: [n, d] for each one."""

    values: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    kid_features: list[np.ndarray] = dataclasses.field(default_factory=list)
    kid_references: np.ndarray | None = None
    models: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def describe(self, use: str, model: FeatureModel) -> None:
        """Remember which model was used for what."""
        self.models[use] = {
            "name": model.name, "sha256_of_weights_and_configuration": model.digest,
            "preprocessing": model.preprocessing, "dimension": str(model.dimension),
        }  # fmt: skip


def measure(sets: Sequence[PictureSet], request: Request, cache: Path) -> Measured:
    """Features of all pictures, and the metrics that each picture has by itself.

    Raises:
        UserError: a model or a picture cannot be read.
    """
    measured = Measured()
    with_clip = {"clip-t", "clip-i"} & set(request.metrics)
    with_kid = {"kid", "fid"} & set(request.metrics)
    pictures = sum(len(pictures.paths) for pictures in sets)
    total = (
        (pictures + len(request.subject) * ("clip-i" in request.metrics)) * bool(with_clip)
        + (pictures + len(request.subject)) * ("dino" in request.metrics)
        + (pictures + len(request.references)) * bool(with_kid)
    )
    with tqdm(total=total, desc="Features", unit="picture") as bar:
        worker = _Worker(sets, request, FeatureCache(cache), bar.update, measured)
        try:
            if with_clip:
                worker.clip()
            if "dino" in request.metrics:
                worker.dino()
            if with_kid:
                worker.kid()
        except OSError as error:  # of the cache; pictures and models are read under their own care
            raise UserError(f"{cache} cannot be written ({error.strerror}); name another --cache-dir.") from None
    return measured


@dataclasses.dataclass(frozen=True)
class _Worker:
    sets: Sequence[PictureSet]
    request: Request
    cache: FeatureCache
    advance: Callable[[int], object]
    measured: Measured

    def _features(self, model: FeatureModel, sources: Sequence[ImageSource]) -> np.ndarray:
        return extract(model, sources, self.cache, self.request.batch_size, self.advance)

    def _of_sets(self, model: FeatureModel) -> list[np.ndarray]:
        return [
            self._features(model, [ImageSource(str(path), path) for path in pictures.paths]) for pictures in self.sets
        ]

    def clip(self) -> None:
        request = self.request
        model = ClipModel("--clip-model", request.clip_model, request.device, request.local_files_only)
        self.measured.describe("CLIP", model)
        features = self._of_sets(model)
        if "clip-t" in request.metrics:
            texts = [request.text_of(prompt) for prompt, _ in self.sets[0].keys()]
            distinct = list(dict.fromkeys(texts))
            rows = np.array([distinct.index(text) for text in texts])
            embedded = model.embed_texts(distinct, request.batch_size).numpy()
            self.measured.values["clip-t"] = [prompt_fidelity(each, embedded, rows) for each in features]
            over = [count for count in map(model.token_count, distinct) if count > model.text_length]
            cut = EncoderCut(f"the CLIP model {request.clip_model}", model.text_length, len(over), max(over, default=0))
            if sentence := cut_sentence([cut], len(distinct), "texts of CLIP-T"):
                self.measured.notes.append(sentence)
        if "clip-i" in request.metrics:
            references = self._features(model, request.subject)
            self.measured.values["clip-i"] = [subject_fidelity(each, references) for each in features]

    def dino(self) -> None:
        request = self.request
        model = ClassTokenModel("--dino-model", request.dino_model, request.device, request.local_files_only)
        self.measured.describe("DINO", model)
        references = self._features(model, request.subject)
        self.measured.values["dino"] = [subject_fidelity(each, references) for each in self._of_sets(model)]

    def kid(self) -> None:
        request = self.request
        model = load_kid_model("--kid-model", request.kid_model, request.device, request.local_files_only)
        self.measured.describe("KID and FID", model)
        self.measured.kid_features = self._of_sets(model)
        self.measured.kid_references = self._features(model, request.references)
