"""What goes to the hub: the card, the pictures, the weights; never the token, checkpoints or the command line."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.repocard import ModelCard
from huggingface_hub.utils import EntryNotFoundError, filter_repo_objects
from PIL import Image

from native_parts import options
from sd3.common.command_line import UserError
from sd3.native import hub

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


def test_the_token_is_in_no_file(tmp_path: Path, calls: dict, pushed: Callable) -> None:
    hub.upload(pushed(), "me/dog", [Image.new("RGB", (8, 8))], "lora", trained_text_encoders=True)
    assert calls["upload"]["token"] == calls["card"]["token"] == TOKEN
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} == {"README.md", "image_0.png"}
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_what_stays_at_home(tmp_path: Path, calls: dict, pushed: Callable) -> None:
    hub.upload(pushed(f"--precompute_dir={tmp_path}/dog/cache"), "me/dog", [], "full", trained_text_encoders=False)
    assert calls["upload"]["folder_path"] == tmp_path / "dog"
    sent = ["README.md", "logs/run/events.out.tfevents.1", "transformer/diffusion_pytorch_model.safetensors"]
    kept = [
        "checkpoint-10/optimizer.bin", ".checkpoint-20.x/a", "logs/run.lock", "train.log", "command.sh",
        "environment.json", "cache/latents.safetensors", "logs/.half", ".cache/huggingface/x",
    ]  # fmt: skip
    ignored = calls["upload"]["ignore_patterns"]
    assert list(filter_repo_objects(sent + kept, ignore_patterns=ignored)) == sent


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
