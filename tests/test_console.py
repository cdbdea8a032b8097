"""What is seen while something runs: bars on a terminal, lines elsewhere, no colour where none is wanted."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from support import logged

from ensemble_kd import console
from ensemble_kd.console import Meter, lasting, progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_meter_tells_rate_and_time_left():
    clock = Clock()
    meter = Meter(1000, "images", 32, clock)
    assert not meter.count(1)
    assert meter.speed == ""
    for _ in range(10):
        clock.now += 1
        assert meter.count(10)
    assert meter.speed == "323 images/s, 89 s left"  # 101 steps of 32 images in 10 s
    clock.now += 1
    meter.count(899)
    assert meter.speed == "2,909 images/s, took 11 s"


def test_the_rate_is_that_of_late_and_knows_no_earlier_steps():
    clock = Clock()
    meter = Meter(10_000, "", 1, clock)
    meter.count(5000, earlier=True)
    assert meter.speed == ""
    for rate in (1, 2):
        for _ in range(60):
            clock.now += 1
            meter.count(rate)
    assert meter.speed == "2/s, 40 min left"
    assert meter.done == 5180


def test_what_takes_more_than_a_second_is_told_in_seconds_each():
    clock = Clock()
    meter = Meter(10, "views", 1, clock)
    clock.now += 25
    meter.count(2)
    assert meter.speed == "12.5 s each, 100 s left"


def test_many_small_steps_are_glanced_at():
    clock = Clock()
    meter = Meter(10_000, "", 1, clock)
    shown = 0
    for _ in range(1000):
        clock.now += 0.01
        shown += meter.count(1)
    assert shown in (19, 20)
    assert meter.speed.startswith("100/s")


def test_times_for_people():
    assert [lasting(s) for s in (0.04, 41.2, 200, 9000, 36_000)] == [
        "0.0 s", "41 s", "3 min", "150 min", "10.0 h",
    ]  # fmt: skip


@pytest.fixture
def _plain(monkeypatch):
    monkeypatch.setattr(console._stderr, "level", logging.DEBUG)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)


@pytest.mark.usefixtures("_plain")
def test_without_a_terminal_there_are_lines_now_and_then(monkeypatch):
    """At first every half minute, then more rarely; nothing for what is soon done."""
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    monkeypatch.setattr(Meter.__init__, "__defaults__", ("", 1, clock))
    with logged() as lines, progress("soon", 10) as advance:
        for _ in range(10):
            clock.now += 1
            advance()
    assert lines == []
    log = logging.getLogger("ensemble_kd")
    with logged() as lines, progress("student", 1000, "images", 8) as advance:
        log.setLevel(logging.DEBUG)
        for _ in range(1000):
            clock.now += 1
            advance()
    assert lines[0] == "DEBUG: student  30/1000  8 images/s, 16 min left"
    assert lines[1] == "DEBUG: student  60/1000  8 images/s, 16 min left"
    assert 15 < len(lines) < 25


def test_where_there_is_nothing_to_do_nothing_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console.log_to_stderr()
    for total, shown in ((0, False), (1, True)):
        with progress("predicting", total) as advance:
            advance(total)
        assert ("predicting" in capsys.readouterr().err) == shown


SCRIPT = """
import time
from ensemble_kd import console
console.log_to_stderr()
with console.progress("[b]student[/b]", 40, "images", 10) as advance:
    for _ in range(40):
        time.sleep(0.03)
        advance(note="val acc 0.5")
"""


def on_a_terminal(**env: str) -> str:
    """What the script writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")
    }
    ran = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=theirs, stdout=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm-256color", "COLUMNS": "150", **env},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert ran.wait() == 0
    return seen.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38;|9[0-7])[0-9;]*m")


def test_a_terminal_shows_a_bar_with_rate_and_time_left():
    seen = on_a_terminal()
    assert COLOUR.search(seen)
    assert "[b]student[/b]" in seen, "a description is a text and no markup"
    assert re.search(r"\d+ images/s, \d+(\.\d)? s left", seen)
    assert re.search(r"images/s, took \d+(\.\d)? s", seen)
    assert "40/40" in seen
    assert "val acc 0.5" in seen


def test_no_colour_is_honoured():
    seen = on_a_terminal(NO_COLOR="1")
    assert "images/s" in seen
    assert not COLOUR.search(seen)


def test_a_pipe_gets_no_bar():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    short = SCRIPT.replace("console.log_to_stderr()", "console.log_to_stderr(); console._SECONDS = 0.1")
    ran = subprocess.run([sys.executable, "-c", short], capture_output=True, text=True, check=True)
    assert re.match(r"\[b\]student\[/b\]  \d+/40  \d+ images/s, ", ran.stderr)
    assert "\x1b" not in ran.stderr
