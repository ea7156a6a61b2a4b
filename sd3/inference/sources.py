"""From what the user named to the folders that hold the weights: a pipeline directory, a hub name, a run, a checkpoint.

Everything that can be refused by looking at files is refused here, before weights are loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.hub_models import model_directory
from sd3.common.model_files import (
    MODELS,
    TOKENIZERS,
    content_hash,
    damaged_files,
    file_hash,
    missing_files,
    safetensors_header,
    tensor_shapes,
)

LORA_FILE = "pytorch_lora_weights.safetensors"
GIVE_LORA = "give a LoRA file, or the run directory or a checkpoint of a LoRA fine-tune"
OTHER_MODEL = "was trained for another model"
RUN_SETTINGS = "run_settings.json"
# The two spellings of a LoRA pair, W' = W + B A: A projects down to the rank, B up again.
LORA_SUFFIXES = {".lora_A.weight": "A", ".lora.down.weight": "A", ".lora_B.weight": "B", ".lora.up.weight": "B"}


@dataclass(frozen=True)
class Sources:
    """Where the parts of a pipeline lie (`parts`: folder of each by its name), and the LoRA file if there is one."""

    name: str
    parts: dict[str, Path]
    lora: Path | None = None

    def model_hash(self) -> str:
        """Hash of all parts, see sd3.common.model_files.content_hash."""
        return content_hash(self.parts.values())

    def lora_hash(self) -> str:
        """SHA-256 of the LoRA file; empty without one."""
        return file_hash(self.lora) if self.lora else ""


def find_sources(
    model: str, lora: str = "", local_files_only: bool = False, default_lora: str = ""
) -> Sources:
    """Resolve --model and --lora; `default_lora` is taken where neither brings a LoRA.

    `model` may be a pipeline directory (downloaded, or the output of a full fine-tune), a hub name, the run directory
    of any launcher, or a checkpoint of a full fine-tune; `lora` a file, a run directory or a checkpoint of a LoRA
    fine-tune. The run of a LoRA fine-tune, given as `model`, stands for its base model with that LoRA.

    Raises:
        UserError: something is missing, incomplete, damaged, or made for another model.
    """
    root = Path(model)
    given = lora or default_lora
    if root.is_dir() and not (root / "model_index.json").is_file() and (settings := _run_settings(root)):
        base = _base_of_run(root, settings, local_files_only)
        trained = {part: root / part for part in MODELS if (root / part / "config.json").is_file()}
        wrong = [what for part in trained.values() for what in (*missing_files(part), *damaged_files(part))]
        if wrong:
            raise UserError(f"--model={model} is damaged: {'; '.join(wrong)}; use another checkpoint.")
        if trained:
            return _with_lora(model, {**base.parts, **trained}, given)
        if (own := root / LORA_FILE).is_file():
            if lora and Path(lora).resolve() not in (own.resolve(), root.resolve()):
                raise UserError(
                    f"--model={model} brings its own LoRA, and --lora={lora} names another; give the base model with "
                    "--model, or leave --lora out."
                )
            return _with_lora(model, base.parts, str(own))
        made = sorted(root.glob("checkpoint-*/complete"), key=lambda path: int(path.parent.name.split("-")[1]))
        advice = f"use --model={made[-1].parent}" if made else "let the run finish, or resume it"
        raise UserError(f"--model={model} is a run that has not written its final model; {advice}.")
    folder = model_directory(model, "--model", local_files_only=local_files_only)
    return _with_lora(model, _parts_of(folder), given)


def _parts_of(root: Path) -> dict[str, Path]:
    return {part: root / part for part in (*MODELS, *TOKENIZERS, "scheduler")}


def _run_settings(root: Path) -> dict[str, str] | None:
    """Settings of the launcher's run that `root` is, or is a checkpoint of."""
    for folder in (root, root.parent) if root.name.startswith("checkpoint-") else (root,):
        try:
            return json.loads((folder / RUN_SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def _base_of_run(root: Path, settings: dict[str, str], local_files_only: bool) -> Sources:
    base = str(settings.get("model_name", ""))
    if Path(base).resolve() == root.resolve():
        raise UserError(f"--model={root} names itself as its base model; name the base model.")
    try:
        return find_sources(base, "", local_files_only)
    except UserError as error:
        raise UserError(f"--model={root} was trained from {base}, which cannot be used: {error}") from None


def _with_lora(name: str, parts: dict[str, Path], lora: str) -> Sources:
    if not lora:
        return Sources(name, parts)
    file = Path(lora)
    if file.is_dir():
        if not (file / LORA_FILE).is_file():
            raise UserError(f"--lora={lora} holds no {LORA_FILE}; {GIVE_LORA}.")
        file = file / LORA_FILE
    elif not file.is_file():
        raise UserError(f"--lora={lora} does not exist; {GIVE_LORA}.")
    _check_lora(lora, file, parts)
    return Sources(name, parts, file)


def _check_lora(given: str, file: Path, parts: dict[str, Path]) -> None:
    """Every tensor of a LoRA must meet a weight of the model, in both of its dimensions."""
    try:
        entries = safetensors_header(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--lora={given} {error}; give the .safetensors file of a LoRA.") from None
    if not entries:
        raise UserError(f"--lora={given} holds no weights; give a LoRA that was trained.")
    shapes = {part: tensor_shapes(parts[part]) for part in ("transformer", "text_encoder", "text_encoder_2")}
    ranks: dict[str, dict[str, int]] = {}
    for key, entry in entries.items():
        part, _, rest = key.partition(".")
        suffix = next((suffix for suffix in LORA_SUFFIXES if rest.endswith(suffix)), None)
        if part not in shapes or suffix is None:
            raise UserError(
                f"--lora={given} is no LoRA of SD3 in diffusers' format (it holds {key}); give a file that a LoRA "
                "launcher wrote."
            )
        module = rest.removesuffix(suffix)
        shape, side = entry["shape"], LORA_SUFFIXES[suffix]
        if len(shape) != 2:
            raise UserError(f"--lora={given} is damaged: {key} is no matrix; train or copy it again.")
        ranks.setdefault(f"{part}.{module}", {})[side] = shape[0 if side == "A" else 1]
        known = shapes[part]
        if known is None:
            continue  # weights without readable headers: the loader will compare
        weight = known.get(f"{module}.weight")
        if weight is None:
            raise UserError(
                f"--lora={given} {OTHER_MODEL}: {part} has no {module}; give the model it was trained on."
            )
        width = weight[1] if side == "A" else weight[0]
        if shape[1 if side == "A" else 0] != width:
            raise UserError(
                f"--lora={given} {OTHER_MODEL}: {key} is {'x'.join(map(str, shape))}, and the weight "
                f"it belongs to is {'x'.join(map(str, weight))}; give the model it was trained on."
            )
    for module, found in ranks.items():
        if len(found) != 2:
            raise UserError(f"--lora={given} is damaged: half of {module} is missing; train or copy it again.")
        if found["A"] != found["B"]:
            raise UserError(f"--lora={given} is damaged: halves of {module} differ in rank; train or copy it again.")
