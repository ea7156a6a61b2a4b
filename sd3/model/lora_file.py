"""LoRA files in the layouts of diffusers and PEFT: which matrices each module gets, and how strongly they count.

W' = W + s B A, where A (rank x inputs) projects down and B (outputs x rank) up again; s = alpha / rank (Hu et al. 2021,
arXiv:2106.09685), or alpha / sqrt(rank) where the file asks for it (Kalajdzievski 2023, arXiv:2312.03732). A file that
does not state alpha counts fully, s = 1, as diffusers reads it. Whatever is not known here is refused, not left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3.common.model_files import file_hash
from sd3.common.safetensors_files import safetensors_header, safetensors_metadata
from sd3.model.lora_settings import SETTINGS_KEY, LoraError, LoraSettings, parse_settings

if TYPE_CHECKING:
    import torch

PARTS = ("transformer", "text_encoder", "text_encoder_2")
LORA_FILE = "pytorch_lora_weights.safetensors"  # of diffusers and of both engines
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# What SD3's transformer consists of: a key without the name of a part is the transformer's if it begins so.
TRANSFORMER_CHILDREN = (
    "context_embedder", "norm_out", "pos_embed", "proj_out", "time_text_embed", "transformer_blocks",
)  # fmt: skip
# How a module's key ends, by what it holds: A, B, or alpha. The second of each pair of rows is of older diffusers.
SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A.default.weight": "A", ".lora_B.default.weight": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B", ".lora.alpha": "alpha",
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B", ".lora_linear_layer.alpha": "alpha",
    "_lora.down.weight": "A", "_lora.up.weight": "B", "_lora.alpha": "alpha",
    ".alpha": "alpha",
}  # fmt: skip
# Names of a text encoder's modules before "_lora", and today.
OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Other methods than LoRA, by what the keys of their files hold.
OTHER_METHODS = {"lokr_": "LoKr", "hada_": "LoHa", "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA"}


@dataclass(frozen=True)
class LowRank:
    """What one module gets: the keys of A (rank x inputs) and B (outputs x rank) in the file, and s."""

    down: str
    up: str
    rank: int
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that was checked: `parts` has, for each part of the pipeline, what its modules get."""

    path: Path
    parts: dict[str, dict[str, LowRank]] = field(hash=False)
    settings_path: Path | None = None  # PEFT's, where the strength is stated in a file beside

    def content_hash(self) -> str:
        """SHA-256 of the file; with a file beside that states the strength, both hashes."""
        return "".join(file_hash(path) for path in (self.path, self.settings_path) if path)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file by their keys.

        Raises:
            LoraError: the header and what follows it do not agree, or a number is NaN or infinity.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(self.path)
        except SafetensorError as error:
            raise LoraError(f"is damaged ({error}); train or copy it again.") from None
        if wrong := [key for key, tensor in found.items() if not tensor.float().isfinite().all()]:
            raise LoraError(f"is damaged: {wrong[0]} holds NaN or infinity; train or copy it again.")
        return found


def read_lora(file: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]] | None]) -> LoraFile:
    """Look into a LoRA file, without reading its matrices.

    Args:
        file: the .safetensors file.
        shapes: the shape of each weight of a part by its name; None where that is not known.

    Raises:
        LoraError: it is none for this model, is damaged, or holds what is not known; the text goes behind its name.
    """
    try:
        entries, header = safetensors_header(file), safetensors_metadata(file)
    except (OSError, ValueError) as error:
        raise LoraError(f"{error}; give the .safetensors file of a LoRA.") from None
    if not entries:
        raise LoraError("holds no weights; give a LoRA that was trained.")
    modules = _collect(entries)
    ranks = {name: _rank(name, keys, entries, shapes) for name, keys in modules.items()}
    settings, beside = _settings(file, entries, header, list(modules))
    alphas = _alphas(file, modules, entries)
    parts: dict[str, dict[str, LowRank]] = {}
    for (part, module), keys in modules.items():
        scale = settings[part].scale(module, ranks[part, module], alphas.get((part, module)))
        parts.setdefault(part, {})[module] = LowRank(keys["A"], keys["B"], ranks[part, module], scale)
    return LoraFile(file, parts, beside)


def _collect(entries: Mapping[str, dict[str, Any]]) -> dict[tuple[str, str], dict[str, str]]:
    """The keys "A", "B" and perhaps "alpha" of each (part, module)."""
    modules: dict[tuple[str, str], dict[str, str]] = {}
    named = {key: _part_of(key)[0] is not None for key in entries}
    for key, has_part in named.items():
        name, side = _parse(key)
        if has_part != next(iter(named.values())):
            raise LoraError(f"names the part of the pipeline in some keys and not in {key}; give a file as trained.")
        keys = modules.setdefault(name, {})
        if side in keys:
            raise LoraError(f"holds {'.'.join(name)} twice ({keys[side]}, {key}); give a file with one LoRA.")
        keys[side] = key
    for name, keys in modules.items():
        if not {"A", "B"} <= set(keys):
            raise LoraError(f"is damaged: half of {'.'.join(name)} is missing; train or copy it again.")
    return modules


