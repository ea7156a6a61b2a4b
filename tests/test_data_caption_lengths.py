"""Counts of tokens against the tokenizers that the encoders are given, and the sentence that is made of them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPTokenizer, CLIPTokenizerFast, T5TokenizerFast

from repository import PROJECT
from sd3.data.caption_lengths import (
    ADDED,
    ClipCounter,
    EncoderCut,
    caption_lengths,
    clip_counter,
    cut_sentence,
    surely_fits,
    t5_counter,
)

MODEL = PROJECT / "sd3" / "tiny_world" / "model"
ODD = [
    "", "   ", "a dog", "wow!!! no! way!", "a&amp;b &lt;|endoftext|&gt; x", "<|endoftext|>abc<|startoftext|>",
    "<|ENDOFTEXT|> hi", "“quoted” text’s ﬁne", "schÃ¶n mojibake", "日本語のテキスト、長い", "Ⅷ ½ 12345",
    "it's I'll WE'VE", "ΟΔΥΣΣΕΥΣ Σ", "\u0958\ufb2c \U0001d160",
    "İstanbul ẞ ſ", "a\x00b\x1b[31m red\r\n\tnew\u2028line", "👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "x" * 500, "&nGt;&NotEqualTilde;", "a\u00a0b\x85c", "…—–", "e\u0301\u0327", "\x1c\x1d a", "ﷺ" * 40, "＆amp; ＡＢＣ",
]  # fmt: skip


def texts(alphabet: str, count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return ["".join(drawn.choices(alphabet, k=drawn.randint(1, 200))) for _ in range(count)]


@pytest.fixture(scope="module")
def strange() -> list[str]:
    return ODD + texts("abc XYZ 09 '!&;<|>é日\u0301\u200d😀\n\t\x1f￼ﬀⅣ½ßİﷺ", 500, 3)


@pytest.fixture(scope="module")
def padded_with_mark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tokenizer that pads with `!`, as SD3's second one does: `!!!` is then three tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    CLIPTokenizer.from_pretrained(MODEL / "tokenizer_2", pad_token="!").save_pretrained(folder)
    return folder


def lengths(tokenizer: object, captions: list[str]) -> list[int]:
    return [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]


def test_clip_counts_are_its_tokenizers(strange: list[str], padded_with_mark: Path) -> None:
    for folder in (MODEL / "tokenizer", padded_with_mark):
        assert ClipCounter(folder)(strange) == lengths(CLIPTokenizer.from_pretrained(folder), strange)


def test_a_pad_token_in_older_files_counts(strange: list[str], padded_with_mark: Path, tmp_path: Path) -> None:
    shutil.copytree(padded_with_mark, tmp_path / "old")
    file = tmp_path / "old" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["added_tokens_decoder"]
    file.write_text(json.dumps(config))
    assert ClipCounter(tmp_path / "old")(strange) == lengths(CLIPTokenizer.from_pretrained(tmp_path / "old"), strange)


def test_clip_with_a_single_file_counts_as_with_vocabulary_and_merges(strange: list[str], tmp_path: Path) -> None:
    real = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    CLIPTokenizerFast.from_pretrained(MODEL / "tokenizer").save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert clip_counter(tmp_path)(strange) == lengths(real, strange)


def test_what_the_quick_way_refuses_goes_the_long_way(tmp_path: Path) -> None:
    """A merge of something that is not a token: CLIPTokenizer takes it, the tokenizers library does not."""
    shutil.copytree(MODEL / "tokenizer", tmp_path / "t")
    with (tmp_path / "t" / "merges.txt").open("a") as file:
        file.write("q q\n")
    with pytest.raises(Exception, match="vocabulary"):
        ClipCounter(tmp_path / "t")
    real = CLIPTokenizer.from_pretrained(tmp_path / "t")
    assert clip_counter(tmp_path / "t")(ODD) == lengths(real, ODD)


def test_t5_counts_are_its_tokenizers_whatever_the_file_remembers(strange: list[str], tmp_path: Path) -> None:
    real = T5TokenizerFast.from_pretrained(MODEL / "tokenizer_3")
    expected = lengths(real, strange)
    assert t5_counter(MODEL / "tokenizer_3")(strange) == expected
    real(["a dog"], padding="max_length", max_length=9, truncation=True)
    real.save_pretrained(tmp_path)
    assert '"truncation": {' in (tmp_path / "tokenizer.json").read_text().replace("\n", " ")
    assert t5_counter(tmp_path)(strange) == expected


@pytest.mark.parametrize("alphabet", ["abc XYZ 09 '!;<|>\n", "a &;gtlmp#x12", "aé日 İﷺ&;\u0958\U0001d160ŉ"])
def test_what_surely_fits_is_never_cut(alphabet: str, strange: list[str]) -> None:
    captions = [*texts(alphabet, 400, 5), *strange]
    for counter in (clip_counter(MODEL / "tokenizer"), t5_counter(MODEL / "tokenizer_3")):
        for caption, tokens in zip(captions, counter(captions), strict=True):
            assert not surely_fits(caption, tokens - 1)
    assert surely_fits("a" * 75, 77)
    assert not surely_fits("a" * 76, 77)


def test_cuts_are_counted_for_each_encoder(tmp_path: Path) -> None:
    # The tiny tokenizers spell these letters, CLIP in one token each, T5 with a token for the space before.
    captions = ["q " * 75, "q " * 76, "q " * 76, "z " * 100, "short"]
    cuts = caption_lengths(captions, MODEL, 160)
    clip, t5 = (lengths(kind.from_pretrained(MODEL / name), captions) for kind, name in
                ((CLIPTokenizer, "tokenizer"), (T5TokenizerFast, "tokenizer_3")))  # fmt: skip
    assert clip[:3] == [77, 78, 78]
    over = [tokens for tokens in t5 if tokens > 160]
    assert cuts == [EncoderCut("CLIP", 77, 3, max(clip)), EncoderCut("T5", 160, len(over), max(over))]
    assert 0 < len(over) < 3
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MODEL / name, tmp_path / name)
    assert [cut.encoder for cut in caption_lengths(captions, tmp_path, 160)] == ["CLIP"]  # no T5, no cut of it


def test_two_clips_that_differ_have_a_cut_each(padded_with_mark: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(padded_with_mark, tmp_path / "tokenizer_2")
    with (tmp_path / "tokenizer" / "merges.txt").open("a") as file:
        file.write("! !</w>\n")
    vocabulary = tmp_path / "tokenizer" / "vocab.json"
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text()) | {"!!</w>": 5000}))
    assert caption_lengths(["!! " * 50], tmp_path, 77) == [
        EncoderCut("the first CLIP", 77, 0, 0),
        EncoderCut("the second CLIP", 77, 1, ADDED + 100),
    ]


@pytest.mark.parametrize(
    ("cuts", "sentence"),
    [
        ([EncoderCut("CLIP", 77, 0, 0), EncoderCut("T5", 256, 0, 0)], ""),
        (
            [EncoderCut("CLIP", 77, 3, 412), EncoderCut("T5", 256, 1, 520)],
            "3 of 20 captions are longer than CLIP's 77 tokens (longest: 412) and are cut there; 1 is longer than T5's "
            "256 tokens (longest: 520) and is cut there.",
        ),
        (
            [EncoderCut("CLIP", 77, 1, 90), EncoderCut("T5", 256, 0, 0)],
            "1 of 20 captions is longer than CLIP's 77 tokens (longest: 90) and is cut there; T5's 256 hold them all.",
        ),
        (
            [EncoderCut("CLIP", 77, 0, 0), EncoderCut("T5", 20, 2, 30)],
            "2 of 20 captions are longer than T5's 20 tokens (longest: 30) and are cut there; CLIP's 77 hold them all.",
        ),
    ],
)
def test_the_sentence(cuts: list[EncoderCut], sentence: str) -> None:
    assert cut_sentence(cuts, 20) == sentence


def test_counting_needs_no_torch_and_is_quick() -> None:
    """5,000 captions of a sentence's length, every one of them spelled, in a process of its own."""
    code = """
import random, sys, time
from pathlib import Path
from sd3.data.caption_lengths import caption_lengths
drawn = random.Random(1)
captions = [f"{number} " + "".join(drawn.choices("abcdefgh ", k=100)) for number in range(5000)]
started = time.process_time()
print(caption_lengths(captions, Path(sys.argv[1]), 77)[0].cut, time.process_time() - started)
print({"torch", "transformers", "diffusers"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(MODEL)], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=120
    )
    figures, modules = done.stdout.splitlines()
    assert int(figures.split()[0]) > 4900
    assert float(figures.split()[1]) < 2
    assert modules == "set()"
