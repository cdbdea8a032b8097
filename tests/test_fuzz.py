"""The short form of `make fuzz`."""

from __future__ import annotations

import logging
import os
import signal
import warnings

import fuzz
import pytest
import torture
from fuzz import Reader

from ensemble_kd import console
from ensemble_kd.errors import DataError

LIMITED = fuzz.limited


@pytest.fixture(autouse=True)
def as_in_its_own_process(monkeypatch):
    """Under an alarm and quiet, and afterwards as before."""
    before = signal.signal(signal.SIGALRM, fuzz.hung)
    monkeypatch.setenv("EKD_CACHE", "")  # set by `fuzz`, and brought back
    monkeypatch.setattr(console.log, "disabled", True)
    monkeypatch.setattr(fuzz, "limited", lambda most: None)  # it could not be raised again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    signal.signal(signal.SIGALRM, before)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", fuzz.readers())
def test_a_reader_holds(name, tmp_path):
    row = fuzz.fuzz(name, fuzz.readers()[name], 0.3, 1, tmp_path)
    assert row.files >= 20
    assert (row.tracebacks, row.hangs, list(tmp_path.iterdir())) == (0, 0, [])
    assert row.grown < fuzz.ROOM


FOUND = {
    "a state without its threads": ("checkpoint", lambda good: good.replace(b'"threads"', b'"treads"')),
    "a state that is a list": ("checkpoint", lambda good: b"[]"),
    "a state nested deeply": ("checkpoint", lambda good: b"[" * 100_000),
    "a view beyond all files": (
        "store of targets",
        lambda good: good.replace(b'"1": [', b'"%d": [' % (1 << 62)),
    ),
    "a view before the first": ("store of targets", lambda good: good.replace(b'"1": [', b'"-1": [')),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_before_is_passed_over(case, tmp_path):
    name, change = FOUND[case]
    reader = fuzz.readers()[name](tmp_path)
    changed = change(reader.seeds[0])
    assert changed != reader.seeds[0]
    reader.read(changed)


def test_what_fails_is_seen_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "ALARM", 0.05)

    def read(data: bytes) -> None:
        if data == b"good":
            return
        if len(data) % 3 == 0:
            raise DataError("bad", "why", "fix")
        if len(data) % 3 == 1:
            raise KeyError(data)
        while True:
            pass

    row = fuzz.fuzz("x", lambda folder: Reader([b"good"], read), 0, 0, tmp_path)
    assert row.files == 20
    assert min(row.refused, row.tracebacks, row.hangs) > 0
    assert not row.good
    assert len(list(tmp_path.glob("x-*.bin"))) >= 2


@pytest.mark.parametrize(("size", "code"), [(1 << 20, 0), (1 << 32, 1)])
def test_memory_is_limited(size, code):
    """In a process of its own, as the limit stays."""

    def work() -> None:
        LIMITED(1 << 28)
        bytes(size)

    _, status = os.waitpid(torture.forked(work), 0)
    assert os.waitstatus_to_exitcode(status) == code
