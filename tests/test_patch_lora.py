"""LoRA: precision and text length, the symptom without each patch, and none with all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patching import Run, train

pytestmark = [pytest.mark.upstream, pytest.mark.long]
TEXT_ENCODERS = "--train_text_encoder"
VALIDATE = ("--validation_prompt=a dog", "--num_validation_images=1", "--seed=0")
RESUME = "--resume_from_checkpoint=checkpoint-2"


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


def moment_dtypes(checkpoint: Path) -> set[torch.dtype]:
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].values()
    return {moments[name].dtype for moments in state for name in ("exp_avg", "exp_avg_sq")}


def weight_dtypes(folder: Path, part: str) -> set[torch.dtype]:
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return {value.dtype for key, value in weights.items() if key.startswith(part)}


def lora(output: Path, model: Path, dog: Path, *arguments: str, **options: object) -> Run:
    common = ("--checkpointing_steps=2", "--max_train_steps=4", *VALIDATE)
    run = train("lora", output, model, [f"--instance_data_dir={dog}"], *common, *arguments, **options)
    assert run.status == 0, run.log
    return run


@pytest.mark.parametrize("without", ["0020", None])
@pytest.mark.parametrize("trained", [(), (TEXT_ENCODERS,)])
def test_0020_a_bf16_run_keeps_float32_lora_weights_and_moments(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, trained: tuple[str, ...], without: str | None
) -> None:
    run = lora(tmp_path / "out", tiny_model, dog_dir, *trained, without=without)
    dtype = torch.bfloat16 if without else torch.float32
    assert moment_dtypes(run.output / "checkpoint-2") == {dtype}
    assert weight_dtypes(run.output / "checkpoint-2", "transformer.") == {dtype}
    assert weight_dtypes(run.output, "transformer.") == {torch.bfloat16}
    if trained:
        assert weight_dtypes(run.output / "checkpoint-2", "text_encoder") == {dtype}
        assert weight_dtypes(run.output, "text_encoder") == {torch.float32}
    if without:
        return
    resumed = lora(run.output, tiny_model, dog_dir, *trained, RESUME)
    assert moment_dtypes(run.output / "checkpoint-4") == {torch.float32}
    losses = [loss for _, loss in resumed.scalars("loss")]
    assert losses[4:] == pytest.approx(losses[2:4], rel=1e-5)


def test_0020_upcasting_gives_a_float32_result(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> None:
    run = lora(tmp_path / "out", tiny_model, dog_dir, "--upcast_before_saving")
    assert weight_dtypes(run.output, "transformer.") == {torch.float32}


def test_0020_a_checkpoint_with_bf16_weights_is_resumed(tmp_path: Path, tiny_model: Path, dog_dir: Path) -> None:
    run = lora(tmp_path / "out", tiny_model, dog_dir, without="0020")
    assert moment_dtypes(run.output / "checkpoint-2") == {torch.bfloat16}
    lora(run.output, tiny_model, dog_dir, RESUME)
    assert moment_dtypes(run.output / "checkpoint-4") == {torch.float32}


@pytest.mark.parametrize("trained", [(), (TEXT_ENCODERS,)])
def test_0020_under_deepspeed_a_run_is_validated_and_resumed(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, trained: tuple[str, ...]
) -> None:
    run = lora(tmp_path / "out", tiny_model, dog_dir, *trained, ranks=2, deepspeed=True)
    resumed = lora(run.output, tiny_model, dog_dir, *trained, RESUME, ranks=2, deepspeed=True)
    losses = [loss for _, loss in resumed.scalars("loss")]
    assert losses[4:] == pytest.approx(losses[2:4], rel=1e-4)
    assert weight_dtypes(run.output, "transformer.") == {torch.bfloat16}


@pytest.mark.parametrize(("length", "without"), [(256, "0021"), (256, None), (77, None), (40, None)])
def test_0021_t5_reads_captions_as_far_as_the_flag_says(
    tmp_path: Path, tiny_model: Path, pokemon_dir: Path, length: int, without: str | None
) -> None:
    data = [f"--dataset_name={pokemon_dir}", "--caption_column=text"]
    arguments = (TEXT_ENCODERS, f"--max_sequence_length={length}", "--max_train_steps=1")
    run = train("lora", tmp_path / "out", tiny_model, data, *arguments, without=without)
    assert run.status == 0, run.log
    assert run.events("text_tokens") == [77 + (77 if without else length)]
