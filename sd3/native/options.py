"""The flags of both training scripts as one table, and the refusals that need neither a model nor data.

Names, types, choices and defaults are those of the pinned scripts; the last section holds what only this engine has.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sd3.common.command_line import Parser, UserError
from sd3.common.trained_length import LONGEST
from sd3.data.training_data import DataFlags

PROJECT = Path(__file__).resolve().parents[2]
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
LORA_ONLY = {"rank", "lora_layers", "lora_blocks", "cache_latents", "upcast_before_saving"}
SECRETS = {"hub_token"}
SIDE_STEP = 16  # pixels a side to one token of the transformer: 8 to a latent, and 2 latents
PROFILE_WARM_UP = 2  # steps that are not profiled: caches, compilation, allocation
# What accelerate can report to, and the packages of which one does it; "all" takes those that are installed.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "comet_ml": ("comet_ml",), "all": (),
    "aim": ("aim",), "clearml": ("clearml",), "dvclive": ("dvclive",), "mlflow": ("mlflow",),
}  # fmt: skip
BLOCKS = re.compile(r"all|none|\d+(-\d+)?(,\d+(-\d+)?)*")


class Range(NamedTuple):
    """Numbers that make sense, and how a sentence names them."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("above 0", lambda number: number > 0)
NOT_NEGATIVE = Range("from 0 up", lambda number: number >= 0)
BELOW_ONE = Range("from 0 to below 1", lambda number: 0 <= number < 1)
SWITCH = Range("0 or 1", lambda number: number in (0, 1))
LORA_RANK = Range("from 1 to 4096", lambda number: 1 <= number <= 4096)
SEED = Range("from 0 to 4294967295", lambda number: 0 <= number < 2**32)  # what NumPy takes
PROMPT_TOKENS = Range(f"from 1 to {LONGEST}", lambda number: 1 <= number <= LONGEST)  # no pipeline generates with more
ANY = Range("that is finite", lambda number: True)


