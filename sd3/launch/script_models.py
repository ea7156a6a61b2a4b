"""What the patched scripts can load of a model. They read it by the libraries' own rules, all parts as one variant.

Command line: the script, a model, then the flags that the script gets. Prints the variant to give to the script beside
these flags, empty for none.
Exit status: 0, also where the model is incomplete, which others report; 1 where only the native engine can load the
model, with the reason on standard output; 2 where no engine can, as it lacks the variant asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sd3.common.command_line import UserError
from sd3.common.hub_models import check_variant
from sd3.common.model_files import INDEX, check_model, has_t5, parts_of
from sd3.common.tokenizer_files import only_tokenizer_json
from sd3.common.weight_files import MODELS, choose_weights, variants_in

# At its end it loads the base model without the variant, and what it has saved without one with it.
FULL = "train_dreambooth_sd3"
READS_TOKENIZER_JSON = 5  # the first version of transformers whose CLIPTokenizer does


class OnlyNative(Exception):
    """The patched scripts cannot load the model; the text is a clause that says why."""


def script_variant(model: Path, asked: str | None = None, script: str = "train_dreambooth_lora_sd3") -> str | None:
    """The variant that a patched script has to be given to load the pipeline directory `model`; None for none.

    `asked`: the one that the user gives.

    Raises:
        OnlyNative: no variant makes it load.
    """
    if not has_t5(model):
        raise OnlyNative(f"it has no T5 (text_encoder_3 is null in {INDEX})")
    alone = [part for part in parts_of(model) if part.startswith("tokenizer") and only_tokenizer_json(model / part)]
    if alone and _transformers() < READS_TOKENIZER_JSON:
        raise OnlyNative(f"it has only tokenizer.json, not vocab.json and merges.txt, for {' and '.join(alone)}")
    parts = [model / part for part in parts_of(model) if part in MODELS]
    found = sorted({name for part in parts for name in variants_in(part)}, key=lambda name: _rank(name, parts))
    for variant in [asked] if asked else [None, *found]:
        if all(_loads(part, variant) for part in parts):
            if variant and script == FULL:
                raise OnlyNative(f"the full script fails at its end with --variant={variant}")
            return variant
    raise OnlyNative(f"{_obstacle(parts, asked)}, which the libraries do not find")


def _rank(name: str, parts: Sequence[Path]) -> int:
    """Place of a variant among those of the first part that has it."""
    return min(variants_in(part).index(name) for part in parts if name in variants_in(part))


def _loads(part: Path, variant: str | None) -> bool:
    """Does the library take these very weights? With a variant it also splits all file names at their dots."""
    chosen = choose_weights(part, variant)
    dotted = variant is None or all("." in file.name for file in part.iterdir())
    return chosen is not None and chosen.expected and chosen.variant == variant and dotted


def _obstacle(parts: Sequence[Path], asked: str | None) -> str:
    chosen = {part.name: choose_weights(part, asked) for part in parts}
    variants = {name: found.variant or "plain" for name, found in chosen.items() if found}
    if len(set(variants.values())) > 1:
        return f"its weights are mixed ({', '.join(f'{name}: {kind}' for name, kind in variants.items())})"
    names = [f"{name}/{found.main.name}" for name, found in chosen.items() if found and not found.expected]
    return f"other files lie beside {', '.join(names) or 'the weights'}"


def _transformers() -> int:
    """Major version of the installed transformers."""
    try:
        return int(version("transformers").split(".")[0])
    except PackageNotFoundError:
        return 0


def _folder(name: str, cache_dir: str | None, revision: str | None) -> Path | None:
    """The pipeline directory, or that of a hub model in the local cache; None where there is none to look into."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(name, INDEX, cache_dir=cache_dir, revision=revision)
    except (ImportError, ValueError):
        return None
    return Path(index).parent if isinstance(index, str | os.PathLike) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("script")
    parser.add_argument("model")
    for name in ("variant", "cache_dir", "revision"):
        parser.add_argument(f"--{name}")
    options, _ = parser.parse_known_args(arguments)
    folder = _folder(options.model, options.cache_dir, options.revision)
    if folder is None or check_model(str(folder)):
        print()
        return 0
    try:
        check_variant(folder, options.variant)
        found = script_variant(folder, options.variant, options.script)
        print("" if options.variant else found or "")
    except OnlyNative as error:
        print(error)
        return 1
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
