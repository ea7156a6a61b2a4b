"""The files of a pipeline's tokenizers: which there must be, and a folder from which transformers can load them.

transformers 5 saves a CLIP tokenizer as tokenizer.json alone, which the CLIPTokenizer of earlier versions cannot read;
the vocabulary and the merges that it needs stand in that file.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd3.common.json_files import read_object

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
OF_T5 = "tokenizer_3"
CLIP_FILES = ("vocab.json", "merges.txt")
MERGES_HEAD = "#version: 0.2"
MOST_ADDED = 9  # tokens that somebody has written into a vocabulary, which no pair makes


def missing_tokenizer_files(part: Path) -> list[str]:
    """Files that a tokenizer lacks: beside its configuration one of two forms."""
    missing = [] if (part / "tokenizer_config.json").is_file() else ["tokenizer_config.json"]
    if not (part / "tokenizer.json").is_file():
        forms = ("spiece.model",) if part.name == OF_T5 else CLIP_FILES
        missing += [name for name in forms if not (part / name).is_file()]
    return [f"{part.name}/{name}" for name in missing]


def damaged_tokenizer_files(part: Path) -> list[str]:
    """Files of a tokenizer that are read and cannot be used, each with what is wrong."""
    found = damaged_objects([part / "tokenizer_config.json"])
    found += damaged_objects([part / "special_tokens_map.json"], empty=True)
    if part.name == OF_T5:
        return found + damaged_objects([part / "tokenizer.json"])
    if only_tokenizer_json(part):
        try:
            byte_pairs(part / "tokenizer.json")
        except ValueError as error:
            found.append(f"{part.name}/tokenizer.json {error}")
        return found
    found += (of_vocabulary := damaged_objects([part / "vocab.json"]))
    return found if of_vocabulary else found + _damaged_merges(part)


def damaged_objects(files: list[Path], empty: bool = False) -> list[str]:
    """Those of the files that are there and are not JSON objects, or are empty ones, each with what is wrong.

    `empty`: an empty one is good.
    """
    found = []
    for file in files:
        try:
            if not read_object(file) and not empty:
                found.append(f"{file.parent.name}/{file.name} is empty")
        except FileNotFoundError:
            continue
        except ValueError as error:
            found.append(f"{file.parent.name}/{file.name} {error}")
    return found


def _damaged_merges(part: Path) -> list[str]:
    """merges.txt where it lacks pairs: tokenizers spell words without them, and say nothing."""
    if not (part / "vocab.json").is_file() or not (part / "merges.txt").is_file():
        return []  # which is said of missing files
    try:
        lines = (part / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return [f"{part.name}/merges.txt is not a text of byte pairs"]
    made = {line.replace(" ", "") for line in lines}
    tokens = [token for token in read_object(part / "vocab.json") if len(token.removesuffix("</w>")) > 1]
    lost = [token for token in tokens if token not in made and not token.startswith("<|")]
    if len(lost) > max(MOST_ADDED, len(tokens) // 100):
        return [f"{part.name}/merges.txt lacks {len(lost)} of {len(tokens)} byte pairs"]
    return []


def only_tokenizer_json(part: Path) -> bool:
    """Is the folder that of a CLIP tokenizer without the files that CLIPTokenizer reads before transformers 5?"""
    plain = all((part / name).is_file() for name in CLIP_FILES)
    return part.name != OF_T5 and not plain and (part / "tokenizer.json").is_file()


def byte_pairs(file: Path) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of a tokenizer.json; the merges as `a b`, however the version that wrote it spells them.

    Raises:
        ValueError: it holds none.
    """
    try:
        model: Any = json.loads(file.read_text(encoding="utf-8"))["model"]
        vocabulary, merges = model["vocab"], model["merges"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError("holds no byte pairs") from error
    if not isinstance(vocabulary, dict) or not vocabulary or any(pair.count(" ") != 1 for pair in merges):
        raise ValueError("holds no byte pairs")
    return vocabulary, merges


@contextlib.contextmanager
def tokenizer_folder(part: Path) -> Iterator[Path]:
    """The folder to load a tokenizer from: its own, or a temporary one that has vocabulary and merges as files too."""
    if not only_tokenizer_json(part):
        yield part
        return
    vocabulary, merges = byte_pairs(part / "tokenizer.json")
    with tempfile.TemporaryDirectory(prefix="sd3-") as name:
        folder = Path(name) / part.name
        folder.mkdir()
        for file in part.glob("*.json"):
            if file.name not in CLIP_FILES:
                (folder / file.name).symlink_to(file.resolve())
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join([MERGES_HEAD, *merges]) + "\n", encoding="utf-8")
        yield folder
