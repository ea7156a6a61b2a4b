"""Which weight files of a part of a pipeline are used. Reads headers and indexes; standard library only.

Plain files where they are whole, else those of a variant such as fp16, part by part. Other files beside them do not
matter: an index whose shards were left out, a file that is cut short beside whole shards. Where diffusers and
transformers would take other files, a temporary folder of links shows them the chosen ones under plain names.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3.common.safetensors_files import safetensors_header

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
OF_DIFFUSERS = ("transformer", "vae")
# What each library looks for, first to last: stem, suffix, whether it is an index of shards.
DIFFUSERS_LAYOUTS = (
    ("diffusion_pytorch_model", "safetensors", True),
    ("diffusion_pytorch_model", "safetensors", False),
    ("diffusion_pytorch_model", "bin", False),
)
TRANSFORMERS_LAYOUTS = (
    ("model", "safetensors", False),
    ("model", "safetensors", True),
    ("pytorch_model", "bin", False),
    ("pytorch_model", "bin", True),
)
# Spellings of a variant's file and index. The libraries know the first of the index; older ones wrote the others.
VARIANT_FILE = ("{stem}.{variant}.{suffix}",)
VARIANT_INDEX = (
    "{stem}.{suffix}.index.{variant}.json",
    "{stem}.{suffix}.{variant}.index.json",
    "{stem}.{variant}.{suffix}.index.json",
)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
PREFERRED = {"fp32": 0, "fp16": 1, "bf16": 2}  # the most mantissa bits first


@dataclass(frozen=True)
class WeightSet:
    """The weights of a part in one layout.

    `main` is the file, or the index of the shards `files`; `plain_name` what `main` would be called without shards and
    variant; `missing` and `damaged` say what stands against using it, `expected` whether the library that loads the
    part takes this set by itself when it is asked for `variant`.
    """

    main: Path
    files: tuple[Path, ...]
    variant: str | None
    plain_name: str
    missing: tuple[str, ...]
    damaged: tuple[str, ...]
    expected: bool = False

    @property
    def whole(self) -> bool:
        """Can it be loaded?"""
        return not self.missing and not self.damaged


def choose_weights(part: Path, variant: str | None = None) -> WeightSet | None:
    """The weights of a part to use; `variant`: None for the rule of this module. None where none are whole."""
    return next((found for found in _all_sets(part, variant) if found.whole), None)


def weight_files(part: Path) -> tuple[list[Path], list[str]]:
    """Weight files of a part, and what is missing of them."""
    sets = _all_sets(part, None)
    if chosen := next((found for found in sets if found.whole), None):
        return list(chosen.files), []
    if not sets:
        return [], [f"{part.name}/*.safetensors"]
    return [file for file in sets[0].files if file.is_file()], list(sets[0].missing)


def damaged_files(part: Path) -> list[str]:
    """Weight files of a part that are cut short or are something else, each with what is wrong; none where others are
    whole."""
    sets = _all_sets(part, None)
    return [] if not sets or any(found.whole for found in sets) else list(sets[0].damaged)


def tensor_shapes(part: Path) -> dict[str, tuple[int, ...]] | None:
    """Shape of each tensor of a part, from the headers; None where its weights are not safetensors."""
    files, _ = weight_files(part)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    return {name: tuple(entry["shape"]) for file in files for name, entry in safetensors_header(file).items()}


def variants_in(part: Path) -> list[str]:
    """Variants that the folder of a part has files of, whole or not: those of most other parts first."""
    if not (found := _variants(part)):
        return []
    others = [_variants(part.parent / name) for name in MODELS if name != part.name]
    return sorted(
        found, key=lambda name: (-sum(name in other for other in others), PREFERRED.get(name, len(PREFERRED)), name)
    )


def of_variants(parts: Sequence[Path], variant: str | None = None) -> str:
    """Which parts are read from the files of a variant, as a clause; empty where none is, or where it was asked for."""
    found: dict[str, list[str]] = {}
    for part in parts:
        chosen = choose_weights(part, variant)
        if chosen and chosen.variant != variant:
            found.setdefault(str(chosen.variant), []).append(part.name)
    return "; ".join(f"{', '.join(names)} from {name} files" for name, names in found.items())


@contextlib.contextmanager
def plain_folder(part: Path, variant: str | None = None) -> Iterator[Path]:
    """A folder with the weights of a part under plain names: the part's own, or a temporary one with links."""
    chosen = choose_weights(part, variant)
    if chosen is None or (chosen.expected and chosen.variant is None):
        yield part
        return
    with tempfile.TemporaryDirectory(prefix="sd3-") as name:
        folder = Path(name) / part.name
        folder.mkdir()
        _link(part, chosen, folder)
        yield folder


