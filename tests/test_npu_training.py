"""Training and generation on emulated cards, through launchers and scripts, against the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from emulated_npu import EmulatedNpu
from launching import BF16, DDP, LAUNCHERS, LORA
from native_runs import assert_same, weights_in
from npu_runs import UNWANTED, generate, train
from patching import free_port
from repository import PROJECT

NATIVE = "--engine=native"
# Largest difference of a loss of about 1 from the CPU's in float32: bfloat16 has 8 bits, float16 11.
BOUNDS = {"no": 1e-5, "bf16": 3e-2, "fp16": 5e-3}


def trained(output: Path) -> dict[str, Any]:
    """The weights that a run leaves: a LoRA file, or the transformer of the pipeline."""
    found = {**weights_in(output), **weights_in(output / "transformer")}
    assert found
    return found


@pytest.fixture
def data(tiny_model: Path, dog_dir: Path) -> list[str]:
    """What every run on the five images is given."""
    return [f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--instance_prompt=a photo of sks dog"]


@pytest.fixture(scope="module")
def on_cpu(
    _emulated_npu: EmulatedNpu, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, dog_dir: Path
) -> list[float]:
    """Losses of four steps of LoRA on a CPU in float32."""
    output = tmp_path_factory.mktemp("cpu") / "run"
    given = [f"--model_name={tiny_model}", f"--input_dir={dog_dir}", "--instance_prompt=a photo of sks dog"]
    return train(
        _emulated_npu, output, LORA, *given, NATIVE, "--mixed_precision=no", "--max_train_steps=4", device="cpu"
    ).losses


@pytest.mark.npu
@pytest.mark.parametrize("precision", ["no", "fp16", pytest.param("bf16", marks=pytest.mark.long)])
def test_losses_are_the_cpus(
    emulated_npu: EmulatedNpu, tmp_path: Path, data: list[str], on_cpu: list[float], precision: str
) -> None:
    arguments = [*data, NATIVE, f"--mixed_precision={precision}", "--max_train_steps=4", "--checkpointing_steps=2"]
    run = train(emulated_npu, tmp_path / "run", LORA, *arguments, "--validation_prompt=a dog")
    assert len(run.losses) == 4
    assert run.losses == pytest.approx(on_cpu, abs=BOUNDS[precision])
    assert list(run.output.glob("validation-*.png"))


@pytest.mark.npu
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_text_to_image_on_a_card(emulated_npu: EmulatedNpu, tmp_path: Path, tiny_model: Path, dtype: str) -> None:
    arguments = (f"--model={tiny_model}", f"--dtype={dtype}", "--prompt=a dog", "--seeds", "1", "2")
    first, second = generate(emulated_npu, tmp_path / "images", "infer_sd3_text2img.py", *arguments)
    assert first != second


@pytest.mark.npu
@pytest.mark.long
@pytest.mark.upstream
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ["native", "diffusers"])
def test_every_launcher_trains_and_resumes_on_cards(
    emulated_npu: EmulatedNpu,
    tmp_path: Path,
    data: list[str],
    pokemon_dir: Path,
    launcher: str,
    ranks: int,
    engine: str,
    request: pytest.FixtureRequest,
) -> None:
    """In the precision of its name, with a validation, a checkpoint, and a second start."""
    if engine == "diffusers":
        request.getfixturevalue("upstream_checkout")
    given = [data[0], f"--dataset_name={pokemon_dir}"] if "deepspeed" in launcher else data
    arguments = [*given, f"--engine={engine}", "--checkpointing_steps=2", "--validation_prompt=a dog"]
    validation = ("--", "--num_validation_images=1")
    first = train(emulated_npu, tmp_path / "run", launcher, *arguments, "--max_train_steps=2", *validation, ranks=ranks)
    assert (first.output / "checkpoint-2" / "complete").exists()
    arguments += ["--max_train_steps=4", "--resume"]
    resumed = train(emulated_npu, tmp_path / "run", launcher, *arguments, *validation, ranks=ranks)
    assert list(resumed.losses) and len(resumed.losses) == 4


@pytest.mark.npu
@pytest.mark.long
@pytest.mark.parametrize(("launcher", "ranks"), [(LORA, 1), (DDP, 1), (LORA, 2), (BF16, 2)])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(
    emulated_npu: EmulatedNpu, tmp_path: Path, data: list[str], launcher: str, ranks: int
) -> None:
    arguments = [*data, NATIVE, "--checkpointing_steps=2", "--validation_prompt="]
    whole = train(emulated_npu, tmp_path / "whole", launcher, *arguments, "--max_train_steps=4", ranks=ranks)
    train(emulated_npu, tmp_path / "run", launcher, *arguments, "--max_train_steps=2", ranks=ranks)
    arguments += ["--max_train_steps=4", "--resume"]
    resumed = train(emulated_npu, tmp_path / "run", launcher, *arguments, ranks=ranks)
    assert resumed.losses == whole.losses
    assert_same(trained(resumed.output), trained(whole.output))


@pytest.mark.npu
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_goes_on_to_the_same_bits(
    emulated_npu: EmulatedNpu, tmp_path: Path, data: list[str], number: signal.Signals
) -> None:
    arguments = [*data, NATIVE, "--checkpointing_steps=2", "--validation_prompt=", "--mixed_precision=fp16"]
    run = tmp_path / "run"
    command = ["bash", str(PROJECT / "sd3" / LORA), "--device=npu", "--num_processors=1", "--resolution=64"]
    command += ["--batch_size=2", "--seed=1", f"--main_process_port={free_port()}", f"--output_dir={run}", *arguments]
    process = subprocess.Popen(
        [*command, "--max_train_steps=100000"], env=emulated_npu.environment(), cwd=PROJECT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 300
    while not list(run.glob("checkpoint-*/complete")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, number)
    log, _ = process.communicate(timeout=120)
    assert process.returncode in (143, -signal.SIGKILL), log
    steps = max(int(made.parent.name.split("-")[1]) for made in run.glob("checkpoint-*/complete")) + 2
    resumed = train(emulated_npu, run, LORA, *arguments, f"--max_train_steps={steps}", "--resume")
    whole = train(emulated_npu, tmp_path / "whole", LORA, *arguments, f"--max_train_steps={steps}")
    assert_same(trained(resumed.output), trained(whole.output))


@pytest.mark.npu
@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        (DDP, ["--train_text_encoder", "--gradient_checkpointing"]),  # on the CPU beside hidden cards too
        (LORA, ["--train_text_encoder", "--gradient_checkpointing"]),
        (LORA, ["--with_prior_preservation", "--class_data_dir={class}", "--class_prompt=dog", "--num_class_images=3"]),
        (LORA, ["--adamw=foreach"]),
        (LORA, ["--adamw=loop"]),
        (LORA, ["--lr_scheduler=cosine", "--max_grad_norm=0.5"]),
    ],
    ids=lambda given: given[0].lstrip("-") if isinstance(given, list) else given.split(".")[0],
)
def test_settings_come_out_as_on_the_cpu(
    emulated_npu: EmulatedNpu, tmp_path: Path, data: list[str], launcher: str, flags: list[str]
) -> None:
    arguments = [*data, NATIVE, "--mixed_precision=no", "--max_train_steps=3", "--gradient_accumulation_steps=2"]
    found = []
    for device in ("npu", "cpu"):
        given = [flag.replace("{class}", str(tmp_path / f"class-{device}")) for flag in flags]
        found.append(train(emulated_npu, tmp_path / device, launcher, *arguments, "--", *given, device=device).losses)
    assert found[0] == pytest.approx(found[1], abs=BOUNDS["no"])


def refusal(npu: EmulatedNpu, command: list[str], **extra: str) -> tuple[int, str]:
    """Exit status and all output of a run that ends in a sentence."""
    done = npu.run(command, **extra)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.npu
@pytest.mark.parametrize("size", [4 << 20, pytest.param(19 << 20, marks=pytest.mark.long)])
def test_generation_on_a_card_without_memory_is_one_sentence(
    emulated_npu: EmulatedNpu, tmp_path: Path, tiny_model: Path, size: int
) -> None:
    """First it does not hold an encoder, then one does not find the room to run."""
    command = [sys.executable, str(PROJECT / "sd3" / "infer_sd3_text2img.py"), f"--model={tiny_model}", "--device=npu"]
    command += ["--dtype=float32", "--height=64", "--width=64", "--steps=2", f"--output-dir={tmp_path / 'images'}"]
    status, log = refusal(emulated_npu, command, EMULATED_CANN_MEMORY=str(size))
    assert (status, "the npu has too little memory; text_encoder" in log) == (2, True)


@pytest.mark.npu
@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "memory", "expected", "told"),
    [
        ([], 6 << 20, 2, "the npu has too little memory; lower --train_batch_size"),
        (["--", "--compile_blocks"], 1 << 30, 3, "--compile_blocks does not work here (AttributeError: "),
    ],
)
def test_training_that_a_card_cannot_do_is_one_sentence(
    emulated_npu: EmulatedNpu, tmp_path: Path, data: list[str], flags: list[str], memory: int, expected: int, told: str
) -> None:
    command = ["bash", str(PROJECT / "sd3" / LORA), *data, NATIVE, "--device=npu", "--resolution=64", "--batch_size=2"]
    command += [f"--main_process_port={free_port()}", f"--output_dir={tmp_path / 'run'}", *flags]
    status, log = refusal(emulated_npu, command, EMULATED_CANN_MEMORY=str(memory))
    assert (status, log.count(told)) == (expected, 1)


@pytest.mark.npu
@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("infer_sd3_img2img.py", ["--image={image}"]),
        ("infer_sd3_text2img_lora.py", ["--lora={lora}"]),
        ("infer_sd3_text2img_distrib.py", []),
    ],
)
@pytest.mark.parametrize("offload", ["", "--offload", "--offload=layers"])
def test_the_other_inference_scripts_on_cards(
    emulated_npu: EmulatedNpu, tmp_path: Path, data: list[str], script: str, flags: list[str], offload: str
) -> None:
    model, images, _ = data
    lora = tmp_path / "lora"
    if "{lora}" in str(flags):
        train(emulated_npu, lora, LORA, *data, NATIVE, "--max_train_steps=1", "--validation_prompt=")
    image = min(Path(images.split("=")[1]).iterdir())
    given = [flag.format(image=image, lora=lora) for flag in flags] + [offload] * bool(offload)
    arguments = [model.replace("--model_name", "--model"), "--prompt=a dog", "--seeds", "1", "2", *given]
    ranks = 2 if "distrib" in script else 1
    made = generate(emulated_npu, tmp_path / "images", script, *arguments, ranks=ranks)
    assert len(set(made)) == 2


@pytest.mark.npu
def test_npu_fused_adamw_sees_the_gradients_of_all_ranks(emulated_npu: EmulatedNpu, tmp_path: Path) -> None:
    """The engine turns bucket views off on an NPU, with which this optimizer raises."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    options = ["--pretrained_model_name_or_path=none", "--instance_data_dir=none", "--instance_prompt=dog"]
    program = str(PROJECT / "tests" / "emulated_cann" / "programs" / "fused_adamw.py")
    done = emulated_npu.run([*launch, program, *options, f"--output_dir={tmp_path}"], cards=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert "NpuFusedAdamW" in found["optimizer"]
    assert found["difference"] < 1e-5
    assert found["tables"] == [[0, 0], [1, 1]]  # no rank's constants are sent to the others
    assert found["bucket views"]


@pytest.mark.npu
@pytest.mark.long
def test_evaluation_measures_what_it_measures_on_a_cpu(
    emulated_npu: EmulatedNpu, tmp_path: Path, tiny_model: Path, dog_dir: Path
) -> None:
    judge = PROJECT / "sd3" / "tiny_world" / "judge"
    arguments = (f"--model={tiny_model}", "--prompt=a dog", "--prompt=a cat", "--seeds", "1", "2")
    generate(emulated_npu, tmp_path / "images", "infer_sd3_text2img.py", *arguments)
    measured = []
    for device, cards in (("npu", 1), ("cpu", 0)):
        command = [sys.executable, str(PROJECT / "sd3" / "evaluate_sd3.py"), f"--output-dir={tmp_path / device}"]
        command += ["--pictures", str(tmp_path / "images"), f"--subject-dir={dog_dir}", f"--reference-dir={dog_dir}"]
        command += [f"--clip-model={judge / 'clip'}", f"--dino-model={judge / 'vit'}", f"--kid-model={judge / 'vit'}"]
        done = emulated_npu.run([*command, f"--device={device}"], cards=cards)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log
        assert not [text for text in UNWANTED if text in log], log
        metrics = json.loads((tmp_path / device / "metrics.json").read_text(encoding="utf-8"))
        measured.append({name: found["mean"] for name, found in metrics["candidates"][0]["metrics"].items()})
    assert measured[0] == pytest.approx(measured[1], abs=1e-5)
