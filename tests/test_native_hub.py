"""What comes from the hub, and what goes to it: the card, the pictures, the weights; nothing else of the run."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.repocard import ModelCard
from huggingface_hub.utils import EntryNotFoundError, filter_repo_objects
from PIL import Image

from native_parts import options
from sd3.common.command_line import UserError
from sd3.native import hub, loop

TOKEN = "hf_averysecrettoken"
MEDIUM = "--pretrained_model_name_or_path=stabilityai/stable-diffusion-3-medium-diffusers"


class NoCard(EntryNotFoundError):
    """A repository without a card."""

    def __init__(self) -> None:
        Exception.__init__(self, "no card")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """What the hub's functions were given; nothing leaves the machine."""
    seen: dict[str, dict] = {}

    def create(**given: object) -> types.SimpleNamespace:
        seen["create"] = given
        return types.SimpleNamespace(repo_id=f"me/{given['repo_id']}")

    def load(name: str, token: str | None = None) -> ModelCard:
        seen["card"] = {"name": name, "token": token}
        raise NoCard

    monkeypatch.setattr(hub, "create_repo", create)
    monkeypatch.setattr(hub, "upload_folder", lambda **given: seen.update(upload=given))
    monkeypatch.setattr(ModelCard, "load", load)
    return seen


@pytest.fixture
def pushed(tmp_path: Path) -> Callable[..., argparse.Namespace]:
    """Options of a run in tmp_path / "dog" that pushes."""
    (tmp_path / "dog").mkdir()
    return lambda *flags: options(
        MEDIUM, "--push_to_hub", f"--hub_token={TOKEN}", f"--output_dir={tmp_path}/dog", *flags
    )


def test_without_the_flag_nothing_is_made(calls: dict) -> None:
    assert hub.prepare_repo(options()) is None
    assert not calls


def test_the_repository_is_named(calls: dict, pushed: Callable) -> None:
    assert hub.prepare_repo(pushed()) == "me/dog"
    assert calls["create"] == {"repo_id": "dog", "exist_ok": True, "token": TOKEN}
    assert hub.prepare_repo(pushed("--hub_model_id=cat")) == "me/cat"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_card_and_pictures(kind: str, tmp_path: Path, calls: dict, pushed: Callable) -> None:
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    hub.upload(pushed('--validation_prompt=a dog, "sitting"'), "me/dog", pictures, kind, trained_text_encoders=False)
    card = ModelCard((tmp_path / "dog" / "README.md").read_text(encoding="utf-8"))
    assert card.data.base_model == "stabilityai/stable-diffusion-3-medium-diffusers"
    assert card.data.instance_prompt == "a dog"
    assert [entry["output"]["url"] for entry in card.data.widget] == ["image_0.png", "image_1.png"]
    assert Image.open(tmp_path / "dog" / "image_1.png").getpixel((0, 0)) == (0, 0, 255)
    assert ("lora" in card.data.tags) == ("load_lora_weights" in card.text) == (kind == "lora")
    assert "stable-diffusion-3-medium/blob/main/LICENSE.md" in card.text
    code = card.text.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "text encoders are as they were" in card.text


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_card_of_a_model_without_t5_says_so_to_the_library(
    kind: str, tmp_path: Path, calls: dict, pushed: Callable
) -> None:
    hub.upload(pushed(), "me/dog", [], kind, trained_text_encoders=False, with_t5=False)
    code = (tmp_path / "dog" / "README.md").read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "torch_dtype=torch.float16, text_encoder_3=None, tokenizer_3=None)" in code


