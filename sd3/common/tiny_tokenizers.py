"""CLIP and T5 tokenizers written from nothing: every byte or printable character is a token, and so is every word that
is asked for; any other word, a rare one such as `sks` among them, is spelled."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def merges_for(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016, arXiv:1508.07909) that leave one token of each of the ASCII `words`."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while True:
        pairs = Counter(pair for letters in spelled for pair in zip(letters, letters[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for letters in spelled:
            at = 0
            while at + 1 < len(letters):
                if (letters[at], letters[at + 1]) == best:
                    letters[at : at + 2] = ["".join(best)]
                at += 1


def write_clip_tokenizer(folder: Path, words: Sequence[str] = ()) -> int:
    """Byte-level CLIP tokenizer: every byte is a token, alone or ending a word; returns the size of its vocabulary."""
    from transformers import CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    letters, merges = list(bytes_to_unicode().values()), merges_for(words)
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>", model_max_length=77
    ).save_pretrained(folder)
    return len(tokens)


def write_t5_tokenizer(folder: Path, words: Sequence[str] = ()) -> int:
    """Unigram tokenizer of printable characters and words; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    characters = [c for c in string.printable if not c.isspace()]
    whole = [f"▁{word}" if word.isalnum() else word for word in words]
    pieces = list(dict.fromkeys(["<pad>", "</s>", "<unk>", "▁", *characters, *whole]))
    # A word costs as much as one character, so that it is never spelled.
    scores = [0.0, 0.0, 0.0, *(-2.0 for _ in pieces[3:])]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2))
    tokenizer.normalizer = normalizers.Nmt()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(
        tokenizer_object=tokenizer, extra_ids=0, model_max_length=77, pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return len(pieces)
