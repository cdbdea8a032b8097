"""The short form of `make torture`."""

from __future__ import annotations

import random

import pytest
import torture


@pytest.mark.parametrize(
    ("promise", "trials"), torture.PROMISES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_promise_holds(promise, trials, tmp_path, own_cache):
    row = promise(tmp_path, max(1, trials // 25), random.Random(1))
    assert row.survived == row.trials > 0
