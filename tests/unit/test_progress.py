"""What a long step shows of itself, by a clock of ours."""

from __future__ import annotations

import io

import pytest

from intra_distillation_fairseq.corpus import learning
from intra_distillation_fairseq.experiments import logs
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.experiments.time_left import runs_left
from intra_distillation_fairseq.files import write_json
from intra_distillation_fairseq.progress import Pace, Progress, duration, rest


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(progress, clock, *, first, last, seconds, step=1, values=None):
    """Units first to last, each `step` of them in so many seconds."""
    for done in range(first, last + 1, step):
        progress.show(done, values)
        clock.now += seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3570, "1 h 00 min"), (11100, "3 h 05 min"),
     (86399, "1 d 0 h"), (187200, "2 d 4 h")],
)  # fmt: skip
def test_a_duration_is_as_exact_as_it_is_worth(seconds, text):
    assert duration(seconds) == text


def test_in_a_file_there_is_a_line_now_and_then(clock):
    file = io.StringIO()
    with Progress("clean train", 7200, "pairs", clock=clock, stream=file) as progress:
        steps(progress, clock, first=1, last=7200, seconds=1.0)
    *lines, end = file.getvalue().splitlines()
    assert end == "clean train: 7200/7200 pairs (100%)"
    assert lines[0] == "clean train: 11/7200 pairs (0%), 2 h 00 min left"
    assert lines[1].startswith("clean train: 21/7200 pairs (0%), ")
    assert lines[-1] == "clean train: 7041/7200 pairs (98%), 3 min left"
    assert len(lines) == 30
    times = [int(line.split()[2].split("/")[0]) for line in lines]
    waits = [later - earlier for earlier, later in zip(times, times[1:])]
    assert min(waits) == 10 and max(waits) == 600 and waits == sorted(waits)


def test_a_short_step_says_nothing_in_a_file(clock):
    file = io.StringIO()
    with Progress("encode valid", 100, "pairs", clock=clock, stream=file) as progress:
        steps(progress, clock, first=1, last=100, seconds=0.09)
    assert file.getvalue() == ""


def test_values_stand_behind_the_time_left(clock):
    file = io.StringIO()
    progress = Progress("train id_x", 100, "updates", clock=clock, stream=file)
    steps(progress, clock, first=1, last=11, seconds=2.0, values={"loss": 6.25})
    progress.milestone(11, {"loss": 6.25, "valid_loss": 5.123456})
    assert file.getvalue().splitlines()[-1] == (
        "train id_x: 11/100 updates (11%), 3 min left, loss 6.25, valid_loss 5.123"
    )


def test_the_time_left_is_that_of_the_latest_pace_and_not_of_the_launch(clock):
    pace = Pace(10_000, clock)
    for done in range(1000):  # fast
        pace.note(done)
        clock.now += 0.01
    for done in range(1000, 2000):  # then a second each
        pace.note(done)
        clock.now += 1.0
    assert pace.seconds_left() == pytest.approx(8001, rel=0.02)


def test_a_resumed_step_is_not_taken_for_a_fast_one(clock):
    file = io.StringIO()
    progress = Progress("train id_x", 50_000, "updates", clock=clock, stream=file)
    steps(progress, clock, first=40_000, last=40_100, seconds=1.0)
    assert file.getvalue().splitlines()[-1].endswith(" left") and " 2 h 4" in file.getvalue()


def test_a_step_that_goes_back_begins_to_measure_anew(clock):
    pace = Pace(100, clock)
    for done in (80, 90):
        pace.note(done)
        clock.now += 10
    pace.note(20)
    assert pace.seconds_left() is None
    clock.now += 10
    pace.note(21)
    assert pace.seconds_left() == 790


def test_where_nothing_can_be_told_nothing_is(clock):
    file = io.StringIO()
    progress = Progress("train", 0, "updates", clock=clock, stream=file)
    steps(progress, clock, first=1, last=12, seconds=1.0, values={"loss": 1.0})
    assert file.getvalue() == "train: 11 updates, loss 1\n"
    pace = Pace(10, clock)
    assert pace.seconds_left() is None and pace.text() == ""
    pace.note(10)
    assert pace.text() == ""


