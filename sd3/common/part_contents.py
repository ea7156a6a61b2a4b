"""Do the files of a part of a pipeline belong together? Configurations and headers of weights; no weights are read.

The libraries draw weights that a file lacks at random and only warn: a part whose weights are another's would train.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3.common.json_files import read_object
from sd3.common.weight_files import damaged_files, tensor_shapes, weight_files

# How the tensors of each repeated block are called, and the setting with their number.
_CLIP_LAYERS = (re.compile(r"encoder\.layers\.(\d+)\."), "num_hidden_layers")
BLOCKS = {
    "transformer": (re.compile(r"transformer_blocks\.(\d+)\."), "num_layers"),
    "vae": (re.compile(r"decoder\.up_blocks\.(\d+)\."), "block_out_channels"),
    "text_encoder": _CLIP_LAYERS,
    "text_encoder_2": _CLIP_LAYERS,
    "text_encoder_3": (re.compile(r"encoder\.block\.(\d+)\."), "num_layers"),
}
# By the end of a tensor's name the settings that its lengths are, None for a length that is no setting.
_CLIP_WIDTHS = {"token_embedding.weight": ("vocab_size", "hidden_size")}
LENGTHS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "transformer": {
        "context_embedder.weight": ("caption_projection_dim", "joint_attention_dim"),
        "pos_embed.proj.weight": (None, "in_channels", "patch_size", "patch_size"),
    },
    "vae": {"decoder.conv_out.weight": ("out_channels",), "encoder.conv_in.weight": (None, "in_channels")},
    "text_encoder": _CLIP_WIDTHS,
    "text_encoder_2": _CLIP_WIDTHS,
    "text_encoder_3": {"shared.weight": ("vocab_size", "d_model")},
}
VAE_FACTORS = ("scaling_factor", "shift_factor")  # of SD3 both are numbers; the class's defaults are those of others


def damaged_part(part: Path) -> list[str]:
    """Files of a part that cannot be used, each with what is wrong."""
    if found := damaged_files(part):
        return found
    try:
        config = read_object(part / "config.json")
    except FileNotFoundError:
        return []  # which is said of missing files
    except ValueError as error:
        return [f"{part.name}/config.json {error}"]
    if not config:
        return [f"{part.name}/config.json is empty"]
    wrong = None if weight_files(part)[1] else _contradiction(part, config)
    return [wrong] if wrong else []


def _contradiction(part: Path, config: Mapping[str, Any]) -> str | None:
    """What of the configuration cannot be of a model with these weights."""
    if (shapes := tensor_shapes(part)) is None:
        return None
    name = f"{part.name}/config.json"
    pattern, setting = BLOCKS[part.name]
    blocks = {match[1] for key in shapes if (match := pattern.search(key))}
    if not blocks:
        return f"{part.name} has weights of something else ({next(iter(shapes), 'none')})"
    stated = config.get(setting, blocks)
    if (len(stated) if isinstance(stated, list | set) else stated) != len(blocks):
        return f"{name} has {setting} {stated!r}, and the weights have {len(blocks)} blocks"
    for ending, settings in LENGTHS[part.name].items():
        for shape in (shape for key, shape in shapes.items() if key.endswith(ending)):
            for setting, length in zip(settings, shape, strict=False):
                if setting and config.get(setting, length) != length:
                    return f"{name} has {setting} {config[setting]!r}, and the weights have {length}"
    for setting in VAE_FACTORS if part.name == "vae" else ():
        if not isinstance(config.get(setting), int | float):
            return f"{name} has {setting} {config.get(setting)!r}, expected a number"
    return None
