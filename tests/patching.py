"""Runs the training scripts as the queue makes them, whole or with one patch left out, on the tiny model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from prepared import PREPARED, PROJECT, made_once

IMAGE_SIZE = 64
SCRIPTS = {"full": "train_dreambooth_sd3.py", "lora": "train_dreambooth_lora_sd3.py"}
PATCHES = [
    line.split("#")[0].strip()
    for line in (PROJECT / "patches" / "series").read_text(encoding="utf-8").splitlines()
    if line.split("#")[0].strip()
]


def patch_named(number: str) -> str:
    """File name of the patch whose name begins with number, such as '0005'."""
    (name,) = [name for name in PATCHES if name.startswith(number)]
    return name


def scripts_without(number: str | None) -> Path:
    """Folder of the two scripts with the whole queue applied, or all of it but one patch."""
    name = "none" if number is None else patch_named(number)
    digest = hashlib.sha256()
    for file in sorted((PROJECT / "patches").iterdir()):
        digest.update(file.read_bytes() if file.is_file() else b"")

    def make(tree: Path) -> None:
        aside = tree.with_name(f".{name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        subprocess.run(
            ["bash", "patches/queue.sh", "without", name, str(aside)], cwd=PROJECT, check=True, capture_output=True
        )
        aside.rename(tree)

    return made_once(PREPARED / "queue" / digest.hexdigest()[:12] / name, make) / "examples" / "dreambooth"


def load_script(kind: str, without: str | None = None) -> ModuleType:
    """A script as a module, to call its parts; imports go on looking where they did."""
    path = scripts_without(without) / SCRIPTS[kind]
    spec = importlib.util.spec_from_file_location(f"patched_{kind}_{without}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    places = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = places
    return module


def data_set(kind: str, without: str | None = None, **changed: Any) -> Any:
    """The script's data set of instance images, 64 pixels square, from a folder or by --dataset_name."""
    script = load_script(kind, without)
    script.logger = logging.getLogger(script.__name__)  # accelerate's wants a run
    folder = changed.pop("folder", None)
    classes = {"class_data_root": changed.pop("class_data_root", None)}
    script.args = SimpleNamespace(
        **{
            **{"dataset_name": None, "dataset_config_name": None, "dataset_split": "train", "cache_dir": None},
            "image_column": "image",
            **{"caption_column": None, "random_flip": False, "center_crop": True, "resolution": IMAGE_SIZE},
            **changed,
        }
    )
    options = {"size": IMAGE_SIZE, "center_crop": script.args.center_crop, "repeats": changed.get("repeats", 1)}
    return script.DreamBoothDataset(folder, "a photo of sks dog", "a dog", **options, **classes)


def noise(mode: str, seed: int = 0, size: tuple[int, int] = (80, 96)) -> Image.Image:
    """An image of random values; size: rows and columns."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 255, (*size, channels), np.uint8)
    return Image.frombytes(mode, size[::-1], values.tobytes())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Run:
    """A finished run of a training script."""

    status: int | None  # None: it hung, and was ended at the time limit
    log: str
    output: Path
    spied: dict[int, list[tuple[str, object]]] = field(default_factory=dict)

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        """(step, value) of a tracker's scalar over all sessions of this output directory."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = []
        for file in sorted(self.output.glob("logs/**/events.*"), key=lambda path: path.stat().st_mtime):
            events = EventAccumulator(str(file)).Reload()
            if tag in events.Tags()["scalars"]:
                found += [(event.step, event.value) for event in events.Scalars(tag)]
        return found

    def events(self, name: str, rank: int = 0) -> list:
        return [value for event, value in self.spied.get(rank, []) if event == name]


def train(
    kind: str,
    output: Path,
    model: Path,
    data: list[str],
    *arguments: str,
    without: str | None = None,
    ranks: int = 1,
    deepspeed: bool = False,
    precision: str = "bf16",
    environment: dict[str, str] | None = None,
    timeout: float = 240,
) -> Run:
    """Run a script to its end. Standard output and error go to one pipe, so progress is not on a terminal."""
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--dynamo_backend=no"),
        *(f"--num_processes={ranks}", f"--mixed_precision={precision}", f"--main_process_port={free_port()}"),
    ]
    spied = output.with_name(output.name + "-spied")
    spied.mkdir(parents=True, exist_ok=True)
    env = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "SPY_DIR": str(spied)},
        **(environment or {}),
    }
    if deepspeed:
        launch += ["--use_deepspeed", "--zero_stage=2", "--deepspeed_multinode_launcher=standard"]
        launch += ["--gradient_accumulation_steps=1"]
    else:
        env["ACCELERATE_USE_CPU"] = "true"
        launch.append("--cpu" if ranks == 1 else "--multi_gpu")
    command = [
        *(*launch, str(PROJECT / "tests" / "spy.py"), str(scripts_without(without) / SCRIPTS[kind])),
        *(f"--pretrained_model_name_or_path={model}", f"--output_dir={output}", f"--mixed_precision={precision}"),
        *("--instance_prompt=a photo of sks dog", "--resolution=64", "--learning_rate=1e-3", "--lr_warmup_steps=0"),
        "--train_batch_size=1",
        *("--report_to=tensorboard", *data, *arguments),
    ]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, cwd=spied
    )
    try:
        log, _ = process.communicate(timeout=timeout)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        status = None
    text = log.decode("utf-8", "replace")
    (spied / "log.txt").write_text(text, encoding="utf-8", newline="")
    events = {
        rank: [tuple(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        for rank in range(ranks)
        if (file := spied / f"spy-{rank}.jsonl").exists()
    }
    return Run(status, text, output, events)