def test_a_terminal_gets_a_bar_with_the_same_words(clock):
    terminal = Terminal()
    with Progress("clean", 200, "pairs", clock=clock, stream=terminal) as progress:
        steps(progress, clock, first=1, last=101, seconds=1.0, values={"loss": 2.0})
        progress.write("a line")
        clock.now -= 1.0
        progress.show(200)  # too soon to be drawn, but not to be left out at the end
    text = terminal.getvalue()
    assert "clean:  50%|" in text and "| 101/200 pairs, 2 min left, loss 2" in text
    assert "a line\n" in text and "100%|" in text and "| 200/200 pairs" in text


def test_a_bar_without_an_end(clock):
    terminal = Terminal()
    with Progress("download", 0, "MB", clock=clock, stream=terminal) as progress:
        steps(progress, clock, first=1, last=3, seconds=1.0)
    assert "download: 3 MB" in terminal.getvalue()


def test_training_shows_the_time_left_after_a_resume(clock):
    """The lines of fairseq's log, as `train` hands them over."""
    log, file = logs.TrainingLog(), io.StringIO()
    progress = Progress("train id_x", 1000, "updates", clock=clock, stream=file)
    log.feed(logs.launch_line(""))
    log.feed("2026-01-01 00:00:00 | INFO | fairseq.trainer | Loaded checkpoint run/x.pt (epoch 3 @ 800 updates)")
    clock.now += 500  # reading the data tells nothing of the pace
    for update in range(801, 851):
        values = f'{{"epoch": 3, "update": 2.5, "loss": "4.5", "num_updates": "{update}"}}'
        assert log.feed(f"2026-01-01 00:00:01 | INFO | train_inner | {values}") == "train"
        progress.show(log.update, log.latest)
        clock.now += 2.0
    assert file.getvalue().splitlines()[-1] == "train id_x: 801/1000 updates (80%), loss 4.5"
    progress.milestone(log.update, log.latest)
    assert file.getvalue().splitlines()[-1] == "train id_x: 850/1000 updates (85%), 5 min left, loss 4.5"


def test_the_rest_of_a_series(clock):
    assert rest(3, 8, "cells", 7800) == "3 of 8 cells left, about 2 h 10 min"
    assert rest(3, 8, "cells", None) == "3 of 8 cells left"
    assert rest(0, 8, "cells", 0.0) == "0 of 8 cells left"
    pace = Pace(4, clock)
    pace.note(0)
    clock.now += 600
    pace.note(1)
    assert pace.rest("points") == "3 of 4 points left, about 30 min"


def test_runs_left_by_what_runs_of_their_kind_took(tmp_path):
    def done(name: str, training: float, scoring: float) -> tuple[str, object]:
        run = RunFolder(tmp_path / name)
        (run.folder / "eval" / "best").mkdir(parents=True)
        write_json(run.finished, {"seconds": training, "time": "now"})
        write_json(run.folder / "eval" / "best" / "score.json", {"seconds": scoring, "finished": "now"})
        return name.split("-")[0], run.folder

    plain, slow = done("plain-1", 550, 50), done("slow-1", 1700, 100)
    failed = ("slow", tmp_path / "failed")
    assert runs_left([], ["plain"], "best", "runs") == "1 of 1 runs left"
    assert runs_left([failed], ["slow"], "best", "runs") == "1 of 2 runs left"
    assert runs_left([plain, slow], ["plain", "slow"], "best", "runs") == "2 of 4 runs left, about 40 min"
    assert runs_left([plain, slow], ["plain", "slow"], "best", "runs", 2) == "2 of 4 runs left, about 20 min"
    assert runs_left([plain, slow], ["other"], "best", "runs") == "1 of 3 runs left, about 20 min"
    assert runs_left([plain, slow], [], "best", "runs") == "0 of 2 runs left"


def test_rounds_of_learning_pieces():
    log = "".join(f"x] EM sub_iter={i} size={size} obj=1\n" for size in (16000, 12000) for i in (0, 1)).encode()
    assert learning.rounds(b"", 4000) == (0, 0)
    assert learning.rounds(log, 4000) == (2, 6)  # 9000, 6750, 5063 and 3797 pieces to come
    assert learning.rounds(log, 12000) == (2, 2)
