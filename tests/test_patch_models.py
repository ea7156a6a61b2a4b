"""What is saved, and what must not be: the symptom without each patch, and none with all."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from patching import train

pytestmark = [pytest.mark.upstream, pytest.mark.long]
TOKEN = "hf_not_a_real_token_0123456789"


@pytest.fixture(autouse=True)
def _checkout(upstream_checkout: Path) -> None:
    """Every test here needs it."""


@pytest.mark.parametrize("without", ["0012", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0012_the_hub_token_reaches_no_file(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, without: str | None
) -> None:
    arguments = ("--max_train_steps=1", f"--hub_token={TOKEN}")
    run = train(kind, tmp_path / "out", tiny_model, [f"--instance_data_dir={dog_dir}"], *arguments, without=without)
    assert run.status == 0, run.log
    holding = [file for file in run.output.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    assert bool(holding) == (without is not None), holding


@pytest.mark.parametrize("without", ["0013", None])
def test_0013_lora_offline(tmp_path: Path, tiny_model: Path, dog_dir: Path, without: str | None) -> None:
    data = [f"--instance_data_dir={dog_dir}"]
    arguments = ("--max_train_steps=2", "--checkpointing_steps=1")
    offline = {"HF_HUB_OFFLINE": "1"}
    run = train("lora", tmp_path / "out", tiny_model, data, *arguments, without=without, environment=offline)
    assert (run.output / "pytorch_lora_weights.safetensors").exists()
    resume = ("--max_train_steps=3", "--resume_from_checkpoint=checkpoint-1")
    resumed = train("lora", tmp_path / "out", tiny_model, data, *resume, without=without, environment=offline)
    if without:
        assert run.status == 1
        assert "weight_name" in run.log
        assert resumed.status == 1
    else:
        assert run.status == 0, run.log
        assert resumed.status == 0, resumed.log


@pytest.mark.parametrize(
    ("kind", "ranks", "without"),
    [
        *(("full", 1, "0014"), ("full", 1, None), ("full", 2, None)),
        *(("lora", 1, None), ("lora", 2, "0014"), ("lora", 2, None)),
    ],
)
def test_0014_text_encoders_can_be_trained(
    tmp_path: Path, tiny_model: Path, pokemon_dir: Path, kind: str, ranks: int, without: str | None
) -> None:
    data = [f"--dataset_name={pokemon_dir}", "--caption_column=text"]
    run = train(
        *(kind, tmp_path / "out", tiny_model, data, "--train_text_encoder", "--max_train_steps=2"),
        *("--train_batch_size=2",),
        without=without,
        ranks=ranks,
    )
    if without:
        assert run.status != 0
        assert ("TypeError" if kind == "full" else "has no attribute 'dtype'") in run.log
    else:
        assert run.status == 0, run.log


@pytest.mark.parametrize(("kind", "without"), [("full", None), ("lora", None), ("lora", "0014")])
def test_0014_with_prior_preservation_and_one_prompt(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, without: str | None
) -> None:
    arguments = ("--train_text_encoder", "--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=5")
    arguments = (*arguments, f"--class_data_dir={dog_dir}", "--train_batch_size=2", "--max_train_steps=3")
    run = train(kind, tmp_path / "out", tiny_model, [f"--instance_data_dir={dog_dir}"], *arguments, without=without)
    assert run.status == 0, run.log
    batch = ["a photo of sks dog"] * 2 + ["a dog"] * 2
    assert (batch in run.events("t5")) == (without is None)


@pytest.mark.parametrize("without", ["0015", None])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_0015_each_text_encoder_is_saved_and_found_again(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, kind: str, without: str | None
) -> None:
    from safetensors.torch import load_file

    data = [f"--instance_data_dir={dog_dir}"]
    common = ("--train_text_encoder", "--checkpointing_steps=2", "--seed=0")
    straight = train(kind, tmp_path / "straight", tiny_model, data, *common, "--max_train_steps=4", without=without)
    assert straight.status == 0, straight.log
    checkpoint = straight.output / "checkpoint-2"
    if kind == "full":
        saved = {path.name for path in checkpoint.iterdir() if path.name.startswith("text_encoder")}
        wanted = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    else:
        weights = load_file(checkpoint / "pytorch_lora_weights.safetensors")
        saved = {key.split(".")[0] for key in weights} - {"transformer"}
        wanted = {"text_encoder", "text_encoder_2"}
    if without:
        assert saved != wanted
        return
    assert saved == wanted
    resume = "--resume_from_checkpoint=checkpoint-2"
    resumed = train(kind, straight.output, tiny_model, data, *common, "--max_train_steps=4", resume)
    assert resumed.status == 0, resumed.log
    losses = resumed.scalars("loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 3, 4]
    assert [loss for _, loss in losses[4:]] == pytest.approx([loss for _, loss in losses[2:4]], rel=1e-3)


@pytest.mark.parametrize("without", ["0019", None])
def test_0019_upcasting_what_is_saved_leaves_the_model(
    tmp_path: Path, tiny_model: Path, dog_dir: Path, without: str | None
) -> None:
    arguments = ["--max_train_steps=6", "--checkpointing_steps=2", "--upcast_before_saving", "--seed=0"]
    arguments += ["--validation_prompt=a dog", "--num_validation_images=1", "--validation_epochs=1"]
    run = train("lora", tmp_path / "out", tiny_model, [f"--instance_data_dir={dog_dir}"], *arguments, without=without)
    saved = load_file(run.output / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    assert {str(value.dtype) for value in saved.values()} == {"torch.float32"}
    assert run.status == 0, run.log
    # The first validation follows the checkpoints of the first epoch, before the last step casts the final weights.
    dtypes = run.events("validation")[0][0]["transformer"][0]
    assert dtypes == (["torch.float32"] if without else ["torch.bfloat16", "torch.float32"])
