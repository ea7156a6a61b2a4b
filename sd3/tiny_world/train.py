"""Trains the tiny SD3 from nothing, on the CPU: autoencoder, text encoders, album, painter.

    python -m sd3.tiny_world.train --output DIR [--work DIR] [--seed 0] [--steps N] [--autoencoder-steps N]
        [--reader-steps N] [--pictures N]

What is finished is kept in the work directory, and the painter as it is every few minutes: the same command goes on
from there, in the same bits. Takes three to four hours on a core of 2023, in two gigabytes of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from sd3.common.command_line import Parser, UserError, positive, seed, status_of
from sd3.common.files import new_directory, write_text
from sd3.common.tiny_sd3 import write_frame
from sd3.tiny_world import album, autoencoder, painter, reader
from sd3.tiny_world.grammar import ATTRIBUTES, words

MOST_BYTES = 8_000_000
_RECORD = "training.json"
PARTS = (
    "model_index.json", "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2",
    "text_encoder_3", "vae", "transformer",
)  # fmt: skip


class Workshop:
    """The work directory: the pipeline directory in the making, and the record of what is finished."""

    def __init__(self, folder: Path, settings: Mapping[str, int | None]) -> None:
        """Open it, or begin one.

        Raises:
            UserError: it was begun with other settings.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / _RECORD
        self.record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": dict(settings)}
        if (begun := self.record["settings"]) != settings:
            raise UserError(f"--work={folder} was begun with {begun}, not {settings}; name another directory.")

    def stage(self, name: str, work: Callable[[], dict[str, object]]) -> None:
        """Do `work`, unless it is done, and record what it tells and how long it took."""
        if name in self.record:
            return
        started = time.monotonic()
        told = work()
        self.record[name] = {"seconds": round(time.monotonic() - started), **told}
        write_text(self.folder / _RECORD, json.dumps(self.record, indent=2) + "\n")

    def models(self) -> tuple[AutoencoderKL, reader.Reader]:
        """The autoencoder, its encoder finished, and the reader, frozen, in float32."""
        made = autoencoder.folder_of(self.folder, autoencoder.CODES)
        vae = AutoencoderKL.from_pretrained(made, torch_dtype=torch.float32)
        return vae.requires_grad_(False).eval(), reader.Reader.load(self.folder)


def _read_shares(shares: torch.Tensor) -> dict[str, object]:
    """The reader's exam by attribute: the share told right, the worst of the five outputs."""
    names = [*ATTRIBUTES, "rare word"]
    return {"read": {name: round(value, 4) for name, value in zip(names, shares.amin(0).tolist(), strict=True)}}


def train(output: Path, folder: Path, settings: Mapping[str, int | None]) -> None:
    """Do the stages that are not done in `folder`, and write the pipeline directory `output`.

    Raises:
        FileExistsError: `output` holds something.
        UserError: `folder` was begun with other settings.
    """
    seed = settings["seed"]
    shop = Workshop(folder, settings)

    def make_frame() -> dict[str, object]:
        for name in PARTS[2:5]:
            shutil.rmtree(folder / name, ignore_errors=True)
        clip, t5 = write_frame(folder, words())
        return {"clip": clip, "t5": t5}

    def make_vae(number: int) -> dict[str, object]:
        return {"error": autoencoder.train_autoencoder(folder, seed, number, settings["autoencoder_steps"])}

    def make_reader() -> dict[str, object]:
        rows = shop.record["vocabularies"]
        return _read_shares(reader.train_reader(folder, (rows["clip"], rows["t5"]), seed, settings["reader_steps"]))

    albums = list(dict.fromkeys(cycle.hidden for cycle in painter.CYCLES))

    def album_file(number: int) -> Path:
        return folder / f"album.{number}.safetensors"

    def make_album(number: int) -> dict[str, object]:
        made = album.make_album(*shop.models(), seed, settings["pictures"], number, albums[number])
        album.save_album(made, album_file(number))
        return {}

    def make_transformer(cycle: int) -> dict[str, object]:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        pictures = album.load_album(album_file(albums.index(painter.CYCLES[cycle].hidden)))
        one = painter.Painter(pictures, shop.models()[0], scheduler, seed, cycle, settings["steps"])
        if cycle:
            one.begin_from(folder / f"painter.{cycle - 1}.safetensors")
        one.train(folder / f"painter.{cycle}.safetensors")
        one.save(folder / "transformer")
        losses = one.trainer.losses
        tenth = max(1, len(losses) // 10)
        return {"loss": [round(sum(part) / len(part), 4) for part in (losses[:tenth], losses[-tenth:])]}

    shop.stage("vocabularies", make_frame)
    phases = len(autoencoder.PHASES)
    for number in range(phases):
        shop.stage(f"autoencoder {number + 1}", partial(make_vae, number))
    shop.stage("text encoders", make_reader)
    for number in range(len(albums)):
        shop.stage(f"album {number + 1}", partial(make_album, number))
    for cycle in range(len(painter.CYCLES)):
        shop.stage(f"painter {cycle + 1}", partial(make_transformer, cycle))
    with new_directory(output, "--output") as aside:
        for name in PARTS:
            made = autoencoder.folder_of(folder, phases - 1) if name == "vae" else folder / name
            copy = shutil.copytree if made.is_dir() else shutil.copy
            copy(made, aside / name)
        write_text(aside / _RECORD, json.dumps(shop.record, indent=2) + "\n")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options; raises UserError."""
    parser = Parser(description="Train the tiny SD3 from nothing, on the CPU.")
    parser.add_argument("--output", type=Path, required=True, help="pipeline directory to make")
    parser.add_argument("--work", type=Path, help="directory for what is half made (default: OUTPUT with .work)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything (default 0)")
    tables = {
        "autoencoder-steps": ("the autoencoder's phases", [phase.steps for phase in autoencoder.PHASES]),
        "steps": ("the painter's cycles", [cycle.steps for cycle in painter.CYCLES]),
    }
    for name, (what, table) in tables.items():
        own = ", ".join(map(str, table))
        parser.add_argument(f"--{name}", type=positive, help=f"steps of each of {what} (default: {own})")
    numbers = {
        "reader-steps": (reader.STEPS, "the text encoders' steps"),
        "pictures": (album.PICTURES, "pictures that the painter learns from"),
    }  # fmt: skip
    for name, (default, about) in numbers.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{about} (default {default})")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> dict[str, int | None]:
    """The options that the result depends on."""
    return {name: getattr(options, name) for name in ("seed", "steps", "autoencoder_steps", "reader_steps", "pictures")}


def make(arguments: list[str] | None) -> None:
    """What the command line asks for; raises UserError and OSError."""
    started = time.monotonic()
    options = options_of(arguments)
    if options.output.exists():
        raise UserError(f"--output={options.output} exists; name a new directory.")
    work = options.work or options.output.with_name(options.output.name + ".work")
    train(options.output, work, settings_of(options))
    sizes = {name: sum(f.stat().st_size for f in (options.output / name).rglob("*")) for name in PARTS[2:]}
    for name, size in sizes.items():
        print(f"{name:<16}{size / 1e6:8.3f} MB")
    total = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(f"{'all':<16}{total / 1e6:8.3f} MB of at most {MOST_BYTES / 1e6:.0f}")
    print(f"{options.output} made in {(time.monotonic() - started) / 60:.1f} minutes.")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return status_of(lambda: make(arguments))


if __name__ == "__main__":
    sys.exit(main())
