"""Progress as plain lines and as a bar, with the speed and time left computed from a clock."""

import io

from rich.console import Console

from ditloom.training.progress import Progress, Speed, duration


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_come_at_intervals_with_speed_and_time_left():
    clock, out = Clock(), io.StringIO()
    with Progress(10_000, stream=out, clock=clock, every=10.0) as progress:
        for step in range(1, 26):
            clock.now = float(step)
            progress.update(step * 100, loss=0.25)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "train 1,000/10,000 images  loss 0.25  100 img/s  1 min 30 s left"
    assert lines[-1] == "train 2,500/10,000 images  loss 0.25  100 img/s  1 min 15 s left"


def test_the_speed_forgets_a_slow_start_and_counts_from_a_resume():
    clock = Clock()
    speed = Speed(clock, window=10.0)
    speed.note(5000)
    assert speed.rate is None
    for second in range(30, 60):
        clock.now = float(second)
        speed.note(5000 + (second - 30) * 50)
    assert speed.rate == 50.0


def test_a_terminal_gets_a_bar_and_messages_above_it():
    out = io.StringIO()
    progress = Progress(100, stream=out)
    progress.console = Console(file=out, force_terminal=True, width=100)
    with progress:
        progress.update(50, loss=0.5)
        progress.say("saved [1]")
    text = out.getvalue()
    assert "50/100 images" in text and "saved [1]" in text and "━" in text


def test_quiet_says_nothing():
    out = io.StringIO()
    with Progress(100, stream=out, quiet=True, every=0.0) as progress:
        progress.update(50)
        progress.say("hello")
    assert out.getvalue() == ""


def test_durations_read_well():
    assert [duration(s) for s in (0, 59.4, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 05 min"]
