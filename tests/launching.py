"""A copy of the project with a stub in place of the training scripts, to try the launchers on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted(path.name for path in (PROJECT / "sd3").glob("finetune_*.sh"))
BF16 = "finetune_sd3_dreambooth_deepspeed_bf16.sh"
DDP = "finetune_sd3_dreambooth_fp16.sh"
LORA = "finetune_sd3_dreambooth_lora_fp16.sh"

STUB = '''
import json, os, signal, sys, time
mode = os.environ.get("STUB_MODE", "")
out = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--output_dir="))
rank = os.environ.get("RANK", "0")
with open(os.path.join(out, "stub-%s.json" % rank), "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}, file)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
elif mode == "careful":
    def stop(number, frame):
        time.sleep(2)
        open(os.path.join(out, "finished-%s" % rank), "w").close()
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
elif mode == "together":
    # As an engine stops that checkpoints first: the ranks agree on the step, and meet before and after the writing.
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    caught = torch.zeros(1)
    signal.signal(signal.SIGTERM, lambda number, frame: caught.fill_(number))
    open(os.path.join(out, "ready-%s" % rank), "w").close()
    while True:
        agreed = caught.clone()
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        if agreed:
            dist.barrier()
            open(os.path.join(out, "finished-%s" % rank), "w").close()
            dist.barrier()
            sys.exit(128 + int(agreed))
        time.sleep(0.05)
elif mode == "refuse":
    from sd3.common.command_line import UserError
    from sd3.common.refusals import refuse
    sys.exit(refuse(UserError("--data is no data; give some.")))
print("stub started", os.environ.get("HF_TOKEN", ""), flush=True)
if mode in ("stubborn", "careful", "wait"):
    open(os.path.join(out, "ready-%s" % rank), "w").close()
    time.sleep(120)
sys.exit(int(os.environ.get("STUB_EXIT", "0")))
'''


def fake_project(root: Path, checkout: bool = True) -> Path:
    """The project below root with stubs for both engines; build/diffusers is a little repository of our own."""
    project = root / "a project"
    shutil.copytree(PROJECT / "sd3", project / "sd3", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "patches").mkdir()
    shutil.copy(PROJECT / "patches" / "lib.sh", project / "patches")
    (project / "patches" / "series").write_text("")
    shutil.copy(PROJECT / "setup_env.sh", project)
    scripts = project / "build" / "diffusers" / "examples" / "dreambooth"
    scripts.mkdir(parents=True)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(project / "build" / "diffusers")]
    names = ("train_dreambooth_sd3.py", "train_dreambooth_lora_sd3.py")
    (project / "sd3" / "native").mkdir(exist_ok=True)
    for folder in (scripts, project / "sd3" / "native"):
        for name in names:
            (folder / name).write_text(STUB)
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "stubs"], check=True)

    def answer(*arguments: str) -> str:
        return subprocess.run([*git, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    blob = answer("rev-parse", f"HEAD:examples/dreambooth/{names[0]}")
    files = "".join(f"examples/dreambooth/{name} {blob} {blob}\n" for name in names)
    (project / "patches" / "upstream.env").write_text(
        f"UPSTREAM_URL=none\nUPSTREAM_COMMIT={answer('rev-parse', 'HEAD')}\n"
        f'UPSTREAM_TREE={answer("rev-parse", "HEAD^{tree}")}\nUPSTREAM_FILES="\n{files}"\n'
    )
    if not checkout:
        shutil.rmtree(project / "build")
    return project


def environment(**extra: str) -> dict[str, str]:
    """The caller's environment less what would disturb a launcher, with this Python as the project's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ACCELERATE_", "ASCEND_"))}
    return {**kept, "SD3_PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", **extra}


def command(project: Path, launcher: str, *arguments: str) -> list[str]:
    return ["bash", str(project / "sd3" / launcher), *arguments]


def start(project: Path, launcher: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(project, launcher, *arguments),
        cwd=cwd, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def launch(
    project: Path, launcher: str, *arguments: str, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    return subprocess.run(
        command(project, launcher, *arguments),
        cwd=cwd, env=environment(**env), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
