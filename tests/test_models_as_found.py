"""Models as users have them: without T5, with the files of a variant alone, with files of others beside, with only
tokenizer.json; each read as the whole plain model is, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, T5EncoderModel

import native_runs
from launching import DDP, LORA, fake_project, launch
from native_parts import Ranks, options
from sd3.common.command_line import UserError
from sd3.common.hub_models import model_directory
from sd3.common.model_files import check_model
from sd3.common.part_loading import load_tokenizer, load_weights
from sd3.common.tokenizer_files import MERGES_HEAD
from sd3.common.weight_files import MODELS, choose_weights, tensor_shapes
from sd3.data.caption_lengths import caption_lengths
from sd3.inference.paint import encode_prompts
from sd3.inference.sources import find_sources
from sd3.inference.weights import Weights
from sd3.launch import script_models
from sd3.launch.preflight import checkpoint_bytes
from sd3.launch.script_models import OnlyNative, script_variant
from sd3.native.model import Trained
from sd3.native.outputs import write_result
from sd3.native.precompute import Precompute
from sd3.native.prior import make_class_images
from sd3.native.text import Tokenizers, load_encoders

CPU = torch.device("cpu")
FP16_INDEX = "model.safetensors.index.fp16.json"
LEFT_OUT = {"metadata": {}, "weight_map": {"a": "model.fp16-00001-of-00002.safetensors"}}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, free to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def set_index(model: Path, **parts: object) -> None:
    file = model / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def without_t5(model: Path, remove: bool = True) -> Path:
    set_index(model, text_encoder_3=[None, None], tokenizer_3=[None, None])
    for part in ("text_encoder_3", "tokenizer_3") if remove else ():
        shutil.rmtree(model / part)
    return model


def rename(part: Path, variant: str) -> None:
    """Only the files of a variant."""
    for file in part.glob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}{file.suffix}"))


def shard(part: Path, index_name: str, shard_name: str) -> None:
    """The one plain file of a part as two shards."""
    (whole,) = part.glob("*.safetensors")
    tensors, weight_map = load_file(whole), {}
    names = sorted(tensors)
    for number, keys in enumerate((names[::2], names[1::2]), 1):
        file = shard_name.format(number)
        save_file({key: tensors[key] for key in keys}, part / file, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    (part / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()


def json_only(tokenizer: Path, pairs: bool = True, pad: str = "<|endoftext|>") -> None:
    """A CLIP tokenizer as transformers 5 saves it: vocabulary and merges in tokenizer.json, no map of special tokens.

    `pairs`: the merges as lists of two, which the tokenizers library writes from 0.20 on, else as `a b`.
    """
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    merges = (tokenizer / "merges.txt").read_text().strip().split("\n")[1:]
    added = [
        {"id": vocabulary[token], "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": token != "!"}
        for token in sorted({pad, "<|startoftext|>", "<|endoftext|>"})
    ]  # fmt: skip
    merges = [line.split(" ") for line in merges] if pairs else merges
    found = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
    for file in list(tokenizer.iterdir()):
        file.unlink()
    (tokenizer / "tokenizer.json").write_text(json.dumps(found))
    config = {
        "backend": "tokenizers", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "errors": "replace",
        "is_local": True, "local_files_only": False, "model_max_length": 77, "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>",
    }  # fmt: skip
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))


def same_weights(model: Path, other: Path, part: str, kind: type) -> bool:
    loaded, expected = (load_weights(kind, folder / part).state_dict() for folder in (model, other))
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


# ---- weight files


def spoil_single(part: Path, plain: str) -> None:
    """Whole shards, and beside them a single file that was cut short."""
    data = (part / plain).read_bytes()
    shard(part, f"{plain}.index.json", plain.replace(".", "-0000{}-of-00002.", 1))
    (part / plain).write_bytes(data[:-10])


LAYOUTS: dict[str, Callable[[Path, str], object]] = {
    "fp16": lambda part, plain: rename(part, "fp16"),
    "bf16": lambda part, plain: rename(part, "bf16"),
    "ema": lambda part, plain: rename(part, "non_ema"),
    "fp16 in shards": lambda part, plain: shard(
        part, plain + ".index.fp16.json", plain.replace(".", ".fp16-0000{}-of-00002.", 1)
    ),
    "fp16 in shards, older names": lambda part, plain: shard(
        part, plain.replace(".", ".fp16.", 1) + ".index.json", plain.replace(".", "-0000{}-of-00002.fp16.", 1)
    ),
    "index of other shards": lambda part, plain: (part / f"{plain}.index.fp16.json").write_text(json.dumps(LEFT_OUT)),
    "plain index of other shards": lambda part, plain: (part / f"{plain}.index.json").write_text(json.dumps(LEFT_OUT)),
    "damaged index": lambda part, plain: (part / f"{plain}.index.json").write_text("<html>"),
    "single file cut short": spoil_single,
    "fp16 cut short": lambda part, plain: (part / plain.replace(".", ".fp16.", 1)).write_bytes(b"a git-lfs pointer"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("part", "kind", "plain"),
    [
        ("text_encoder_3", T5EncoderModel, "model.safetensors"),
        ("transformer", SD3Transformer2DModel, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_whole_weights_are_found(
    model: Path, tiny_model: Path, layout: str, part: str, kind: type, plain: str
) -> None:
    LAYOUTS[layout](model / part, plain)
    assert check_model(str(model)) == []
    assert same_weights(model, tiny_model, part, kind)
    assert tensor_shapes(model / part) == tensor_shapes(tiny_model / part)
    loaded = load_weights(kind, model / part)
    assert str(getattr(loaded.config, "_name_or_path", "")) == str(model / part)


def test_a_variant_is_not_counted_twice(model: Path, tiny_model: Path) -> None:
    """Both the plain weights and a variant's: the plain ones are used, as the libraries do."""
    (plain,) = (model / "transformer").glob("*.safetensors")
    fp16 = Path(shutil.copy(plain, plain.with_name(f"{plain.stem}.fp16{plain.suffix}")))
    chosen = choose_weights(model / "transformer")
    assert chosen is not None and chosen.files == (plain,) and chosen.expected
    assert choose_weights(model / "transformer", "fp16").files == (fp16,)
    extra = fp16.stat().st_size
    assert checkpoint_bytes(str(model), lora=False) == checkpoint_bytes(str(tiny_model), lora=False) + extra