def _link(part: Path, chosen: WeightSet, folder: Path) -> None:
    stem, _, suffix = chosen.plain_name.partition(".")
    for file in part.glob("*.json"):
        if ".index." not in file.name:
            (folder / file.name).symlink_to(file.resolve())
    if chosen.files == (chosen.main,):
        (folder / chosen.plain_name).symlink_to(chosen.main.resolve())
        return
    count = len(chosen.files)
    names = {file.name: f"{stem}-{i:05}-of-{count:05}.{suffix}" for i, file in enumerate(chosen.files, 1)}
    for file in chosen.files:
        (folder / names[file.name]).symlink_to(file.resolve())
    index = json.loads(chosen.main.read_text(encoding="utf-8"))
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    index.setdefault("metadata", {})
    (folder / f"{chosen.plain_name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _all_sets(part: Path, variant: str | None) -> list[WeightSet]:
    """The sets of a part: of the variant asked for, or plain ones before those of any variant."""
    names = [variant] if variant else [None, *variants_in(part)]
    return [found for name in names for found in _sets(part, name)]


def _sets(part: Path, variant: str | None) -> list[WeightSet]:
    """The sets of one variant, in the order in which the library looks for them; then what only others wrote."""
    known, other = [], []
    for stem, suffix, is_index in _layouts(part):
        plain_name = f"{stem}.{suffix}"
        if variant is None:
            spellings = [f"{plain_name}.index.json" if is_index else plain_name]
        else:
            forms = VARIANT_INDEX if is_index else VARIANT_FILE
            spellings = [form.format(stem=stem, suffix=suffix, variant=variant) for form in forms]
        for place, name in enumerate(spellings):
            if (main := part / name).is_file():
                (other if place else known).append((main, plain_name, is_index))
    # Where indexes of other spellings lie, what diffusers takes depends on the path of the folder.
    return [
        _read_set(*found, part, variant, expected=not place and not other) for place, found in enumerate(known + other)
    ]


def _read_set(
    main: Path, plain_name: str, is_index: bool, part: Path, variant: str | None, expected: bool
) -> WeightSet:
    files, missing, damaged = [main], [], []
    if is_index:
        try:
            files = [part / name for name in shards_of(main)]
        except ValueError as error:
            files, damaged = [], [f"{part.name}/{main.name} {error}"]
    for file in files:
        if not file.is_file():
            missing.append(f"{part.name}/{file.name}")
        elif file.suffix == ".safetensors":
            try:
                safetensors_header(file)
            except ValueError as error:
                damaged.append(f"{part.name}/{file.name} {error}")
    return WeightSet(main, tuple(files), variant, plain_name, tuple(missing), tuple(damaged), expected)


def shards_of(index: Path) -> list[str]:
    """Names of the shards of an index, all in its own folder.

    Raises:
        ValueError: it is not an index, or names files elsewhere.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("is not an index of shards") from error
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise ValueError("names no files in its own folder")
    return sorted(names)


def _layouts(part: Path) -> tuple[tuple[str, str, bool], ...]:
    return DIFFUSERS_LAYOUTS if part.name in OF_DIFFUSERS else TRANSFORMERS_LAYOUTS


def _variants(part: Path) -> set[str]:
    patterns = [
        re.compile(form.replace(".", r"\.").format(stem=stem, suffix=suffix, variant=r"([\w-]+)"))
        for stem, suffix, is_index in _layouts(part)
        for form in (VARIANT_INDEX if is_index else VARIANT_FILE)
    ]
    names = [file.name for file in part.iterdir()] if part.is_dir() else []
    found = {match[1] for name in names for pattern in patterns if (match := pattern.fullmatch(name))}
    return {name for name in found if not SHARD.search(name)}
