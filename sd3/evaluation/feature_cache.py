"""Features kept on disk. An entry's name says all that it depends on: the picture, the model, how the one was fed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from sd3.common.files import new_file
from sd3.evaluation.feature_models import FeatureModel
from sd3.evaluation.images import sha256


class FeatureCache:
    """A folder of .npz files, one for a picture and a model. Entries that are damaged count as missing."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first entry is written."""
        self._folder = folder

    def path(self, image_hash: str, model: FeatureModel) -> Path:
        """Where the features of a picture with this SHA-256 lie."""
        key = sha256(f"{image_hash} {model.digest} {model.preprocessing}".encode())
        return self._folder / key[:2] / f"{key}.npz"

    def get(self, image_hash: str, model: FeatureModel) -> np.ndarray | None:
        """Features [model.dimension] in float32, None where there are none or they cannot be used."""
        try:
            with np.load(self.path(image_hash, model), allow_pickle=False) as entry:
                features = entry["features"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        sound = features.shape == (model.dimension,) and features.dtype == np.float32 and np.isfinite(features).all()
        return features if sound else None

    def put(self, image_hash: str, model: FeatureModel, features: np.ndarray) -> None:
        """Keep the features of a picture; the file appears whole or not at all."""
        with new_file(self.path(image_hash, model)) as aside:
            np.savez(aside, features=features)
