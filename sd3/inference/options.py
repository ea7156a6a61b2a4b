"""The flags of the four inference scripts: one table, the scripts' defaults, and the checks that need no model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sd3.common.command_line import Parser, UserError
from sd3.common.pictures import PictureError, Recipe, read_recipe
from sd3.common.trained_length import LONGEST
from sd3.inference.prompts import Prompt, read_prompts

DTYPES = ("float16", "bfloat16", "float32")
SEED_LIMIT = 2**64  # torch.Generator takes an unsigned 64-bit seed
SIDE_LIMITS = (64, 4096)
LENGTH_LIMITS = (77, LONGEST)  # training takes no less by default
# Above this many pixels the VAE decodes in tiles, unless --vae-tiling says otherwise: its activations grow with the
# area, and at 1024x1024 they already take gigabytes.
UNTILED_PIXELS = 1536 * 1536


@dataclass(frozen=True)
class Defaults:
    """What one script sets at its top for those who would rather edit than type."""

    summary: str
    model: str
    prompts: Sequence[Prompt]
    dtype: str | None = None
    lora: str = ""
    output_dir: str = "infer_result"
    seeds: Sequence[int] = (8, 23, 42, 1334)
    steps: int = 28
    guidance_scale: float = 1.0
    side: int = 1024
    image: str = ""
    strength: float = 0.6
    example_name: str = ""  # the file name of the script's own example, where it has a single one


@dataclass
class Options:
    """The flags as given; see `build_parser` for their meaning."""

    model: str
    dtype: str | None
    device: str
    prompts: list[Prompt]
    seeds: list[int]
    steps: int
    guidance_scale: float
    height: int
    width: int
    batch_size: int
    output_dir: Path
    lora: str
    default_lora: str
    lora_scale: float
    image: str
    strength: float
    max_sequence_length: int | None  # None: as the model was trained
    local_files_only: bool
    overwrite: bool
    compile: bool
    offload: str
    vae_tiling: bool
    example_name: str = ""
    like: tuple[Path, Recipe] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def steps_made(self) -> int:
        """Denoising steps really made: from a picture, the first ones are left out, as the library's pipeline does."""
        left_out = int(max(self.steps - min(self.steps * self.strength, self.steps), 0)) if self.image else 0
        return self.steps - left_out


def build_parser(defaults: Defaults) -> argparse.ArgumentParser:
    """All flags, with a script's defaults in the help."""
    parser = Parser(description=defaults.summary)
    add = parser.add_argument
    shown = defaults.dtype or "float16 on npu and cuda, float32 on a cpu"
    add("--model", metavar="DIR|NAME", help=f"model directory, hub name, run or checkpoint (default {defaults.model})")
    add("--dtype", choices=DTYPES, help=f"precision of the weights and the arithmetic (default {shown})")
    devices = ("auto", "npu", "cuda", "cpu")
    add("--device", choices=devices, help="where to paint (default auto: npu, then cuda, then cpu)")
    add("--prompt", action="append", metavar="TEXT", help="what to paint; may be repeated (default: the script's own)")
    add("--prompts-file", type=Path, metavar="FILE", help="prompts from a .txt, .csv or .jsonl file")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from; needs --guidance-scale above 1")
    seeds = " ".join(map(str, defaults.seeds))
    add("--seeds", nargs="+", metavar="N", help=f"a picture of every prompt for each seed (default {seeds})")
    add("--steps", metavar="N", help=f"denoising steps (default {defaults.steps})")
    add("--guidance-scale", metavar="X", help=f"1 is without guidance (default {defaults.guidance_scale})")
    add("--height", metavar="N", help=f"pixels, a multiple of 16 (default {defaults.side})")
    add("--width", metavar="N", help=f"pixels, a multiple of 16 (default {defaults.side})")
    add("--batch-size", metavar="N", help="pictures denoised together (default 1)")
    add("--output-dir", type=Path, metavar="DIR", help=f"where the pictures go (default {defaults.output_dir})")
    lora = defaults.lora or "none"
    add("--lora", metavar="FILE|DIR", help=f"LoRA file, or run or checkpoint of a LoRA fine-tune (default {lora})")
    add("--lora-scale", metavar="X", help="how strongly the LoRA counts (default 1)")
    add("--image", metavar="FILE|URL", help=f"picture to start from (default {defaults.image or 'none'})")
    add("--strength", metavar="X", help=f"how much of that picture is painted over, to 1 (default {defaults.strength})")
    add("--max-sequence-length", metavar="N", help="tokens that T5 reads of a prompt, 77 to 512 (default: as the model "
        "or LoRA was trained, else 256)")  # fmt: skip
    add("--local-files-only", action="store_true", help="never ask the hub")
    add("--overwrite", action="store_true", help="make pictures again that are there already")
    add("--like", type=Path, metavar="PICTURE", help="make this picture again: its recipe replaces the defaults")
    add("--compile", action="store_true", help="compile the transformer: slow to start, then faster")
    add(
        "--offload", nargs="?", const="model", choices=("model", "layers"),
        help="keep weights in the host's memory and bring them to the device by model (default) or by layer",
    )  # fmt: skip
    add("--vae-tiling", choices=("auto", "on", "off"), help="decode in tiles (default auto: above 1536x1536 pixels)")
    return parser


