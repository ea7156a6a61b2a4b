"""Features of many pictures: looked up, or computed in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sd3.common.command_line import UserError
from sd3.evaluation.feature_cache import FeatureCache
from sd3.evaluation.feature_models import FeatureModel
from sd3.evaluation.images import ImageSource, decode, sha256


def extract(
    model: FeatureModel,
    sources: Sequence[ImageSource],
    cache: FeatureCache,
    batch_size: int,
    advance: Callable[[int], object],
) -> np.ndarray:
    """Features [len(sources), model.dimension] in float32; `advance` is told how many more pictures are done.

    Raises:
        UserError: a picture cannot be read, or the model makes values of it that are not finite.
    """
    features = np.empty((len(sources), model.dimension), dtype=np.float32)
    for start in range(0, len(sources), batch_size):
        batch = sources[start : start + batch_size]
        contents = [source.read() for source in batch]
        hashes = [sha256(content) for content in contents]
        wanted = []
        for offset, image_hash in enumerate(hashes):
            if (known := cache.get(image_hash, model)) is None:
                wanted.append(offset)
            else:
                features[start + offset] = known
        if wanted:
            made = model.embed([decode(batch[offset].name, contents[offset]) for offset in wanted]).numpy()
            for offset, values in zip(wanted, made, strict=True):
                if not np.isfinite(values).all():
                    raise UserError(f"{model.name} makes infinite or undefined features of {batch[offset].name}.")
                features[start + offset] = values
                cache.put(hashes[offset], model, values)
        advance(len(batch))
    return features