def _part_of(key: str) -> tuple[str | None, str]:
    """The part that a key names, if it does, and the rest."""
    key = key.removeprefix(PEFT_PREFIX)
    part, _, rest = key.partition(".")
    return (part, rest) if part in PARTS else (None, key)


def _parse(key: str) -> tuple[tuple[str, str], str]:
    """The (part, module) that a key belongs to, and "A", "B" or "alpha"."""
    part, rest = _part_of(key)
    suffix = next((suffix for suffix in SUFFIXES if rest.endswith(suffix)), "")
    module = rest.removesuffix(suffix)
    if suffix.startswith("_"):
        stem, _, last = module.rpartition(".")
        module = f"{stem}.{OLD_NAMES[last]}" if last in OLD_NAMES and part in PARTS[1:] else ""
    if suffix and module and (part or rest.partition(".")[0] in TRANSFORMER_CHILDREN):
        return (part or "transformer", module), SUFFIXES[suffix]
    method = next((f", which is of a {name}" for mark, name in OTHER_METHODS.items() if mark in key), "")
    raise LoraError(
        f"is not a LoRA of SD3 in diffusers' format (it holds {key}{method}); give a file that a LoRA launcher wrote."
    )


def _rank(
    name: tuple[str, str],
    keys: Mapping[str, str],
    entries: Mapping[str, dict[str, Any]],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]] | None],
) -> int:
    """The rank of a module's pair, after both matrices were held against the weight that they belong to."""
    part, module = name
    sizes = {}
    for side in ("A", "B"):
        key = keys[side]
        shape, dtype = entries[key]["shape"], entries[key]["dtype"]
        if len(shape) != 2 or not all(isinstance(length, int) for length in shape):
            raise LoraError(f"is damaged: {key} is not a matrix; train or copy it again.")
        if dtype not in DTYPES:
            raise LoraError(f"holds {key} in {dtype}; expected one of {', '.join(DTYPES)}: convert it.")
        _check_width(part, module, key, tuple(shape), shapes.get(part), side)
        sizes[side] = shape[0 if side == "A" else 1]
    if sizes["A"] != sizes["B"]:
        raise LoraError(f"is damaged: halves of {part}.{module} differ in rank; train or copy it again.")
    if not sizes["A"]:
        raise LoraError(f"is damaged: {keys['A']} has rank 0; train or copy it again.")
    return sizes["A"]


def _check_width(
    part: str, module: str, key: str, shape: tuple[int, ...], known: Mapping[str, tuple[int, ...]] | None, side: str
) -> None:
    """A projects from the width that the weight reads, B to the width that it makes."""
    if known is None:
        return  # weights without readable headers: add_lora compares
    weight = known.get(f"{module}.weight")
    if weight is None:
        raise LoraError(f"was trained for another model: {part} has no {module}; give the model it was trained on.")
    if len(weight) != 2 or module.endswith("_embedding"):
        raise LoraError(f"holds {key}, and {module} is not a linear layer; give a LoRA of linear layers.")
    if shape[1 if side == "A" else 0] != weight[1 if side == "A" else 0]:
        raise LoraError(
            f"was trained for another model: {key} is {'x'.join(map(str, shape))}, and the weight "
            f"it belongs to is {'x'.join(map(str, weight))}; give the model it was trained on."
        )


def _settings(
    file: Path, entries: Mapping[str, object], header: Mapping[str, str], modules: list[tuple[str, str]]
) -> tuple[dict[str, LoraSettings], Path | None]:
    """What the file states of each part's strength, and the file beside it that states it, if one does."""
    parts = list(dict.fromkeys(part for part, _ in modules))
    if SETTINGS_KEY in header:
        return parse_settings(header[SETTINGS_KEY], f"its header's {SETTINGS_KEY}", parts, PARTS), None
    by_peft = any(key.startswith(PEFT_PREFIX) for key in entries)
    beside = file.with_name(PEFT_SETTINGS)
    if not by_peft and not (file.name == PEFT_FILE and beside.is_file()):
        return {part: LoraSettings(part) for part in parts}, None
    try:
        text = beside.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise LoraError(
            f"is an adapter of PEFT's, whose strength is stated in {PEFT_SETTINGS}, and that cannot be read in the "
            "same directory; copy it there."
        ) from None
    return parse_settings(text, str(beside), parts, PARTS), beside


def _alphas(
    file: Path, modules: Mapping[tuple[str, str], Mapping[str, str]], entries: Mapping[str, dict[str, Any]]
) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors that state alpha, by (part, module)."""
    wanted = {name: keys["alpha"] for name, keys in modules.items() if "alpha" in keys}
    for key in wanted.values():
        if entries[key]["dtype"] not in DTYPES or any(side != 1 for side in entries[key]["shape"]):
            raise LoraError(f"is damaged: {key} is not one floating-point number; train or copy it again.")
    if not wanted:
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(key).reshape(()) for name, key in wanted.items()}
    except SafetensorError as error:
        raise LoraError(f"is damaged ({error}); train or copy it again.") from None
