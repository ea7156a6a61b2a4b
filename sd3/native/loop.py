"""The run, from top to bottom: prepare, resume, train, write the result; the same for full fine-tuning and LoRA."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import diffusers
import torch
import torch.utils.checkpoint
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers import AutoencoderKL

from sd3.common import orphans
from sd3.common.command_line import UserError
from sd3.common.device_errors import compiler_failed, out_of_memory
from sd3.common.hub_models import model_directory
from sd3.common.model_files import has_t5, largest_side, parts_of
from sd3.common.model_sizes import CLIP_TOKENS
from sd3.common.part_loading import load_scheduler
from sd3.common.refusals import refuse
from sd3.common.scratch import temporary_files
from sd3.common.weight_files import MODELS, of_variants
from sd3.native import checkpoint, checkpoint_files, hub
from sd3.native.checkpoint import Checkpoints
from sd3.native.data import Items, Loader, Samples, Texts, names_at
from sd3.native.flag_changes import changed_facts, facts_of
from sd3.native.metrics import Metrics, Reading
from sd3.native.model import Trained
from sd3.native.optimizer import make_lr_schedule, make_optimizer, scaled_learning_rate
from sd3.native.options import parse, public
from sd3.native.outputs import write_result
from sd3.native.painting import Painter
from sd3.native.precompute import Precompute
from sd3.native.prior import make_class_images
from sd3.native.profile import Profile
from sd3.native.randomness import fresh_seed, seed_everything, seed_of
from sd3.native.step import Batch, FlowMatching, draw
from sd3.native.stop import Stopper, alone_in
from sd3.native.stream import Stream
from sd3.native.text import t5_length
from sd3.native.tracking import forgiven
from sd3.native.utilization import device_name, work_of

logger = logging.getLogger(__name__)
# What holds process groups lives as long as the process. A thread of gloo that drops a tensor waits for the
# interpreter's lock, holding the group's; whoever collects the group waits the other way round, for ever. So nothing
# here destroys a group, Accelerator.end_training included. See `train`.
KEPT: list[object] = []
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TOO_LITTLE_MEMORY = "lower --train_batch_size (a launcher's --batch_size), or give --gradient_checkpointing"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(kind: str, arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; `kind` is `full` or `lora`. Returns the exit status."""
    accelerator = None
    try:
        options = parse(kind, arguments)
        accelerator = start_accelerator(options)
        # The main rank holds the directory for all.
        alone = alone_in(Path(options.output_dir)) if accelerator.is_main_process else contextlib.nullcontext()
        with alone, temporary_files():
            return run(options, kind, accelerator)
    except UserError as error:
        return refuse(error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return refuse(UserError(f"{where}{error.strerror}; free some space and resume.", 1))
    except RuntimeError as error:
        device = "device" if accelerator is None else accelerator.device.type
        told = out_of_memory(error, device, TOO_LITTLE_MEMORY) or compiler_failed(error, "--compile_blocks")
        if told is None:
            raise
        return refuse(told)


def train(kind: str) -> NoReturn:
    """The whole process of a script: `main`, then the end, with all that is buffered written and nothing collected.

    Where `main` fails by a bug the status is 1, and the stack is shown. Nothing keeps the process from its end: with
    nobody left to read its output every write fails, and an interpreter that ends waits for the loader processes.
    """
    orphans.stop_without_supervisor()
    status = 1
    try:
        status = main(kind)
    except SystemExit as end:  # --help
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        traceback.print_exc()
    finally:
        _end(status)


def _end(status: int) -> NoReturn:
    try:
        for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
            with contextlib.suppress(OSError, ValueError):
                flush()
    finally:
        os._exit(status)


def start_accelerator(options: argparse.Namespace) -> Accelerator:
    """Join the other ranks, and set up logging and precision.

    Raises:
        UserError: the launch configuration shards the model over the ranks.
    """
    output = Path(options.output_dir)
    # Every trained parameter takes part in every step: nobody has to search for those that do not. The buffers are
    # constants; the table of positions alone would be hundreds of MB to send at every step.
    distributed = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        mixed_precision=options.mixed_precision,
        log_with=options.report_to,
        project_config=ProjectConfiguration(project_dir=output, logging_dir=output / options.logging_dir),
        # While the main rank writes and checks a checkpoint of a hundred GB, the others wait.
        kwargs_handlers=[distributed, InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    refuse_sharding(accelerator)
    recomputed = torch.utils.checkpoint.DefaultDeviceType
    # Where torch_npu is loaded, gradient checkpointing takes a CPU's tensors for an NPU's, and starts the hidden cards.
    if accelerator.device.type == "cpu" and recomputed.get_device_type() == "npu":
        recomputed.set_device_type("cpu")
    # NpuFusedAdamW reads the gradients from one tensor of its own; as views of DDP's buckets they would leave it.
    distributed.gradient_as_bucket_view = accelerator.device.type != "npu"
    # A launch configuration's own number would win over the flag.
    accelerator.gradient_accumulation_steps = options.gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_accumulation_steps"] = options.gradient_accumulation_steps
        config["train_micro_batch_size_per_gpu"] = options.train_batch_size
        if config.get("gradient_clipping", "auto") == "auto":
            config["gradient_clipping"] = options.max_grad_norm
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
    )
    logger.info("%s", str(accelerator.state).strip().replace("\n", "; "))
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    if options.attention != "auto":
        torch.backends.cuda.enable_flash_sdp(options.attention == "flash")
        torch.backends.cuda.enable_mem_efficient_sdp(options.attention == "efficient")
        torch.backends.cuda.enable_math_sdp(options.attention == "math")
    return accelerator


def refuse_sharding(accelerator: Accelerator) -> None:
    """Raise UserError where parts of the parameters lie on other ranks: no rank could encode or write by itself.

    DeepSpeed without ZeRO, which is DDP by another name, tells no gradient norm in float32.
    """
    found = accelerator.distributed_type
    if found == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        if stage in (1, 2):
            return
        found = f"DeepSpeed's ZeRO stage {stage}"
    elif found == DistributedType.NO or found.value.startswith("MULTI_"):
        return
    else:
        found = found.value
    raise UserError(
        f"{found} in the launch configuration is not supported by this engine; launch one process, DDP, or "
        "DeepSpeed with ZeRO stage 1 or 2."
    )


def run(options: argparse.Namespace, kind: str, accelerator: Accelerator) -> int:
    """One run, to its end or to a signal; returns the exit status."""
    device, ranks = accelerator.device, accelerator.num_processes
    dtype = DTYPES[accelerator.mixed_precision]
    model_folder = model_directory(
        options.pretrained_model_name_or_path, "--pretrained_model_name_or_path", options.revision, options.variant,
        cache_dir=options.cache_dir,
    )  # fmt: skip
    if options.resolution > (most := largest_side(model_folder / "transformer", model_folder / "vae")):
        raise UserError(f"--resolution={options.resolution} is more than the model was made for; give at most {most}.")
    tell_of_model(options, model_folder)
    repository = hub.prepare_repo(options) if accelerator.is_main_process else None

    resumed = checkpoint.find(options, accelerator, kind)
    done, position, seed = 0, 0, agreed_seed(options)
    if resumed:
        done, position, seed = (resumed[1][name] for name in ("step", "position", "seed"))
        # Crops, class and validation pictures are drawn by the flag, which need not be given again.
        options.seed = resumed[1]["flags"].get("seed")

    # What never changes is computed before the model to be trained is loaded.
    if options.with_prior_preservation:
        make_class_images(options, model_folder, accelerator)
    precompute = Precompute(options, model_folder, accelerator)
    items = Items(options, precompute)
    texts = Texts.prepare(options, items, precompute, dtype)
    painter = Painter(options, accelerator, precompute, dtype)

    set_seed(seed)
    trained = Trained(options, kind, model_folder, dtype)
    trained.denoiser.to(device)  # before the optimizer is made, which may ask where its parameters are
    optimizer = make_optimizer(options, trained.groups(scaled_learning_rate(options, ranks)), device.type, logger)
    stream = Stream(seed, len(items), options.train_batch_size, options.gradient_accumulation_steps, ranks)
    steps = options.max_train_steps or options.num_train_epochs * stream.steps_an_epoch
    schedule = make_lr_schedule(options, optimizer, steps)
    model, optimizer = accelerator.prepare(trained.denoiser, optimizer)
    checkpoints = Checkpoints(options, accelerator, trained, model, optimizer, schedule)
    facts = facts_of(options, items.signature(), trained.base(model_folder), steps)
    if resumed:
        checkpoints.load(*resumed)
        logger.info("Resuming from %s.", resumed[0])
        for sentence in changed_facts(*resumed, facts):
            logger.warning("%s", sentence)
    elif options.resume_from_checkpoint:
        logger.warning("%s holds no complete checkpoint; starting anew.", options.output_dir)
    if accelerator.is_main_process:
        checkpoint_files.clear_leftovers(Path(options.output_dir), newer_than=done)
        for moved in checkpoint_files.set_aside(Path(options.output_dir), newer_than=done):
            logger.warning("The run starts behind a checkpoint that was there; it is now %s.", moved)
        accelerator.init_trackers("dreambooth-sd3-lora" if kind == "lora" else "dreambooth-sd3", public(options))

    vae = AutoencoderKL.load_config(model_folder / "vae")
    scheduler = load_scheduler(model_folder / "scheduler")
    flow = FlowMatching(options, scheduler, vae["shift_factor"], vae["scaling_factor"], dtype, device)
    loader = Loader(options, Samples(items, stream, precompute.cache), texts, device)
    batches = loader.batches(position, accelerator.process_index, steps - done)
    t5_tokens = t5_length(model_folder, options.max_sequence_length)
    metrics = Metrics(
        accelerator, stream.samples_a_step, work(options, trained, t5_tokens), device_name(device), first=done,
        last=steps,
    )  # fmt: skip
    log_every = options.log_every or (1 if device.type == "cpu" else 10)
    profile = Profile(options.profile, Path(options.output_dir) / "profile", accelerator.process_index, device.type)
    stopper = Stopper()
    KEPT.extend((model, optimizer, checkpoints, stopper, loader))
    logger.info(
        "Training %s: %d samples, %d steps of %d, %d an epoch.",
        kind, len(items), steps, stream.samples_a_step, stream.steps_an_epoch,
    )  # fmt: skip

    for step in range(done + 1, steps + 1):
        rate = schedule.get_last_lr()[0]
        with profile.step(step - done):
            loss, norm = optimize(options, seed, accelerator, model, optimizer, flow, batches)
        stopper.ask()
        if not optimizer.step_was_skipped:  # for fp16 that overflowed
            schedule.step()
        metrics.add(step, position, loss, norm, rate)
        position += stream.samples_a_step

        signal = stopper.answer()
        at_checkpoint = step % options.checkpointing_steps == 0 or signal
        if step % log_every == 0 or at_checkpoint or step == steps:
            check(options, metrics.read(), items, stream, checkpoints)
        if at_checkpoint:
            with metrics.paused():
                checkpoints.save(step, {"position": position, "seed": seed, **facts})
        if signal:
            logger.warning("Stopped by signal %d after step %d; checkpoint-%d is complete.", signal, step, step)
            metrics.close()
            profile.close()
            finish_trackers(accelerator)
            return 128 + signal
        epoch, rest = divmod(step, stream.steps_an_epoch)
        if rest == 0 and painter.due(epoch - 1) and accelerator.is_main_process:
            with metrics.paused():
                painter.paint(trained, epoch - 1)

    metrics.close()
    profile.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_result(trained, model_folder, Path(options.output_dir), dtype)
        stopper.release("the result is written")
        epochs = math.ceil(steps / stream.steps_an_epoch)
        pictures = painter.paint(trained, epochs - 1, "test") if painter.wanted else []
        if repository:
            hub.upload(
                options, repository, pictures, kind, bool(options.train_text_encoder), has_t5(model_folder)
            )
    finish_trackers(accelerator)
    return 0


def tell_of_model(options: argparse.Namespace, model: Path) -> None:
    """Log what is unusual about a pipeline directory."""
    if not has_t5(model):
        logger.info("The model has no T5: zeros stand for its output, as in StableDiffusion3Pipeline.")
    parts = [model / name for name in parts_of(model) if name in MODELS]
    if found := of_variants(parts, options.variant):
        logger.info("No whole plain weight files; read %s.", found)


def finish_trackers(accelerator: Accelerator) -> None:
    """What Accelerator.end_training does, but for destroying the process groups; see KEPT."""
    with forgiven(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()


def agreed_seed(options: argparse.Namespace) -> int:
    """The run's seed, the same on all ranks."""
    return options.seed if options.seed is not None else broadcast_object_list([fresh_seed()])[0]


def optimize(
    options: argparse.Namespace, seed: int, accelerator: Accelerator, model: torch.nn.Module,
    optimizer: torch.optim.Optimizer, flow: FlowMatching, batches: Iterator[Batch],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One optimizer step over its batches; returns their mean loss and the gradient's norm, scalars on the device."""
    losses, norm = [], None
    for _ in range(options.gradient_accumulation_steps):
        batch = next(batches)
        seed_everything(seed_of(seed, "dropout", batch.positions[0]))
        with accelerator.accumulate(model):
            loss = flow.loss(model, batch, draw(options, seed, batch, len(flow.timesteps)))
            accelerator.backward(loss)
            # DeepSpeed clips by its own configuration.
            if accelerator.sync_gradients and accelerator.distributed_type != DistributedType.DEEPSPEED:
                norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # After an overflow in fp16 it still has the norm of the step before.
        norm = math.inf if optimizer.step_was_skipped else model.get_global_grad_norm()
    return torch.stack(losses).mean(), torch.as_tensor(norm, dtype=torch.float32, device=loss.device)


def check(
    options: argparse.Namespace, readings: Sequence[Reading], items: Items, stream: Stream, checkpoints: Checkpoints
) -> None:
    """Stop where a loss or a gradient is not finite, before such weights reach a checkpoint.

    Raises:
        UserError: as said, with the step, its pictures and the last good checkpoint.
    """
    bad = next((one for one in readings if not math.isfinite(one.loss + one.gradient_norm)), None)
    if bad is None or options.continue_on_nonfinite:
        return
    names = names_at(items, stream, range(bad.position, bad.position + stream.samples_a_step))
    what = f"loss of step {bad.step} is {bad.loss}"
    if math.isfinite(bad.loss):
        what = f"gradient's norm of step {bad.step} is {bad.gradient_norm}"
    raise UserError(
        f"the {what} (pictures: {', '.join(dict.fromkeys(names))}); lower --learning_rate or look at these pictures. "
        f"The last good checkpoint: {checkpoints.last()}.", 1,
    )  # fmt: skip


def work(options: argparse.Namespace, trained: Trained, t5_tokens: int | None = None) -> float:
    """Operations for one sample of this run: a picture, and with prior preservation one of its class.

    `t5_tokens`: how many prompt embeds are T5's, None for --max_sequence_length.
    """
    transformer = trained.parts["transformer"]
    tokens = CLIP_TOKENS + (options.max_sequence_length if t5_tokens is None else t5_tokens)
    pictures = 2 if options.with_prior_preservation else 1
    return work_of(dict(transformer.config), options.resolution, tokens, trained.lora, pictures)
