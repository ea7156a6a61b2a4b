"""How many captions are longer than each text encoder reads, counted exactly and without loading torch.

The launcher counts before every run, so that counting must be fast: tokenizers are read with the `tokenizers` library
where their files allow it, and captions that are too short to be cut are not tokenized.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sd3.common.load_errors import damage_as_user_error
from sd3.common.model_files import has_t5
from sd3.common.model_sizes import CLIP_TOKENS
from sd3.common.tokenizer_files import tokenizer_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP_FOLDERS = ("tokenizer", "tokenizer_2")
T5_FOLDER = "tokenizer_3"
# Of every encoded text: CLIP's start and end; T5's end, and the space that its tokenizer puts before the first word.
ADDED = 2
# Bytes or characters that one becomes, at most, when a text is normalized: U+FDFA is 18 characters in NFKC.
EXPANSION = 18
PER_BATCH = 1000  # bounds the memory that encodings take
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
# The pattern of Radford et al. 2021 (arXiv:2103.00020), as CLIPTokenizer has it.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
Counter = Callable[[Sequence[str]], list[int]]


class EncoderCut(NamedTuple):
    """What an encoder (`encoder`: its name in a sentence) loses of captions: `cut` of them are longer than its `limit`.

    `longest`: tokens of the longest one that is cut, start and end included; 0 where none is.
    """

    encoder: str
    limit: int
    cut: int
    longest: int


def caption_lengths(captions: Sequence[str], model: Path, t5_tokens: int) -> list[EncoderCut]:
    """CLIP's and T5's cuts of the captions; a CLIP each where the two differ, no T5 where the model has none.

    Args:
        captions: each counts, also one that is there twice.
        model: pipeline directory whose tokenizers are complete (sd3.common.model_files.check_model).
        t5_tokens: tokens that T5 reads of a caption.
    """
    names = (*CLIP_FOLDERS, T5_FOLDER) if has_t5(model) else CLIP_FOLDERS
    return cuts_by_folder(captions, {name: model / name for name in names}, t5_tokens)


def cuts_by_folder(captions: Sequence[str], folders: Mapping[str, Path], t5_tokens: int) -> list[EncoderCut]:
    """What `caption_lengths` returns, with the folder of each tokenizer by its name."""
    found = [_cut(captions, folder, clip_counter, "CLIP", CLIP_TOKENS) for folder in _present(folders, *CLIP_FOLDERS)]
    if len(set(found)) == 1:
        found = found[:1]
    elif found:
        names = ("the first CLIP", "the second CLIP")
        found = [cut._replace(encoder=name) for name, cut in zip(names, found, strict=True)]
    return found + [_cut(captions, folder, t5_counter, "T5", t5_tokens) for folder in _present(folders, T5_FOLDER)]


def cut_sentence(cuts: Sequence[EncoderCut], total: int, noun: str = "captions") -> str:
    """One sentence with every cut, "" where nothing is cut; `total`: number of captions, `noun`: what they are."""
    losing = [cut for cut in cuts if cut.cut]
    if not losing:
        return ""
    parts = []
    for cut in losing:
        verb = "is" if cut.cut == 1 else "are"
        what = f"{cut.cut} {verb}" if parts else f"{cut.cut} of {total} {noun} {verb}"
        limit = f"longer than {cut.encoder}'s {cut.limit} tokens (longest: {cut.longest})"
        parts.append(f"{what} {limit} and {verb} cut there")
    whole = [f"{cut.encoder}'s {cut.limit} hold them all" for cut in cuts if not cut.cut]
    return "; ".join(parts + whole) + "."


def _present(folders: Mapping[str, Path], *names: str) -> list[Path]:
    return [folders[name] for name in names if name in folders and (folders[name] / "tokenizer_config.json").is_file()]


def _cut(captions: Sequence[str], folder: Path, load: Callable[[Path], Counter], name: str, limit: int) -> EncoderCut:
    # Thousands of images may have one caption.
    distinct = [caption for caption in dict.fromkeys(captions) if not surely_fits(caption, limit)]
    doubtful = set(distinct)
    candidates = [caption for caption in captions if caption in doubtful] if distinct else []
    with damage_as_user_error(folder):
        tokens = dict(zip(distinct, load(folder)(distinct), strict=True)) if distinct else {}
    over = [tokens[caption] for caption in candidates if tokens[caption] > limit]
    return EncoderCut(name, limit, len(over), max(over, default=0))


def surely_fits(caption: str, limit: int) -> bool:
    """Whether a caption is too short to be cut, whatever the vocabulary: a token is one byte (CLIP) or one character
    (T5) at least, of the text as it is normalized.

    There an ASCII character stays one; any other one becomes at most EXPANSION, as does the `&` of an HTML entity.
    """
    expanding = len(caption) - len(caption.encode("ascii", "ignore")) + caption.count("&")
    return len(caption) + (EXPANSION - 1) * expanding + ADDED <= limit


@functools.lru_cache(1 << 16)
def _fixed(text: str) -> str:
    """As CLIPTokenizer has a text fixed; kept, for both of the CLIPs ask."""
    import ftfy

    # Nothing in printable ASCII is to be fixed but HTML entities, and looking for faults takes most of the time.
    plain = text.isascii() and text.isprintable() and "&" not in text
    return (text if plain else ftfy.fix_text(text)).lower()


def t5_counter(folder: Path) -> Counter:
    """Counts tokens as T5TokenizerFast does."""
    if (folder / "tokenizer.json").is_file():
        return _counter_of_file(folder)
    from transformers import T5TokenizerFast  # converts the SentencePiece model, in seconds

    return _counter_of(T5TokenizerFast.from_pretrained(folder))


def clip_counter(folder: Path) -> Counter:
    """Counts tokens as CLIPTokenizer of transformers 4 does."""
    with tokenizer_folder(folder) as found:
        try:
            return ClipCounter(found)
        except Exception:  # ftfy is absent, or tokenizers refuses (it raises plain Exceptions) what CLIPTokenizer takes
            from transformers import CLIPTokenizer

            return _counter_of(CLIPTokenizer.from_pretrained(found))


def _counter_of(tokenizer: Callable) -> Counter:
    return lambda captions: [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]


def _counter_of_file(folder: Path) -> Counter:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # the file keeps what its last user asked for
    tokenizer.no_padding()
    return lambda captions: _counts(tokenizer, captions)


def _counts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    batches = (texts[start : start + PER_BATCH] for start in range(0, len(texts), PER_BATCH))
    return [len(encoding) for batch in batches for encoding in encode(batch)]


class ClipCounter:
    """Token counts of CLIPTokenizer, in a fraction of its time: each distinct word is spelled once."""

    def __init__(self, folder: Path) -> None:
        """Read vocab.json, merges.txt and the added tokens of tokenizer_config.json."""
        import ftfy  # noqa: F401  # absent, it fails here and not at the first caption
        import regex
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
        added = sorted(_added_tokens(folder) | {*CLIP_ENDS}, key=len, reverse=True)
        self._words = regex.compile(CLIP_WORDS)
        self._added = re.compile(f"({'|'.join(map(re.escape, added))})")
        self._tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=CLIP_ENDS[1], end_of_word_suffix="</w>"))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokens_of = dict.fromkeys(CLIP_ENDS, 1)

    def __call__(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, start and end included."""
        words = [self._words_of(caption) for caption in captions]
        new = list({word for found in words for word in found} - self._tokens_of.keys())
        self._tokens_of.update(zip(new, _counts(self._tokenizer, new), strict=True))
        return [ADDED + sum(map(self._tokens_of.__getitem__, found)) for found in words]

    def _words_of(self, caption: str) -> list[str]:
        """What is spelled by itself; an added token, such as the `!` that SD3's second CLIP pads with, is one token as
        the end of the text is."""
        pieces = self._added.split(caption)  # every second one is what it is split at
        return [
            word
            for place, piece in enumerate(pieces)
            for word in ([CLIP_ENDS[1]] if place % 2 else self._words.findall(_fixed(piece)))
        ]


def _added_tokens(folder: Path) -> set[str]:
    """Tokens that a text is split at before anything else, from wherever versions of transformers have written them."""
    config, special, added = (
        json.loads(path.read_text(encoding="utf-8")) if (path := folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    named = [value for key, value in {**special, **config}.items() if key.endswith("_token")]
    listed = [*named, *config.get("added_tokens_decoder", {}).values(), *added]
    found = (entry["content"] if isinstance(entry, dict) else entry for entry in listed)
    return {token for token in found if isinstance(token, str) and token}