class Flag(NamedTuple):
    """One flag: `kind` turns its text into a value; None makes it a switch that takes no text."""

    name: str
    kind: Callable[[str], Any] | None
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    range: Range | None = None
    required: bool = False

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Declare the flag."""
        if self.kind is None:
            group.add_argument(f"--{self.name}", action="store_true", help=self.help)
            return
        shown = "" if self.default is None else f" (default {str(self.default).replace('%', '%%')})"
        group.add_argument(
            f"--{self.name}", type=self.kind, default=self.default, choices=self.choices, required=self.required,
            metavar=None if self.choices else _metavar(self.kind), help=self.help + shown,
        )  # fmt: skip

    def check(self, value: float | None) -> None:
        """Raise UserError where a number is out of range."""
        if self.range and value is not None and not (math.isfinite(value) and self.range.holds(value)):
            what = "a whole number" if self.kind is int else "a number"
            raise UserError(f"--{self.name}={value} is out of range; give {what} {self.range.words}.")


def truth(text: str) -> bool:
    """Yes or no. (The pinned scripts take every text but the empty one for yes.)"""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text} is neither true nor false")


def _metavar(kind: Callable[[str], Any]) -> str:
    return {str: "TEXT", int: "N", float: "X", Path: "DIR", truth: "true|false"}[kind]


def text(name: str, default: str | None, help: str, choices: tuple[str, ...] | None = None) -> Flag:
    """A flag that takes a text, or one of `choices`."""
    return Flag(name, str, default, help, choices)


def needed(name: str, help: str) -> Flag:
    """A flag that takes a text and has to be given."""
    return Flag(name, str, None, help, required=True)


def whole(name: str, default: int | None, help: str, range: Range = POSITIVE) -> Flag:
    """A flag that takes a whole number."""
    return Flag(name, int, default, help, range=range)


def number(name: str, default: float | None, help: str, range: Range = NOT_NEGATIVE) -> Flag:
    """A flag that takes a number."""
    return Flag(name, float, default, help, range=range)


def yes_no(name: str, default: bool, help: str) -> Flag:
    """A flag that takes true or false."""
    return Flag(name, truth, default, help)


def switch(name: str, help: str) -> Flag:
    """A flag that is there or not."""
    return Flag(name, None, False, help)


SECTIONS: dict[str, tuple[Flag, ...]] = {
    "model": (
        needed("pretrained_model_name_or_path", "directory or hub name of the model to train"),
        text("revision", None, "branch, tag or commit of the model on the hub"),
        text("variant", None, "infix of the weight files to load, such as fp16"),
        text("cache_dir", None, "where downloads are kept instead of the hub's own cache"),
        whole("max_sequence_length", 77, "tokens that T5 reads of a prompt, in training and validation", PROMPT_TOKENS),
        switch("train_text_encoder", "train text encoders too: all three, and for a LoRA the two CLIP ones"),
        whole("rank", 4, "inner width of the LoRA matrices", LORA_RANK),
        text("lora_layers", None, "modules in a block that get a LoRA, by comma; else all of attn, without attn2"),
        text("lora_blocks", None, "numbers of the blocks that get a LoRA, by comma; else all"),
    ),
    "data": (
        text("instance_data_dir", None, "folder with pictures of the subject"),
        text("dataset_name", None, "data set with pictures: hub name or directory; instead of --instance_data_dir"),
        text("dataset_config_name", None, "which configuration of the data set"),
        text("image_column", "image", "column with the pictures"),
        text("dataset_split", "train", "split of the data set to train on"),
        text("caption_column", None, "column with a prompt for each picture; else --instance_prompt serves for all"),
        needed("instance_prompt", "prompt that shall stand for the subject"),
        whole("repeats", 1, "how often an epoch shows each picture"),
        whole("resolution", 512, "side in pixels to which pictures are scaled and cropped, a multiple of 16"),
        switch("center_crop", "crop the middle; else a place drawn once for each picture"),
        switch("random_flip", "mirror pictures at random"),
        whole("dataloader_num_workers", 0, "processes that load data; 0: the training process does", NOT_NEGATIVE),
        switch("cache_latents", "compute latents once, up front: here that is always so"),
    ),
    "prior preservation": (
        switch("with_prior_preservation", "train on pictures of the subject's class as well, against forgetting it"),
        text("class_data_dir", None, "folder of class pictures; what is missing is painted first"),
        text("class_prompt", None, "prompt of the class pictures"),
        whole("num_class_images", 100, "class pictures there have to be"),
        number("prior_loss_weight", 1.0, "how much the loss on class pictures counts"),
        whole("sample_batch_size", 4, "class pictures painted together"),
        text("prior_generation_precision", None, "precision to paint them in; else fp16, on a CPU fp32",
             ("no", "fp32", "fp16", "bf16")),
    ),
    "training": (
        whole("seed", None, "makes a run repeatable", SEED),
        whole("train_batch_size", 4, "pictures in a batch of one device"),
        whole("num_train_epochs", 1, "passes over the data"),
        whole("max_train_steps", None, "optimizer steps; overrules --num_train_epochs"),
        whole("gradient_accumulation_steps", 1, "batches to an optimizer step"),
        switch("gradient_checkpointing", "recompute activations instead of keeping them: slower, far less memory"),
        text("mixed_precision", None, "arithmetic of the training; else as accelerate is configured",
             ("no", "fp16", "bf16")),
        switch("allow_tf32", "let CUDA round float32 products to TF32"),
        whole("local_rank", -1, "set by some launchers; LOCAL_RANK in the environment overrules it", ANY),
    ),
    "loss": (
        text("weighting_scheme", "logit_normal", "how timesteps are drawn and losses weighted",
             ("sigma_sqrt", "logit_normal", "mode", "cosmap")),
        number("logit_mean", 0.0, "mean of the normal distribution behind logit_normal; below 0: more noise", ANY),
        number("logit_std", 1.0, "its standard deviation"),
        number("mode_scale", 1.29, "strength of the scheme mode", ANY),
        whole("precondition_outputs", 1, "1: compare clean latents; 0: compare velocities", SWITCH),
    ),
    "optimizer": (
        text("optimizer", "AdamW", "AdamW or prodigy"),
        switch("use_8bit_adam", "AdamW with 8-bit moments; needs bitsandbytes"),
        number("learning_rate", 1e-4, "peak learning rate; about 1 for prodigy"),
        number("text_encoder_lr", 5e-6, "that of the text encoders; 0 takes --learning_rate"),
        switch("scale_lr", "multiply --learning_rate by the pictures in an optimizer step, of all devices"),
        text("lr_scheduler", "constant", f"course of the learning rate: {', '.join(LR_SCHEDULERS)}"),
        whole("lr_warmup_steps", 500, "optimizer steps until the peak", NOT_NEGATIVE),
        whole("lr_num_cycles", 1, "starts of cosine_with_restarts"),
        number("lr_power", 1.0, "exponent of polynomial"),
        number("adam_beta1", 0.9, "decay of the gradient's running mean", BELOW_ONE),
        number("adam_beta2", 0.999, "decay of the running mean of its square", BELOW_ONE),
        number("adam_weight_decay", 1e-4, "weight decay"),
        number("adam_weight_decay_text_encoder", 1e-3, "weight decay of the text encoders"),
        number("adam_epsilon", 1e-8, "added to AdamW's and prodigy's denominator"),
        number("prodigy_beta3", None, "decay of prodigy's step size; else the root of --adam_beta2", BELOW_ONE),
        yes_no("prodigy_decouple", True, "prodigy: weight decay as in AdamW"),
        yes_no("prodigy_use_bias_correction", True, "prodigy: correct the first steps' bias as Adam does"),
        yes_no("prodigy_safeguard_warmup", True, "prodigy: keep warm-up from spoiling the step size"),
        number("max_grad_norm", 1.0, "norm to which gradients are clipped", POSITIVE),
    ),
    "checkpoints and output": (
        text("output_dir", "sd3-dreambooth", "directory of the run: checkpoints, logs and the trained weights"),
        whole("checkpointing_steps", 500, "optimizer steps between checkpoints"),
        whole("checkpoints_total_limit", None, "checkpoints to keep, the oldest go; 0 or none: all", NOT_NEGATIVE),
        text("resume_from_checkpoint", None, "checkpoint to go on from, or latest"),
        switch("upcast_before_saving", "write the LoRA in float32"),
    ),
    "validation, trackers, hub": (
        text("validation_prompt", None, "paint this now and then, to see what was learned"),
        whole("num_validation_images", 4, "how many pictures of it", NOT_NEGATIVE),
        whole("validation_epochs", 50, "epochs from one validation to the next"),
        text("report_to", "tensorboard", "tracker: tensorboard, wandb, comet_ml or all"),
        text("logging_dir", "logs", "where trackers write, below --output_dir"),
        switch("push_to_hub", "upload the trained weights"),
        text("hub_token", None, "token for it; it ends up in no file (better: log in with huggingface-cli)"),
        text("hub_model_id", None, "repository to upload to; else named after --output_dir"),
    ),
    "this engine alone": (
        Flag("precompute_dir", Path, PROJECT / "build" / "precomputed", "latents and embeddings, for later runs too"),
        text("vae_precision", "auto", "precision to encode pictures in", ("auto", "fp32", "fp16", "bf16")),
        switch("compile_blocks", "compile the transformer block by block: slow to start, then faster"),
        text("attention", "auto", "attention kernel", ("auto", "flash", "efficient", "math")),
        text("adamw", "auto", "how AdamW computes", ("auto", "fused", "foreach", "loop")),
        text("checkpointed_blocks", "all", "blocks that --gradient_checkpointing covers, such as 0-11,20; all or none"),
        whole("keep_every", None, "checkpoints at multiples of this step outlive --checkpoints_total_limit"),
        whole("log_every", None, "optimizer steps between readings of the loss; else 1 on a CPU, 10 elsewhere"),
        whole("profile", 0, "optimizer steps to profile", NOT_NEGATIVE),
        switch("continue_on_nonfinite", "go on where the loss is not finite; else the run stops"),
    ),
}  # fmt: skip


NATIVE_ONLY = {flag.name for flag in SECTIONS["this engine alone"]}


def data_flags(options: argparse.Namespace) -> DataFlags:
    """The training data that the flags name."""
    return DataFlags(
        folder=options.instance_data_dir, dataset=options.dataset_name, config=options.dataset_config_name,
        split=options.dataset_split, image_column=options.image_column, caption_column=options.caption_column,
        cache_dir=options.cache_dir,
    )  # fmt: skip


def flags(kind: str) -> list[Flag]:
    """The flags of the script `kind`, "full" or "lora"."""
    return [flag for section in SECTIONS.values() for flag in section if kind == "lora" or flag.name not in LORA_ONLY]


def build_parser(kind: str) -> Parser:
    """The flags of the script `kind`, by section."""
    what = "a LoRA for it" if kind == "lora" else "the whole transformer"
    parser = Parser(description=f"Teach Stable Diffusion 3 a subject by DreamBooth, training {what}.")
    known = set(flags(kind))
    for title, section in SECTIONS.items():
        group = parser.add_argument_group(title)
        for flag in section:
            if flag in known:
                flag.add_to(group)
    return parser


def read(kind: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the script `kind` ("full" or "lora") from `arguments`, else from the command line; checked.

    Raises:
        UserError: a flag is unknown, out of range or contradicts another.
    """
    options = build_parser(kind).parse_args(arguments)
    options.local_rank = int(os.environ.get("LOCAL_RANK", options.local_rank))
    for flag in flags(kind):
        flag.check(getattr(options, flag.name))
    _check(options)
    return options