def test_of_several_variants_that_of_most_parts_is_taken(model: Path) -> None:
    for part in MODELS:
        rename(model / part, "bf16")
    for variant in ("fp16", "ema"):
        (file,) = (model / "vae").glob("*.bf16.safetensors")
        shutil.copy(file, str(file).replace("bf16", variant))
    assert {choose_weights(model / part).variant for part in MODELS} == {"bf16"}
    assert script_variant(model) == "bf16"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: shutil.rmtree(m / "text_encoder_3"), "incomplete: text_encoder_3/config.json missing"),
        (lambda m: shutil.rmtree(m / "tokenizer_3"), "tokenizer_3/tokenizer_config.json, tokenizer_3/spiece.model"),
        (lambda m: set_index(m, tokenizer_3=[None, None]), "tokenizer_3 (null in model_index.json) missing"),
        (lambda m: set_index(m, text_encoder=[None, None]), "text_encoder (null in model_index.json) missing"),
        (lambda m: (m / "model_index.json").write_text("{"), "damaged: model_index.json is not JSON"),
        (lambda m: (m / "model_index.json").write_text("[]"), "model_index.json is not an index of parts"),
        (lambda m: (m / "tokenizer" / "merges.txt").unlink(), "tokenizer/merges.txt missing"),
        (lambda m: (m / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae/*.safetensors missing"),
        (
            lambda m: shard_lost(m / "text_encoder_2"),
            "text_encoder_2/model.fp16-00002-of-00002.safetensors missing",
        ),
        (
            lambda m: (rename(m / "vae", "fp16"), cut(m / "vae" / "diffusion_pytorch_model.fp16.safetensors")),
            "damaged: vae/diffusion_pytorch_model.fp16.safetensors is cut short",
        ),
        (lambda m: outside(m), "model.safetensors.index.json names no files in its own folder"),
        (lambda m: bad_json_tokenizer(m), "damaged: tokenizer/tokenizer.json holds no byte pairs"),
    ],
)
def test_incomplete_stays_incomplete(model: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(model)
    (problem,) = check_model(str(model))
    assert said in problem
    with pytest.raises(UserError):
        find_sources(str(model))


def shard_lost(part: Path) -> None:
    shard(part, FP16_INDEX, "model.fp16-0000{}-of-00002.safetensors")
    (part / "model.fp16-00002-of-00002.safetensors").unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def outside(model: Path) -> None:
    (file,) = (model / "text_encoder").glob("*.safetensors")
    file.rename(model / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (model / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_json_tokenizer(model: Path) -> None:
    json_only(model / "tokenizer")
    (model / "tokenizer" / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}')


def test_a_variant_that_is_asked_for_must_be_there(model: Path) -> None:
    rename(model / "vae", "fp16")
    with pytest.raises(UserError, match="no such weights for transformer, text_encoder"):
        model_directory(str(model), "--model", variant="fp16")
    for part in MODELS[2:]:
        rename(model / part, "fp16")
    rename(model / "transformer", "fp16")
    assert model_directory(str(model), "--model", variant="fp16") == model
    assert model_directory(str(without_t5(model)), "--model", variant="fp16") == model


def test_a_variant_in_the_local_cache_is_found(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models--somebody--half"
    snapshot = Path(shutil.copytree(tiny_model, repository / "snapshots" / "abc"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for part in MODELS:
        rename(snapshot / part, "fp16")
    found = model_directory("somebody/half", "--model", local_files_only=True, cache_dir=str(tmp_path))
    assert found == snapshot
    assert script_models.main(["train_dreambooth_lora_sd3", "somebody/half", f"--cache_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out == "fp16\n"
    (snapshot / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="vae/config.json missing"):
        model_directory("somebody/half", "--model", local_files_only=True, cache_dir=str(tmp_path))


# ---- without T5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remove", [True, False])
def test_prompts_without_t5_are_the_librarys(model: Path, dtype: torch.dtype, remove: bool) -> None:
    without_t5(model, remove)  # what the index says counts, not the folder
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        model, text_encoder_3=None, tokenizer_3=None, torch_dtype=dtype
    )
    with torch.no_grad():
        prompt, negative, pooled, _ = pipeline.encode_prompt("a red star", "a red star", "a red star", device="cpu")
    sources = find_sources(str(model))
    assert set(sources.parts) == {*MODELS, "tokenizer", "tokenizer_2", "scheduler"} - {"text_encoder_3"}
    embeds = encode_prompts(Weights(sources, dtype, 1.0), ["a red star", ""], CPU)
    assert torch.equal(embeds["a red star"].prompt, prompt) and prompt.dtype == dtype
    assert torch.equal(embeds["a red star"].pooled, pooled)
    assert torch.equal(embeds[""].prompt, negative)
    # Training reads the same, from the cache and from token ids.
    tokens = Tokenizers(model, 256)(["a red star"])
    with torch.no_grad():
        trained_on, in_training = load_encoders(model, None, dtype)(tokens)
    assert torch.equal(trained_on, prompt) and torch.equal(in_training, pooled)
    cut = caption_lengths(["word " * 300], model, 77)
    assert [found.encoder for found in cut] == ["CLIP"]


def test_embeds_without_t5_are_kept_for_a_width(model: Path, tmp_path: Path) -> None:
    precompute = Precompute(options(f"--precompute_dir={tmp_path}/cache"), without_t5(model), Ranks())
    (key,) = precompute.prompts(["a dog"], torch.float32, 77)
    config = model / "transformer" / "config.json"
    width = json.loads(config.read_text())["joint_attention_dim"]
    assert precompute.cache.read(key)["prompt"].shape == (154, width)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"joint_attention_dim": width + 8}))
    (other,) = precompute.prompts(["a dog"], torch.float32, 77)
    assert precompute.cache.read(other)["prompt"].shape == (154, width + 8)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_text_encoders_are_trained_without_t5(model: Path, tmp_path: Path, kind: str) -> None:
    given = options("--train_text_encoder", kind=kind)
    trained = Trained(given, kind, without_t5(model), torch.float32)
    assert list(trained.parts) == ["transformer", "text_encoder", "text_encoder_2"]
    tokens = Tokenizers(model, 77)(["a dog"])
    latents, times = torch.zeros(1, 16, 8, 8), torch.full((1,), 500.0)
    trained.denoiser(latents, times, *tokens).square().mean().backward()
    assert trained.parts["text_encoder"].text_model.embeddings is not None
    assert all(parameter.grad is not None for name in ("text_encoder_2",) for parameter in gradients(trained, name))
    trained.base(model)
    (tmp_path / "out").mkdir()
    write_result(trained, model, tmp_path / "out", torch.float32)
    if kind == "full":
        assert check_model(str(tmp_path / "out")) == []
        StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", text_encoder_3=None, tokenizer_3=None)
        assert "text_encoder_3" not in find_sources(str(tmp_path / "out")).parts


def gradients(trained: Trained, name: str) -> list[torch.nn.Parameter]:
    """What is trained of the last layer but one of an encoder: the last one only makes the pooled output."""
    return [
        parameter for key, parameter in trained.parts[name].named_parameters()
        if parameter.requires_grad and "layers.0." in key
    ]  # fmt: skip


# ---- tokenizer.json alone

PROMPTS = [
    "a photo of sks dog", "", "Ünïcode CAFÉ naïve", "“curly” ‘quotes’ … schÃ¶n", "ﬁne ﬀ ｆｕｌｌ",
    "日本語 🐶 👩\u200d🚀", "don't I'VE we'll", "hello! wow!! !", "<|endoftext|> x <|startoftext|>",
    "tab\tnew\nline\u00a0nbsp\u3000",
    "word " * 120, "a" * 300, "&amp; <b> e\u0301 İstanbul ß ½ ٣ हिन्दी кот עִבְרִית",
]  # fmt: skip


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_tokenizer_json_gives_the_ids_of_its_vocabulary_and_merges(model: Path, pairs: bool, pad: str) -> None:
    folder = model / "tokenizer_2"
    tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token=pad)
    tokenizer.save_pretrained(folder)  # SD3's second tokenizer pads with "!"
    expected = tokenizer(PROMPTS, padding="max_length", truncation=True).input_ids
    json_only(folder, pairs, pad)
    found = load_tokenizer(CLIPTokenizer, folder)
    assert found(PROMPTS, padding="max_length", truncation=True).input_ids == expected
    assert check_model(str(model)) == []
    long = ["it's " * 100]
    assert caption_lengths(long, model, 77)[0].longest == len(tokenizer(long[0]).input_ids)
    assert MERGES_HEAD.startswith("#version")


def test_all_that_reads_prompts_reads_tokenizer_json(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        json_only(model / name)
    ours, theirs = (
        encode_prompts(Weights(find_sources(str(folder)), torch.float32, 1.0), PROMPTS[:3], CPU)
        for folder in (model, tiny_model)
    )
    assert all(torch.equal(ours[text].prompt, theirs[text].prompt) for text in PROMPTS[:3])
    for ids, expected in zip(Tokenizers(model, 77)(PROMPTS), Tokenizers(tiny_model, 77)(PROMPTS), strict=True):
        assert torch.equal(ids, expected)
    with pytest.raises(OnlyNative, match="only tokenizer.json, .* for tokenizer and tokenizer_2"):
        script_variant(model)


# ---- class images, results and the patched scripts


@pytest.mark.parametrize("kind", ["mixed", "no T5"])
def test_class_images_of_any_model(
    model: Path, tiny_model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "mixed":
        rename(model / "text_encoder_3", "fp16")
        (model / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(LEFT_OUT))
        json_only(model / "tokenizer")
    else:
        without_t5(model)
    call = StableDiffusion3Pipeline.__call__
    monkeypatch.setattr(
        StableDiffusion3Pipeline, "__call__",
        lambda self, prompt, **more: call(self, prompt, num_inference_steps=1, height=32, width=32, **more),
    )  # fmt: skip
    images = []
    for name, source in (("a", model), ("b", tiny_model)):
        prior = ("--with_prior_preservation", f"--class_data_dir={tmp_path / name}", "--class_prompt=a dog")
        make_class_images(options(*prior, "--num_class_images=1", "--seed=3"), source, Ranks())
        images.append((tmp_path / name / "class-00000.png").read_bytes())
    assert (images[0] == images[1]) == (kind == "mixed")


def test_the_result_of_a_variant_is_a_plain_pipeline(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    rename(model / "vae", "fp16")
    shard(model / "text_encoder_3", FP16_INDEX, "model.fp16-0000{}-of-00002.safetensors")
    (model / "text_encoder" / FP16_INDEX).write_text(json.dumps(LEFT_OUT))
    rename(model / "transformer", "bf16")
    trained = Trained(options(kind="full"), "full", model, torch.float32)
    output = tmp_path / "out"
    output.mkdir()
    write_result(trained, model, output, torch.float32)
    assert script_variant(output) is None
    pipeline = StableDiffusion3Pipeline.from_pretrained(output)
    expected = StableDiffusion3Pipeline.from_pretrained(tiny_model)
    for name in MODELS:
        weights = getattr(expected, name).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in getattr(pipeline, name).state_dict().items())
    assert not list(output.rglob("*fp16*.safetensors")) and not any(path.is_symlink() for path in output.rglob("*"))
    assert isinstance(pipeline.vae, AutoencoderKL)


def test_what_the_patched_scripts_can_load(model: Path) -> None:
    assert script_variant(model) is None
    rename(model / "vae", "fp16")
    with pytest.raises(OnlyNative, match=r"mixed \(transformer: plain, vae: fp16"):
        script_variant(model)
    for part in set(MODELS) - {"vae"}:
        rename(model / part, "fp16")
    assert script_variant(model) == "fp16" == script_variant(model, "fp16")
    with pytest.raises(OnlyNative, match="the full script .*--variant=fp16"):
        script_variant(model, script="train_dreambooth_sd3")
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(LEFT_OUT))
    with pytest.raises(OnlyNative, match="transformer/diffusion_pytorch_model.fp16.safetensors"):
        script_variant(model)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_project(tmp_path_factory.mktemp("project"))


def test_the_launcher_knows_what_an_engine_can_load(
    project: Path, model: Path, dog_dir: Path, tmp_path: Path
) -> None:
    def dry(*more: str, launcher: str = LORA) -> tuple[int, str, str]:
        given = [f"--model_name={os.path.relpath(model, project)}", f"--input_dir={dog_dir}", "--device=cpu"]
        given += ["--mixed_precision=no", "--resolution=64", f"--output_dir={tmp_path}/run", "--dry-run"]
        result = launch(project, launcher, *given, *more, cwd=project)
        return result.returncode, result.stdout, result.stderr

    for part in MODELS:
        rename(model / part, "fp16")
    status, out, _ = dry()
    assert status == 0 and "engine: diffusers" in out and "weights: the fp16 files" in out
    assert out.splitlines()[-1].count("--variant=fp16") == 1
    status, out, _ = dry("--", "--variant=fp16")
    assert status == 0 and out.splitlines()[-1].count("--variant=fp16") == 1
    assert "--variant" not in dry("--engine=native")[1]
    assert "engine: native (the patched scripts cannot load this model: the full script" in dry(launcher=DDP)[1]
    status, _, err = dry("--", "--variant=bf16")
    assert status == 2 and "--variant=bf16: " in err and "has no such weights" in err
    without_t5(model)
    status, out, _ = dry()
    assert status == 0 and out.startswith("engine: native (the patched scripts cannot load this model: it has no T5")
    status, _, err = dry("--engine=diffusers")
    assert status == 2 and err.count("\n") == 1 and "it has no T5" in err and err.endswith("give --engine=native.\n")
    shutil.rmtree(model / "vae")
    status, _, err = dry("--engine=diffusers")
    assert status == 2 and "vae/config.json missing" in err


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("text_encoders", [False, True])
def test_a_run_without_t5(model: Path, dog_dir: Path, tmp_path: Path, kind: str, text_encoders: bool) -> None:
    """With validation in the middle and a resume."""
    more = ["--train_text_encoder"] if text_encoders else []
    more += ["--validation_prompt=a dog", "--num_validation_images=1", "--validation_epochs=1", "--seed=1"]
    data = [f"--instance_data_dir={dog_dir}"]
    without_t5(model)
    rename(model / "vae", "fp16")
    json_only(model / "tokenizer_2")
    for steps, resume in ((2, []), (3, ["--resume_from_checkpoint=latest"])):
        flags = [*more, *resume, f"--max_train_steps={steps}", "--checkpointing_steps=2"]
        done = native_runs.run(kind, tmp_path / "run", model, data, *flags)
        assert done.returncode == 0, done.stdout
    assert set(native_runs.losses(tmp_path / "run")) == {1, 2, 3}