def parse(arguments: Sequence[str], defaults: Defaults) -> Options:
    """Flags, else the recipe of --like, else the script's defaults; all checked that can be checked without a model.

    Raises:
        UserError: a value is unknown or out of range.
    """
    given = build_parser(defaults).parse_args(list(arguments))
    like = _recipe_of(given.like) if given.like else None

    def first(name: str, default: object) -> object:
        """The flag, else the recipe's value, else the default."""
        value = getattr(given, name)
        return value if value is not None else getattr(like, name) if like else default

    height = _integer("--height", first("height", defaults.side), *SIDE_LIMITS)
    width = _integer("--width", first("width", defaults.side), *SIDE_LIMITS)
    for option, side in (("--height", height), ("--width", width)):
        if side % 16:
            raise UserError(f"{option}={side} is no multiple of 16; the nearest is {max(64, round(side / 16) * 16)}.")
    lora_scale = given.lora_scale or (like.lora_scale if like and like.lora else 1)
    strength = given.strength or (like.strength if like and like.image else defaults.strength)
    tiling = given.vae_tiling or ("auto" if not like else "on" if like.vae_tiling else "off")
    seeds = given.seeds or ([like.seed] if like else defaults.seeds)
    dtype = first("dtype", defaults.dtype)
    if dtype not in (None, *DTYPES):
        raise UserError(f"DTYPE={dtype} is not known; use one of {', '.join(DTYPES)}, or None.")
    if not seeds:
        raise UserError("SEEDS is empty; name at least one seed.")
    options = Options(
        model=str(first("model", defaults.model)),
        dtype=dtype,  # type: ignore[arg-type]
        device=given.device or "auto",
        prompts=_prompts(given, like, defaults),
        seeds=list(dict.fromkeys(_integer("--seeds", seed, 0, SEED_LIMIT - 1) for seed in seeds)),
        steps=_integer("--steps", first("steps", defaults.steps), 1, 1000),
        guidance_scale=_number("--guidance-scale", first("guidance_scale", defaults.guidance_scale), 0, 100),
        height=height,
        width=width,
        batch_size=_integer("--batch-size", given.batch_size or 1, 1, 1024),
        output_dir=given.output_dir or Path(defaults.output_dir),
        lora=str(first("lora", "")),
        default_lora=defaults.lora if given.lora is None and not like else "",
        lora_scale=_number("--lora-scale", lora_scale, -10, 10),
        image=str(first("image", defaults.image)),
        strength=_number("--strength", strength, 0, 1),
        max_sequence_length=_length(given.max_sequence_length, like),
        local_files_only=given.local_files_only,
        overwrite=given.overwrite or like is not None,
        compile=given.compile,
        offload=given.offload or "",
        vae_tiling=tiling == "on" or (tiling == "auto" and height * width > UNTILED_PIXELS),
        like=(given.like, like) if like else None,
    )
    if options.image and options.strength == 0:
        raise UserError("--strength=0 would give the picture back as it is; give a number above 0, to 1.")
    if options.local_files_only and options.image.startswith(("http://", "https://")):
        raise UserError(f"--local-files-only forbids to fetch --image={options.image}; download it and give its path.")
    own_example = not (given.prompt or given.prompts_file or given.seeds or like or given.image)
    options.example_name = defaults.example_name if own_example else ""
    if options.guidance_scale <= 1 and any(prompt.negative for prompt in options.prompts):
        options.notes.append(
            f"note: negative prompts count only with --guidance-scale above 1; it is {options.guidance_scale:g}."
        )
    return options


def _length(given: str | None, like: Recipe | None) -> int | None:
    if given is not None:
        return _integer("--max-sequence-length", given, *LENGTH_LIMITS)
    return _integer("--like: max_sequence_length", like.max_sequence_length, 1, LENGTH_LIMITS[1]) if like else None


def _recipe_of(path: Path) -> Recipe:
    try:
        return read_recipe(path)
    except PictureError as error:
        raise UserError(f"--like: {error}") from None


def _prompts(given: argparse.Namespace, like: Recipe | None, defaults: Defaults) -> list[Prompt]:
    if given.prompt and given.prompts_file:
        raise UserError(f"--prompt and --prompts-file={given.prompts_file} exclude each other; give one of them.")
    negative = given.negative_prompt or ""
    if given.prompts_file:
        prompts = read_prompts(given.prompts_file, negative)
    elif given.prompt:
        if not all(text.strip() for text in given.prompt):
            raise UserError("--prompt is empty; say what to paint.")
        prompts = [Prompt(text.strip(), negative) for text in given.prompt]
    elif like:
        prompts = [Prompt(like.prompt, like.negative_prompt if given.negative_prompt is None else negative)]
    else:
        prompts = [Prompt(text, own if given.negative_prompt is None else negative) for text, own in defaults.prompts]
    for text in (text for prompt in prompts for text in prompt):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt={ascii(text)} is not UTF-8 text; mind the terminal's encoding.") from None
    return list(dict.fromkeys(prompts))


def _integer(option: str, value: object, least: int, most: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise UserError(f"{option}={value} is out of range; give a whole number from {least} to {most}.")
    return number


def _number(option: str, value: object, least: float, most: float) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise UserError(f"{option}={value} is out of range; give a number from {least:g} to {most:g}.")
    return number
