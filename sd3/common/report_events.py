"""Reads what a run told its tracker: steps with loss, images received and wall time, and the validation pictures."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Step:
    """One optimizer step."""

    number: int
    session: int  # which start of the training it belongs to
    wall_time: float = 0.0  # unix s at which its last batch was logged
    losses: list[float] = field(default_factory=list)  # one a batch
    images: int | None = None  # received by all ranks, all its batches together

    @property
    def loss(self) -> float:
        """Mean over its batches."""
        return sum(self.losses) / len(self.losses)


@dataclass
class Events:
    """All sessions of a run: later ones overrule steps that an earlier one made and lost."""

    steps: list[Step] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)  # (session, unix s)
    pictures: list[tuple[str, int, int, bytes]] = field(default_factory=list)  # tag, epoch, index, PNG


def event_messages(file: Path) -> list:
    """Event messages of a file; a record cut short by a kill ends it."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    messages = []
    try:
        for message in EventFileLoader(str(file)).Load():
            messages.append(message)
    except (ValueError, OSError, EOFError, struct.error):
        pass
    except Exception as error:  # TensorBoard raises its own DataLossError, whose place has moved between versions
        if type(error).__name__ != "DataLossError":
            raise
    return messages


def scalar(value: object) -> float:
    """The number in a scalar summary, as the loader gives it: a tensor."""
    from tensorboard.util import tensor_util

    return float(tensor_util.make_ndarray(value.tensor).item())


def read_events(run_dir: Path) -> Events:
    """Read every event file below run_dir/logs, oldest first."""
    events = Events()
    steps: dict[int, Step] = {}
    files = [file for file in (run_dir / "logs").rglob("events.out.tfevents.*") if file.is_file()]
    loaded = [messages for file in files if (messages := event_messages(file))]
    # hparams make a file of their own, without steps; sessions are the files that hold losses.
    with_steps = [m for m in loaded if any(v.tag == "loss" for message in m for v in message.summary.value)]
    for session, messages in enumerate(sorted(with_steps, key=lambda found: found[0].wall_time)):
        for message in messages:
            for value in message.summary.value:
                if value.tag in ("loss", "images"):
                    step = steps.get(message.step)
                    if step is None or step.session != session:
                        # A step made again after a resume; those behind it are of the lost past as well.
                        steps = {n: s for n, s in steps.items() if n < message.step or s.session == session}
                        step = steps[message.step] = Step(message.step, session)
                    step.wall_time = max(step.wall_time, message.wall_time)
                    if value.tag == "loss":
                        step.losses.append(scalar(value))
                    else:
                        step.images = (step.images or 0) + int(scalar(value))
                elif value.tag.split("/")[0] in ("validation", "test"):
                    events.validations.append((session, message.wall_time))
                    strings = list(value.tensor.string_val) if value.HasField("tensor") else []
                    pictures = strings[2:] if strings else [value.image.encoded_image_string]
                    index = int(tail) if (tail := value.tag.split("/")[-1]).isdigit() else 0
                    for offset, png in enumerate(pictures):
                        events.pictures.append((value.tag.split("/")[0], message.step, index + offset, bytes(png)))
    events.steps = [steps[number] for number in sorted(steps) if steps[number].losses]
    return events
