"""The models that turn pictures and texts into feature vectors, all in float32 and in evaluation mode."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sd3.common.command_line import UserError
from sd3.common.model_files import HUB_NAME

if TYPE_CHECKING:
    from PIL import Image

INCEPTION = "inception-v3"


class FeatureModel(abc.ABC):
    """A model for pictures. `digest` is a hash of weights and configuration; `preprocessing` says how it is fed."""

    name: str
    digest: str
    preprocessing: str
    dimension: int

    @abc.abstractmethod
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features [len(images), dimension] of RGB pictures of any size, float32 on the CPU."""


def weights_hash(config: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of a configuration and of named tensors as they are in memory, so that the file format is no matter."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _lasting(config: Any) -> Any:
    """A configuration less what says where it came from and which version of the library read it."""
    if isinstance(config, dict):
        passing = {"_name_or_path", "transformers_version"}
        return {key: _lasting(value) for key, value in config.items() if key not in passing}
    return config


def check_name(option: str, name: str, what: str) -> None:
    """Refuse what cannot be a model of transformers: a directory with a configuration, or a hub name.

    Raises:
        UserError: `name` is neither.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{option}={name} holds no config.json; give the directory of {what}.")
    elif path.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(f"{option}={name} is neither a directory nor a hub name; give {what}.")


def _why(error: Exception) -> str:
    """The first line of an error's text, to stand inside a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")


def _load(option: str, name: str, what: str, loader: Any, local_files_only: bool) -> Any:
    """`loader`'s from_pretrained, with its failures as a sentence for the user."""
    try:
        return loader(name, local_files_only=local_files_only)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{option}={name} cannot be loaded as {what} ({_why(error)}); give a complete one.") from None


def _load_model(option: str, name: str, what: str, kind: Any, local_files_only: bool) -> tuple[Any, set[str]]:
    """The model, and the names of weights that no feature depends on and that its files may lack."""

    def loader(source: str, **settings: bool) -> tuple[Any, dict[str, list[str]]]:
        return kind.from_pretrained(source, output_loading_info=True, torch_dtype=torch.float32, **settings)

    model, info = _load(option, name, what, loader, local_files_only)
    # The pooling head is not used here, and DINO's published weights come without one; it would be drawn at random.
    unused = {key for key in info["missing_keys"] if key.startswith("pooler.")}
    if lost := sorted(set(info["missing_keys"]) - unused) + [key for key, *_ in info["mismatched_keys"]]:
        raise UserError(f"{option}={name} lacks weights of {what}, {lost[0]} among them; give a complete one.")
    return model.eval(), unused


class _TransformersModel(FeatureModel):
    def __init__(
        self, option: str, name: str, what: str, kind: Any, device: str, local_files_only: bool
    ) -> None:
        from transformers import AutoImageProcessor

        check_name(option, name, what)
        self.name = name
        model, unused = _load_model(option, name, what, kind, local_files_only)
        self._processor = _load(option, name, what, AutoImageProcessor.from_pretrained, local_files_only)
        config = _lasting(model.config.to_dict())
        kept = ((key, tensor) for key, tensor in model.state_dict().items() if key not in unused)
        self.digest = weights_hash(json.dumps(config, sort_keys=True, default=str), kept)
        self.preprocessing = json.dumps(self._processor.to_dict(), sort_keys=True, default=str)
        self._model = model.to(device)
        self._device = device

    def _pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(self._device)


class ClipModel(_TransformersModel):
    """CLIP (Radford et al. 2021): pictures and texts in one space; features are the projected embeddings."""

    def __init__(self, option: str, name: str, device: str = "cpu", local_files_only: bool = False) -> None:
        """Load a CLIPModel with its tokenizer.

        Raises:
            UserError: it cannot be loaded, or is incomplete.
        """
        from transformers import AutoTokenizer, CLIPModel

        super().__init__(option, name, "a CLIP model", CLIPModel, device, local_files_only)
        self._tokenizer = _load(option, name, "a CLIP model", AutoTokenizer.from_pretrained, local_files_only)
        self.dimension = self._model.config.projection_dim
        self.text_length = self._model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """See FeatureModel."""
        return self._model.get_image_features(pixel_values=self._pixels(images)).cpu()

    def token_count(self, text: str) -> int:
        """Tokens of the whole text, start and end included; the model reads `text_length` of them."""
        return len(self._tokenizer(text, truncation=False, verbose=False).input_ids)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        """Features [len(texts), dimension], float32 on the CPU; longer texts are cut to what the model can read."""
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self._tokenizer(
                list(texts[start : start + batch_size]), padding="max_length", truncation=True,
                max_length=self.text_length, return_tensors="pt",
            )  # fmt: skip
            parts.append(
                self._model.get_text_features(
                    input_ids=tokens.input_ids.to(self._device), attention_mask=tokens.attention_mask.to(self._device)
                ).cpu()
            )
        return torch.cat(parts)


class ClassTokenModel(_TransformersModel):
    """A vision transformer such as ViT, DINO or DINOv2; features are the last layer's class token."""

    def __init__(self, option: str, name: str, device: str = "cpu", local_files_only: bool = False) -> None:
        """Load a model of transformers that has a class token.

        Raises:
            UserError: it cannot be loaded, is incomplete, or has no class token.
        """
        from transformers import AutoModel

        what = "a vision transformer with a class token"
        super().__init__(option, name, what, AutoModel, device, local_files_only)
        if not any(key.endswith("cls_token") for key, _ in self._model.named_parameters()):
            raise UserError(f"{option}={name} has no class token; give {what}, such as DINO or DINOv2.")
        self.dimension = self._model.config.hidden_size

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """See FeatureModel."""
        return self._model(pixel_values=self._pixels(images)).last_hidden_state[:, 0].cpu()


class InceptionModel(FeatureModel):
    """torchvision's Inception-v3 (Szegedy et al. 2016); features are the 2048 values before the last layer.

    Published FIDs use other weights of this network, ported from TensorFlow, and another way of resizing.
    """

    dimension = 2048

    def __init__(self, option: str, name: str, device: str = "cpu", local_files_only: bool = False) -> None:
        """Load torchvision's own weights (`name` is inception-v3), or a file with a state dictionary of the network.

        Raises:
            UserError: the weights are not there, or are not of this network.
        """
        from torchvision.models import Inception_V3_Weights, inception_v3

        weights = Inception_V3_Weights.IMAGENET1K_V1
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1] if name == INCEPTION else None
        path = file or Path(name)
        try:
            if file is not None and not file.is_file():
                if local_files_only:
                    raise UserError(
                        f"{option}={name}: {file} is not there; copy torchvision's weights to it, or name another file."
                    )
                state = weights.get_state_dict(progress=False, check_hash=True)
            elif path.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
            model = inception_v3(weights=None, aux_logits=True, transform_input=True, init_weights=False)
            model.load_state_dict(state)
        except UserError:
            raise
        except Exception as error:  # torch.load and load_state_dict raise many kinds; each one is the file's fault
            raise UserError(
                f"{option}={name} cannot be loaded as torchvision's Inception-v3 ({_why(error)}); "
                "give its state dictionary."
            ) from None
        self.name = name
        self.digest = weights_hash(INCEPTION, model.state_dict().items())
        self._transform = weights.transforms()
        self.preprocessing = " ".join(repr(self._transform).split())
        model.fc = torch.nn.Identity()
        self._model = model.eval().to(device)
        self._device = device

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """See FeatureModel."""
        return self._model(torch.stack([self._transform(image) for image in images]).to(self._device)).cpu()


def load_kid_model(option: str, name: str, device: str = "cpu", local_files_only: bool = False) -> FeatureModel:
    """The model for KID and FID: Inception-v3 by its name or a file of weights, else a vision transformer.

    Raises:
        UserError: as the two classes do.
    """
    kind = InceptionModel if name == INCEPTION or Path(name).is_file() else ClassTokenModel
    return kind(option, name, device, local_files_only)
