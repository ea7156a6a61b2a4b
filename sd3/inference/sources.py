"""From what the user named to the folders that hold the weights: a pipeline directory, a hub name, a run, a checkpoint.

Everything that can be refused by looking at files is refused here, before weights are loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.hub_models import model_directory
from sd3.common.model_files import INDEX, content_hash, missing_files, parts_of
from sd3.common.part_contents import damaged_part
from sd3.common.trained_length import RUN_SETTINGS
from sd3.common.weight_files import MODELS, of_variants, tensor_shapes
from sd3.model.lora_file import LORA_FILE, PEFT_FILE, LoraFile, read_lora
from sd3.model.lora_file import PARTS as LORA_PARTS
from sd3.model.lora_settings import LoraError

GIVE_LORA = "give a LoRA file, or the run directory or a checkpoint of a LoRA fine-tune"


@dataclass(frozen=True)
class Sources:
    """Where the parts of a pipeline lie (`parts`: folder of each by its name), and the LoRA file if there is one.

    `length_records`: files that may say how long prompts were in training, the one that counts most first; see
    sd3.common.trained_length.
    """

    name: str
    parts: dict[str, Path]
    lora_file: LoraFile | None = None
    length_records: tuple[Path, ...] = ()

    @property
    def lora(self) -> Path | None:
        """Where the LoRA lies."""
        return self.lora_file.path if self.lora_file else None

    def model_hash(self) -> str:
        """Hash of all parts, see sd3.common.model_files.content_hash."""
        return content_hash(self.parts.values())

    def notes(self) -> list[str]:
        """What is unusual about the model, a sentence each."""
        notes = []
        if "text_encoder_3" not in self.parts:
            notes.append("note: the model has no T5; prompts are read by CLIP alone.")
        if found := of_variants([folder for part, folder in self.parts.items() if part in MODELS]):
            notes.append(f"note: no whole plain weight files; read {found}.")
        return notes

    def lora_hash(self) -> str:
        """Hash of the LoRA, see sd3.model.lora_file.LoraFile.content_hash; empty without one."""
        return self.lora_file.content_hash() if self.lora_file else ""


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
        wrong = [what for part in trained.values() for what in (*missing_files(part), *damaged_part(part))]
        if wrong:
            raise UserError(f"--model={model} is damaged: {'; '.join(wrong)}; use another checkpoint.")
        if trained:
            own_records = (*_settings_files(root), *base.length_records)
            return _with_lora(model, {**base.parts, **trained}, given, own_records)
        if (own := root / LORA_FILE).is_file():
            if lora and Path(lora).resolve() not in (own.resolve(), root.resolve()):
                raise UserError(
                    f"--model={model} brings its own LoRA, and --lora={lora} names another; give the base model with "
                    "--model, or leave --lora out."
                )
            return _with_lora(model, base.parts, str(own), base.length_records)
        made = sorted(root.glob("checkpoint-*/complete"), key=lambda path: int(path.parent.name.split("-")[1]))
        advice = f"use --model={made[-1].parent}" if made else "let the run finish, or resume it"
        raise UserError(f"--model={model} is a run that has not written its final model; {advice}.")
    folder = model_directory(model, "--model", local_files_only=local_files_only)
    return _with_lora(model, _parts_of(folder), given, (folder / INDEX, folder / RUN_SETTINGS))


def _parts_of(root: Path) -> dict[str, Path]:
    return {part: root / part for part in parts_of(root)}


def _run_settings(root: Path) -> dict[str, str] | None:
    """Settings of the launcher's run that `root` is, or is a checkpoint of."""
    for file in _settings_files(root):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def _settings_files(root: Path) -> tuple[Path, ...]:
    """Where the settings of a run may be, for its directory or a checkpoint in it."""
    root = root.absolute()
    folders = (root, root.parent) if root.name.startswith("checkpoint-") else (root,)
    return tuple(folder / RUN_SETTINGS for folder in folders)


def _base_of_run(root: Path, settings: dict[str, str], local_files_only: bool) -> Sources:
    base = str(settings.get("model_name", ""))
    if Path(base).resolve() == root.resolve():
        raise UserError(f"--model={root} names itself as its base model; name the base model.")
    try:
        return find_sources(base, "", local_files_only)
    except UserError as error:
        raise UserError(f"--model={root} was trained from {base}, which cannot be used: {error}") from None


def _with_lora(name: str, parts: dict[str, Path], lora: str, length_records: tuple[Path, ...]) -> Sources:
    """`length_records` are the model's; those of the LoRA go before them."""
    if not lora:
        return Sources(name, parts, length_records=length_records)
    file = Path(lora)
    if file.is_dir():
        found = [file / name for name in (LORA_FILE, PEFT_FILE) if (file / name).is_file()]
        if not found:
            raise UserError(f"--lora={lora} holds no {LORA_FILE}; {GIVE_LORA}.")
        if len(found) > 1:
            raise UserError(f"--lora={lora} holds both {LORA_FILE} and {PEFT_FILE}; name one of them.")
        file = found[0]
    elif not file.is_file():
        raise UserError(f"--lora={lora} does not exist; {GIVE_LORA}.")
    found_lora = _read_lora(lora, file, parts)
    return Sources(name, parts, found_lora, (file, *_settings_files(file.parent), *length_records))


def _read_lora(given: str, file: Path, parts: dict[str, Path]) -> LoraFile:
    """The LoRA, each of whose matrices meets a weight of the model."""
    try:
        return read_lora(file, {part: tensor_shapes(parts[part]) for part in LORA_PARTS})
    except LoraError as error:
        raise UserError(f"--lora={given} {error}") from None