def test_the_token_is_in_no_file(tmp_path: Path, calls: dict, pushed: Callable) -> None:
    hub.upload(pushed(), "me/dog", [Image.new("RGB", (8, 8))], "lora", trained_text_encoders=True)
    assert calls["upload"]["token"] == calls["card"]["token"] == TOKEN
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} == {"README.md", "image_0.png"}
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_card_and_pictures_go_and_nothing_else(
    kind: str, tmp_path: Path, calls: dict, pushed: Callable
) -> None:
    hub.upload(pushed(), "me/dog", [Image.new("RGB", (8, 8))] * 2, kind, trained_text_encoders=False)
    assert calls["upload"]["folder_path"] == tmp_path / "dog"
    lora, pipeline = ["pytorch_lora_weights.safetensors"], [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder_3/model-00001-of-00002.safetensors",
        "tokenizer_2/merges.txt", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
    ]  # fmt: skip
    sent = ["README.md", "image_0.png", "image_1.png", *(lora if kind == "lora" else pipeline)]
    kept = [
        "checkpoint-10/optimizer.bin", "checkpoint-10/transformer/a.safetensors", ".checkpoint-20.x/a", "train.log",
        "command.sh", "environment.json", "run_settings.json", "report.json", "report.png", "logs/run/hparams.yml",
        "logs/run/events.out.tfevents.1", "profile/rank-0.json", "cache/latents.safetensors", "image_7.png",
        "class/class-00000.png", "my_dog/image_1.png", "image_of_me/a.png", ".cache/huggingface/x", "SubjectCase.log",
        "transformers/a.txt", *(pipeline if kind == "lora" else lora),
    ]  # fmt: skip
    allowed, ignored = (calls["upload"].get(f"{what}_patterns") for what in ("allow", "ignore"))
    assert list(filter_repo_objects(sent + kept, allow_patterns=allowed, ignore_patterns=ignored)) == sent


def test_the_base_model_is_downloaded_to_where_downloads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **given: object) -> None:
        asked.update(given, name=name)
        raise OSError("no network")

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    alone = types.SimpleNamespace(device=torch.device("cpu"), num_processes=1, mixed_precision="no")
    with pytest.raises(UserError, match=f"{MEDIUM} is no directory here, and cannot be had from the hub"):
        loop.run(options(MEDIUM, "--cache_dir=big-disk", "--revision=main"), "lora", alone)
    assert (asked["name"], asked["cache_dir"], asked["revision"]) == (MEDIUM.split("=")[1], "big-disk", "main")


def test_a_local_base_model_is_not_told_by_its_path(tmp_path: Path, calls: dict, pushed: Callable) -> None:
    base = tmp_path / "SD3.5-large"
    base.mkdir()
    given = pushed(f"--pretrained_model_name_or_path={base}")
    hub.upload(given, "me/dog", [], "lora", trained_text_encoders=True)
    text = (tmp_path / "dog" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "stable-diffusion-3.5-large/blob" in text and "Text encoders were trained too." in text


def test_a_card_that_is_there_is_kept(
    tmp_path: Path, calls: dict, pushed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelCard, "load", lambda name, token=None: ModelCard("---\ntags:\n- lora\n---\nMine."))
    hub.upload(pushed(), "me/dog", [], "lora", trained_text_encoders=False)
    card = ModelCard((tmp_path / "dog" / "README.md").read_text(encoding="utf-8"))
    assert "Mine." in card.text
    assert card.data.tags.count("lora") == 1 and "text-to-image" in card.data.tags


@pytest.mark.parametrize("error", [OSError("no network.\nmore"), ValueError("")])
def test_a_hub_out_of_reach(error: Exception, calls: dict, pushed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(**given: object) -> None:
        raise error

    monkeypatch.setattr(hub, "create_repo", failing)
    monkeypatch.setattr(hub, "upload_folder", failing)
    for call in (hub.prepare_repo, lambda given: hub.upload(given, "me/dog", [], "full", False)):
        with pytest.raises(UserError, match=r"--push_to_hub: .*dog.* \((no network|ValueError)\); check") as refusal:
            call(pushed())
        assert refusal.value.status == 1 and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("stabilityai/stable-diffusion-3.5-large", "stable-diffusion-3.5-large"),
        ("stabilityai/stable-diffusion-3.5-medium", "stable-diffusion-3.5-medium"),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "stable-diffusion-3-medium"),
        ("my-model", "stable-diffusion-3-medium"),
    ],
)
def test_licences(model: str, licence: str) -> None:
    assert f"/{licence}/" in hub.licence_of(model)[1]
