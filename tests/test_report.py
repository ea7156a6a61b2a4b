"""The report's figures against numbers worked out by hand, from event files written by the ordinary tracker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from sd3.common.report import final_loss, intervals, report, throughput
from sd3.common.report_events import read_events

START = 1_700_000_000.0


class Session:
    """One start of a training: an event file of its own."""

    def __init__(self, run: Path, name: str) -> None:
        self.writer = EventFileWriter(str(run / "logs" / "dreambooth-sd3" / name))

    def step(self, number: int, at: float, loss: float, images: int | None = None) -> None:
        values = [Summary.Value(tag="loss", simple_value=loss)]
        if images is not None:
            values.append(Summary.Value(tag="images", simple_value=images))
        self.writer.add_event(Event(step=number, wall_time=START + at, summary=Summary(value=values)))

    def validation(self, epoch: int, at: float) -> None:
        image = Summary.Image(height=1, width=1, encoded_image_string=b"a picture")
        value = Summary.Value(tag="validation", image=image)
        self.writer.add_event(Event(step=epoch, wall_time=START + at, summary=Summary(value=[value])))

    def close(self) -> None:
        self.writer.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    settings = {"checkpointing_steps": "5", "case_name": "SD3_Dreambooth_bf16_1p_bs4", "started_at": str(START)}
    (tmp_path / "run_settings.json").write_text(json.dumps(settings))
    return tmp_path


def plain(run: Path, count: int, seconds: float = 2.0, images: int | None = 4) -> None:
    session = Session(run, "first")
    for number in range(1, count + 1):
        session.step(number, number * seconds, loss=float(number), images=images)
    session.close()


def test_images_received_over_the_time_between_steps(run: Path) -> None:
    plain(run, 4)
    assert throughput(read_events(run), 5) == (2.0, "2.000")
    assert final_loss(read_events(run)) == (2.5, "2.500000")


def test_a_small_last_batch_counts_as_what_it_was(run: Path) -> None:
    session = Session(run, "first")
    for number, (at, images) in enumerate([(0, 8), (9, 8), (10, 8), (12, 2)], start=1):
        session.step(number, at, 1.0, images)
    session.close()
    # The first interval is warm-up; then 8 images in 1 s and 2 in 2 s.
    assert throughput(read_events(run), 100)[0] == pytest.approx(10 / 3)


def test_batches_of_one_accumulated_step_are_added(run: Path) -> None:
    session = Session(run, "first")
    for number, at in [(0, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 6), (3, 7)]:
        session.step(number, at, 1.0, 4)
    session.close()
    steps = read_events(run).steps
    found = [(step.number, step.images, step.wall_time - START) for step in steps[1:]]
    assert found == [(1, 8, 3), (2, 8, 5), (3, 8, 7)]


def test_checkpoints_and_validations_are_not_timed(run: Path) -> None:
    session = Session(run, "first")
    at = 0.0
    for number in range(1, 13):
        at += 50 if number in (5, 10) else 1
        session.step(number, at, 1.0, 3)
        if number == 7:
            at += 30
            session.validation(0, at)
    session.close()
    timed = [step.number for step, _ in intervals(read_events(run), 5)]
    # 5 and 10 hold a checkpoint, 6 and 11 its completion, 8 the validation, 2 the warm-up.
    assert timed == [3, 4, 7, 9, 12]
    assert throughput(read_events(run), 5)[0] == pytest.approx(3.0)


def test_a_resume_overrules_the_lost_steps_and_its_pause_is_no_interval(run: Path) -> None:
    first = Session(run, "first")
    for number in range(1, 8):
        first.step(number, number, 1.0, 4)
    first.close()
    second = Session(run, "second")
    for number in range(5, 10):
        second.step(number, 1000 + 2 * number, 9.0, 4)
    second.close()
    events = read_events(run)
    assert [(step.number, step.loss) for step in events.steps] == [(n, 1.0 if n < 5 else 9.0) for n in range(1, 10)]
    assert max(seconds for _, seconds in intervals(events, 100)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("count", "images", "said"),
    [
        (0, 4, "recorded no step"),
        (1, 4, "needs at least 4 steps"),
        (3, 4, "needs at least 4 steps"),
        (9, None, "did not record"),
    ],
)
def test_what_cannot_be_known_says_why(run: Path, count: int, images: int | None, said: str) -> None:
    plain(run, count, images=images)
    rate, text = throughput(read_events(run), 100)
    assert rate is None
    assert text.startswith("n/a, ")
    assert said in text


def test_a_diverged_loss_is_not_a_number_in_the_report(run: Path) -> None:
    session = Session(run, "first")
    session.step(1, 1, float("nan"), 4)
    session.close()
    assert final_loss(read_events(run))[0] is None
    report(run, 0)
    assert "NaN" not in (run / "report.json").read_text()


def test_an_event_file_cut_short_by_a_kill_is_read_as_far_as_it_goes(run: Path) -> None:
    plain(run, 6)
    (file,) = (run / "logs").rglob("events.*")
    file.write_bytes(file.read_bytes()[:-7])
    assert [step.number for step in read_events(run).steps] == [1, 2, 3, 4, 5]


def test_files_and_lines(run: Path) -> None:
    plain(run, 6)
    session = Session(run, "pictures")
    session.step(7, 14, 7.0, 4)
    session.validation(3, 15)
    session.close()
    lines = report(run, exit_status=0)
    assert lines[0].startswith("Final Performance images/sec : ")
    assert lines[1].startswith("Final Train Loss : 4.0")
    assert lines[2].startswith("E2E Training Duration sec : ")
    written = json.loads((run / "report.json").read_text())
    assert (written["last_step"], written["images_received"], written["exit_status"]) == (7, 28, 0)
    assert lines[0] in (run / "SD3_Dreambooth_bf16_1p_bs4.log").read_text()
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "validation-3-0.png").read_bytes() == b"a picture"


def test_the_log_has_the_published_keys(run: Path) -> None:
    plain(run, 4)
    report(run, 0)
    log = (run / "SD3_Dreambooth_bf16_1p_bs4.log").read_text().splitlines()
    values = dict(line.split(" = ", 1) for line in log if " = " in line)
    assert (values["CaseName"], values["ActualFPS"]) == ("SD3_Dreambooth_bf16_1p_bs4", "2.000")
    assert (values["TrainingTime"], values["ActualLoss"]) == ("2.000", "2.500000")
    assert {"Network", "BatchSize", "DeviceType", "E2ETrainingTime"} <= values.keys()


def test_a_plot_that_fails_costs_no_figure(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    plain(run, 4)
    monkeypatch.setattr("sd3.common.report.draw", fail)
    assert report(run, 0)[0] == "Final Performance images/sec : 2.000"
    assert "note: no report.png (RuntimeError: no fonts)" in capsys.readouterr().err
    assert (run / "report.json").exists()


def test_the_pictures_of_the_usual_writer_are_found(run: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "logs" / "dreambooth-sd3")) as writer:
        writer.add_scalars("ignored", {"a": 1.0})
        writer.add_scalar("loss", 1.0, 1)
        writer.add_images("validation", numpy.zeros((2, 8, 8, 3), dtype=numpy.uint8), 0, dataformats="NHWC")
    report(run, 0)
    assert (run / "validation-0-0.png").read_bytes().startswith(b"\x89PNG")


def test_a_directory_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sd3.common.report", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "is no run directory" in result.stderr
    assert "Traceback" not in result.stderr
