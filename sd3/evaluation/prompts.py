"""What is painted, and the text that a picture is compared with."""

from __future__ import annotations

import re
from pathlib import Path

from sd3.common.command_line import UserError

FOLDER = Path(__file__).parent
SETS = {"object": FOLDER / "prompts_object.txt", "live-subject": FOLDER / "prompts_live_subject.txt"}
PLACEHOLDER = "{subject}"


def read_prompts(name: str, subject: str) -> list[str]:
    """The prompts of a set or a file, `subject` in the place of {subject}, each one once.

    Raises:
        UserError: there is no such set or file, or it holds no prompt.
    """
    path = SETS.get(name, Path(name))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--prompt-set={name} is not object, live-subject or a text file in UTF-8; name one of them."
        ) from None
    prompts = [line.strip().replace(PLACEHOLDER, subject) for line in lines if line.strip() and line.lstrip()[0] != "#"]
    if not prompts:
        raise UserError(f"--prompt-set={name} holds no prompt; write one on each line.")
    return list(dict.fromkeys(prompts))


def class_noun_of(subject: str) -> str:
    """`subject` without its first word, the rare token of DreamBooth: "sks dog" gives "dog"; one word stays."""
    return subject.split(maxsplit=1)[-1] if subject.strip() else subject


def text_for_clip(prompt: str, subject: str, class_noun: str) -> str:
    """The prompt with `class_noun` in the place of `subject`.

    CLIP has never seen the rare token. Left in, it would pull the text away from every picture, good or bad.
    """
    if not subject.strip():
        return prompt
    whole = rf"(?<!\w){re.escape(subject)}(?!\w)"
    return re.sub(whole, lambda _: class_noun, prompt, flags=re.IGNORECASE)
