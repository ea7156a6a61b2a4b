"""The trained weights on the hub: the repository made before training, the files and a model card sent after it.

The token goes to the hub's own functions and nowhere else.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import HfHubHTTPError

from sd3.common.command_line import UserError
from sd3.common.files import new_file
from sd3.common.model_files import PARTS

if TYPE_CHECKING:
    from PIL import Image

# What a run makes for others, by kind. A run directory holds more, which tells of this machine and of the data: logs,
# settings, reports, and whatever folders its owner keeps there. The hub's * takes slashes too.
UPLOADED = {
    "full": ("model_index.json", *(f"{part}/*" for part in PARTS)),
    "lora": (LORA_WEIGHT_NAME_SAFE,),
}

DESCRIPTION = """
# {title}

<Gallery />

{weights} for {base}, taught a subject by [DreamBooth](https://dreambooth.github.io/). {encoders}

## How to paint with it

The prompt `{prompt}` brings the subject up.

```python
import torch
from diffusers import StableDiffusion3Pipeline

{code}
pipeline("{example}", max_sequence_length={length}).images[0].save("picture.png")
```

## Licence

The terms of the base model hold: [{licence}]({licence}).
"""
FULL_CODE = """pipeline = StableDiffusion3Pipeline.from_pretrained("{repo}", torch_dtype=torch.float16{without})
pipeline.to("cuda")"""
WITHOUT_T5 = ", text_encoder_3=None, tokenizer_3=None"  # the library wants it said, whatever the index says
LORA_CODE = """pipeline = StableDiffusion3Pipeline.from_pretrained("{base}", torch_dtype=torch.float16{without})
pipeline.to("cuda")
pipeline.load_lora_weights("{repo}")"""


def prepare_repo(options: argparse.Namespace) -> str | None:
    """Make the repository of --push_to_hub, if it is not there; its name, or None without that flag.

    Raises:
        UserError: the hub refuses or cannot be reached; better now than after the training.
    """
    if not options.push_to_hub:
        return None
    name = options.hub_model_id or Path(options.output_dir).resolve().name
    with _told_of_the_hub(f"--push_to_hub: the repository {name} cannot be made"):
        return create_repo(repo_id=name, exist_ok=True, token=options.hub_token).repo_id


def upload(
    options: argparse.Namespace,
    repo_id: str,
    pictures: Sequence[Image.Image],
    kind: str,
    trained_text_encoders: bool,
    with_t5: bool = True,
) -> None:
    """Write the model card and its pictures into --output_dir, and send them and the weights to `repo_id`.

    Args:
        pictures: what the trained model painted of --validation_prompt; may be empty.
        kind: "full" or "lora".
        with_t5: whether the model has a T5.

    Raises:
        UserError: the hub refuses or cannot be reached; the weights stay where they are.
    """
    folder = Path(options.output_dir)
    shown = [f"image_{number}.png" for number in range(len(pictures))]
    for name, picture in zip(shown, pictures, strict=True):
        with new_file(folder / name) as aside:
            picture.save(aside, format="PNG")
    with _told_of_the_hub(f"--push_to_hub: {folder} cannot be uploaded to {repo_id}"):
        _write_card(options, repo_id, len(pictures), kind, trained_text_encoders, with_t5)
        upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="DreamBooth training",
            allow_patterns=[*UPLOADED[kind], "README.md", *shown], token=options.hub_token,
        )  # fmt: skip


def _write_card(
    options: argparse.Namespace, repo_id: str, pictures: int, kind: str, trained_text_encoders: bool, with_t5: bool
) -> None:
    """README.md in --output_dir; a card that the repository has already is kept, and gets the tags it lacks."""
    base, prompt = options.pretrained_model_name_or_path, options.instance_prompt
    is_local = Path(base).exists()
    shown = Path(base).resolve().name if is_local else base
    family, licence = licence_of(shown)
    example = options.validation_prompt or prompt
    weights = "LoRA weights" if kind == "lora" else "A whole pipeline"
    description = DESCRIPTION.format(
        title=f"{repo_id} – {family} DreamBooth{' LoRA' if kind == 'lora' else ''}",
        weights=weights,
        base=shown,
        encoders="Text encoders were trained too." if trained_text_encoders else "The text encoders are as they were.",
        prompt=prompt,
        code=(LORA_CODE if kind == "lora" else FULL_CODE).format(
            base=shown, repo=repo_id, without="" if with_t5 else WITHOUT_T5
        ),
        example=example.replace("\\", "\\\\").replace('"', '\\"'),
        licence=licence,
        length=options.max_sequence_length,
    )
    card = load_or_create_model_card(
        repo_id_or_path=repo_id,
        token=options.hub_token,
        from_training=True,
        license="other",
        base_model=None if is_local else base,  # the hub takes names alone, and a path is nobody's business
        prompt=prompt,
        model_description=description,
        widget=[{"text": example, "output": {"url": f"image_{number}.png"}} for number in range(pictures)],
    )
    tags = ["text-to-image", "diffusers", "diffusers-training", family.lower().replace(" ", "-")]
    tags += ["lora", "template:sd-lora"] if kind == "lora" else []
    card = populate_model_card(card, tags=[tag for tag in tags if tag not in (card.data.tags or [])])
    with new_file(Path(options.output_dir) / "README.md") as aside:
        card.save(aside)


def licence_of(model: str) -> tuple[str, str]:
    """The family that a model's name tells of, and the address of its licence."""
    name = model.lower()
    if "large" in name:
        family, repo = "SD3.5 Large", "stable-diffusion-3.5-large"
    elif "3.5" in name:
        family, repo = "SD3.5 Medium", "stable-diffusion-3.5-medium"
    else:
        family, repo = "SD3", "stable-diffusion-3-medium"
    return family, f"https://huggingface.co/stabilityai/{repo}/blob/main/LICENSE.md"


@contextlib.contextmanager
def _told_of_the_hub(what: str) -> Iterator[None]:
    """Turn what the hub's functions raise into one sentence, which begins with `what`."""
    try:
        yield
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{what} ({reason}); check the name, the token and the connection.", status=1) from None