def parse(kind: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """As `read`; what was given and does nothing is noted on standard error, once for all ranks of a machine."""
    options = read(kind, arguments)
    if options.local_rank in (-1, 0):
        for note in notes_on(options):
            print(f"note: {note}", file=sys.stderr)
    return options


def _check(options: argparse.Namespace) -> None:
    """Raise UserError where flags contradict each other, have no meaning, or need a package that is not there."""
    if (options.dataset_name is None) == (options.instance_data_dir is None):
        which = "neither was given" if options.dataset_name is None else "both were given"
        raise UserError(f"--dataset_name and --instance_data_dir: {which}; give one of them.")
    if options.with_prior_preservation:
        for name in ("class_data_dir", "class_prompt"):
            if getattr(options, name) is None:
                raise UserError(f"--with_prior_preservation needs --{name}; give it.")
    if over := options.resolution % SIDE_STEP:
        below = options.resolution - over
        raise UserError(
            f"--resolution={options.resolution} is no multiple of {SIDE_STEP}, as the model needs; give "
            f"{f'{below} or ' if below else ''}{below + SIDE_STEP}."
        )
    if options.report_to not in TRACKERS:
        raise UserError(f"--report_to={options.report_to} is not known; use one of {', '.join(TRACKERS)}.")
    if options.report_to == "wandb" and options.hub_token is not None:
        raise UserError(
            "--report_to=wandb shows the command line, and --hub_token with it, to others; "
            "log in with huggingface-cli and leave the token out."
        )
    _check_packages(options)
    output = Path(options.output_dir).resolve()
    if not (output / options.logging_dir).resolve().is_relative_to(output):
        raise UserError(
            f"--logging_dir={options.logging_dir} is outside --output_dir; give the name of a directory below it."
        )
    if options.lr_scheduler not in LR_SCHEDULERS:
        raise UserError(f"--lr_scheduler={options.lr_scheduler} is not known; use one of {', '.join(LR_SCHEDULERS)}.")
    if not BLOCKS.fullmatch(options.checkpointed_blocks):
        block_numbers(options.checkpointed_blocks, 0)
    blocks = getattr(options, "lora_blocks", None)
    if blocks is not None and not all(block.strip().isdecimal() for block in blocks.split(",")):
        raise UserError(f"--lora_blocks={blocks} is no list of block numbers; give one such as 12,30.")


def _check_packages(options: argparse.Namespace) -> None:
    """Raise UserError where a tracker or an optimizer needs a package that is not installed."""
    needed_by = {f"--report_to={options.report_to}": TRACKERS[options.report_to]}
    if options.optimizer.lower() == "prodigy":
        needed_by["--optimizer=prodigy"] = ("prodigyopt",)
    elif options.use_8bit_adam:
        needed_by["--use_8bit_adam"] = ("bitsandbytes",)
    for option, packages in needed_by.items():
        if packages and not any(_installed(package) for package in packages):
            raise UserError(
                f"{option} needs {packages[0]}, which is not installed; pip install {packages[0]}.", 3
            )


def _installed(package: str) -> bool:
    """Can it be imported? What is imported already need not have a spec, which find_spec takes for an error."""
    return sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None


def notes_on(options: argparse.Namespace) -> list[str]:
    """What was given but does nothing, or less than it says."""
    notes = []
    if not options.with_prior_preservation:
        idle = [name for name in ("class_data_dir", "class_prompt") if getattr(options, name) is not None]
        notes += [f"--{name} does nothing without --with_prior_preservation." for name in idle]
    if options.dataset_name is None:
        idle = {"dataset_split": "train", "image_column": "image", "caption_column": None, "dataset_config_name": None}
        notes += [
            f"--{name} does nothing without --dataset_name." for name, usual in idle.items()
            if getattr(options, name) != usual
        ]  # fmt: skip
    if options.checkpointed_blocks != "all" and not options.gradient_checkpointing:
        notes.append("--checkpointed_blocks does nothing without --gradient_checkpointing.")
    if options.profile and options.max_train_steps and options.max_train_steps < PROFILE_WARM_UP + options.profile:
        count = max(options.max_train_steps - PROFILE_WARM_UP, 0)
        notes.append(
            f"--profile={options.profile} will profile {count} steps: the first {PROFILE_WARM_UP} of "
            f"--max_train_steps={options.max_train_steps} are warm-up."
        )
    return notes


def block_numbers(spec: str, count: int) -> set[int]:
    """The blocks that `spec` names ("all", "none", or such as "0-11,20") of a transformer with `count` of them.

    Raises:
        UserError: `spec` has another form, or names a block that is not there.
    """
    if not BLOCKS.fullmatch(spec):
        raise UserError(f"--checkpointed_blocks={spec} is not known; give all, none, or block numbers such as 0-11,20.")
    if spec in ("all", "none"):
        return set(range(count)) if spec == "all" else set()
    numbers: set[int] = set()
    for part in spec.split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
        if int(last or first) < int(first):
            raise UserError(f"--checkpointed_blocks={spec}: {part} runs backwards; give the smaller number first.")
    if max(numbers) >= count:
        raise UserError(f"--checkpointed_blocks={spec}: the transformer has the blocks 0 to {count - 1}; name some.")
    return numbers


def public(options: argparse.Namespace) -> dict[str, Any]:
    """The options without secrets, as trackers and files may have them: texts, numbers, truths and None."""
    shown = {name: value for name, value in vars(options).items() if name not in SECRETS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in shown.items()}
