"""Feature models against the libraries used directly, and the cache of features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_parts import CLIP_WIDTH, VIT_WIDTH, draw, make_feature_models
from prepared import prepared
from sd3.common.command_line import UserError
from sd3.evaluation.feature_cache import FeatureCache
from sd3.evaluation.feature_models import ClassTokenModel, ClipModel, FeatureModel, InceptionModel, load_kid_model
from sd3.evaluation.features import extract
from sd3.evaluation.images import ImageSource, sha256


@pytest.fixture(scope="module")
def models() -> Path:
    return prepared("feature-models", make_feature_models)


@pytest.fixture(scope="module")
def vit(models: Path) -> ClassTokenModel:
    return ClassTokenModel("--dino-model", str(models / "vit"))


@pytest.fixture
def sources(tmp_path: Path) -> list[ImageSource]:
    found = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        draw(number, side=40 + number).save(path)
        found.append(ImageSource(str(path), path))
    return found


def test_clip_features_are_those_of_the_library(models: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    images, texts = [draw(1), draw(2, side=70)], ["a dog", "a photo of a dog in a red house"]
    model = ClipModel("--clip-model", str(models / "clip"))
    reference = CLIPModel.from_pretrained(models / "clip").eval()
    tokens = CLIPTokenizer.from_pretrained(models / "clip")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = CLIPImageProcessor.from_pretrained(models / "clip")(images, return_tensors="pt")
        out = reference(**tokens, **pixels)
    found = model.embed(images)
    assert found.shape == (2, CLIP_WIDTH) == (2, model.dimension)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(found), out.image_embeds)
    torch.testing.assert_close(unit(model.embed_texts(texts, batch_size=1)), out.text_embeds)


def test_long_texts_are_cut_and_known(models: Path) -> None:
    model = ClipModel("--clip-model", str(models / "clip"))
    long = "dog " * 100
    assert model.token_count(long) > model.text_length
    assert model.token_count("a dog") == len("adog") + 2
    assert model.embed_texts([long, "a dog"], batch_size=2).shape == (2, CLIP_WIDTH)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_class_tokens_are_those_of_the_library(models: Path, name: str) -> None:
    from transformers import AutoModel, CLIPImageProcessor

    images = [draw(1), draw(2)]
    reference = AutoModel.from_pretrained(models / name).eval()
    with torch.no_grad():
        pixels = CLIPImageProcessor.from_pretrained(models / name)(images, return_tensors="pt").pixel_values
        expected = reference(pixels).last_hidden_state[:, 0]
    model = ClassTokenModel("--dino-model", str(models / name))
    assert model.dimension == VIT_WIDTH
    torch.testing.assert_close(model.embed(images), expected)


def test_a_hash_names_the_weights_and_not_their_place(models: Path, tmp_path: Path, vit: ClassTokenModel) -> None:
    """ViT without its pooler, as DINO is published: what is drawn at random must not be hashed."""
    shutil.copytree(models / "vit", tmp_path / "moved")
    assert ClassTokenModel("--dino-model", str(tmp_path / "moved")).digest == vit.digest
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["layer_norm_eps"] = 0.5
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    assert ClassTokenModel("--dino-model", str(tmp_path / "moved")).digest != vit.digest
    assert ClassTokenModel("--dino-model", str(models / "dinov2")).digest != vit.digest


@pytest.mark.parametrize(("kind", "name"), [(ClassTokenModel, "vit"), (ClipModel, "clip")])
def test_a_hash_does_not_follow_the_version_of_the_library(
    models: Path, monkeypatch: pytest.MonkeyPatch, kind: type[FeatureModel], name: str
) -> None:
    before = kind("--some-model", str(models / name)).digest
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    assert kind("--some-model", str(models / name)).digest == before


def test_inception_features_are_what_the_last_layer_reads(tmp_path: Path) -> None:
    from torchvision.models import Inception_V3_Weights, inception_v3

    torch.manual_seed(0)
    reference = inception_v3(weights=None, aux_logits=True, transform_input=True, init_weights=False).eval()
    torch.save(reference.state_dict(), tmp_path / "inception.pth")
    image = draw(1, side=80)
    seen = []
    reference.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        reference(Inception_V3_Weights.IMAGENET1K_V1.transforms()(image)[None])
    model = load_kid_model("--kid-model", str(tmp_path / "inception.pth"))
    assert isinstance(model, InceptionModel)
    found = model.embed([image])
    torch.testing.assert_close(found, seen[0])
    assert found.shape == (1, model.dimension)


def test_unusable_models_are_explained(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pth").write_bytes(b"no weights")
    shutil.copytree(models / "vit", tmp_path / "no weights")
    (tmp_path / "no weights" / "model.safetensors").unlink()
    cases = [
        (ClipModel, str(tmp_path / "gone" / "x" / "y"), "neither a directory nor a hub name"),
        (ClipModel, str(tmp_path / "empty"), "holds no config.json"),
        (ClipModel, "some/model-that-nobody-has", "cannot be loaded"),
        (ClipModel, str(models / "vit"), "lacks weights"),
        (ClassTokenModel, str(models / "clip"), "has no class token"),
        (ClassTokenModel, str(tmp_path / "no weights"), "cannot be loaded"),
        (InceptionModel, str(tmp_path / "file.pth"), "cannot be loaded as torchvision's Inception-v3"),
        (InceptionModel, "inception-v3", "is not there; copy torchvision's weights to it"),
    ]
    for kind, name, why in cases:
        with pytest.raises(UserError, match=why) as caught:
            kind("--some-model", name, local_files_only=True)
        assert str(caught.value).startswith(f"--some-model={name}")
        assert "\n" not in str(caught.value)


class Counting:
    """A model that counts the pictures it is shown."""

    def __init__(self, model: ClassTokenModel) -> None:
        self.name, self.digest, self.preprocessing = model.name, model.digest, model.preprocessing
        self.dimension, self._model, self.shown = model.dimension, model, 0

    def embed(self, images: list[Image.Image]) -> torch.Tensor:
        self.shown += len(images)
        return self._model.embed(images)


def test_features_do_not_depend_on_batches_and_are_computed_once(
    vit: ClassTokenModel, sources: list[ImageSource], tmp_path: Path
) -> None:
    steps: list[int] = []
    model = Counting(vit)
    one = extract(model, sources, FeatureCache(tmp_path / "one"), 1, steps.append)
    assert (model.shown, steps) == (5, [1] * 5)
    three = extract(model, sources, FeatureCache(tmp_path / "three"), 3, steps.append)
    np.testing.assert_allclose(one, three, atol=1e-5)
    again = extract(model, sources, FeatureCache(tmp_path / "three"), 3, steps.append)
    assert model.shown == 10
    np.testing.assert_array_equal(again, three)


def test_the_cache_knows_picture_model_and_preprocessing(
    vit: ClassTokenModel, sources: list[ImageSource], tmp_path: Path
) -> None:
    cache, model = FeatureCache(tmp_path / "cache"), Counting(vit)
    extract(model, sources, cache, 2, lambda _: None)
    draw("another").save(sources[0].path)
    extract(model, sources, cache, 2, lambda _: None)
    assert model.shown == 5 + 1
    model.preprocessing += " "
    extract(model, sources, cache, 2, lambda _: None)
    assert model.shown == 6 + 5
    model.digest = "0" * 64
    extract(model, sources, cache, 2, lambda _: None)
    assert model.shown == 11 + 5


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "wrong shape", "not finite"])
def test_a_damaged_entry_is_computed_again(
    vit: ClassTokenModel, sources: list[ImageSource], tmp_path: Path, damage: str
) -> None:
    cache, model = FeatureCache(tmp_path / "cache"), Counting(vit)
    expected = extract(model, sources[:1], cache, 1, lambda _: None)
    entry = cache.path(sha256(sources[0].read()), model)
    content = entry.read_bytes()
    if damage == "empty":
        entry.write_bytes(b"")
    elif damage == "cut":
        entry.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = content.index(expected.tobytes()) + 5
        entry.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    else:
        wrong = np.full(VIT_WIDTH + (damage == "wrong shape"), np.nan if damage == "not finite" else 1, np.float32)
        np.savez(entry, features=wrong)
    np.testing.assert_array_equal(extract(model, sources[:1], cache, 1, lambda _: None), expected)
    assert model.shown == 2
    assert cache.get(sha256(sources[0].read()), model) is not None
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_a_corrupt_picture_is_named(vit: ClassTokenModel, sources: list[ImageSource], tmp_path: Path) -> None:
    content = sources[3].read()
    sources[3].path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="3.png cannot be read as a picture"):
        extract(vit, sources, FeatureCache(tmp_path / "cache"), 2, lambda _: None)
    sources[3].path.unlink()
    with pytest.raises(UserError, match="3.png cannot be read"):
        extract(vit, sources, FeatureCache(tmp_path / "cache"), 2, lambda _: None)


def test_undefined_features_are_refused(vit: ClassTokenModel, sources: list[ImageSource], tmp_path: Path) -> None:
    model = Counting(vit)
    model.embed = lambda images: torch.full((len(images), VIT_WIDTH), float("nan"))
    with pytest.raises(UserError, match="features of .*0.png"):
        extract(model, sources, FeatureCache(tmp_path / "cache"), 2, lambda _: None)
