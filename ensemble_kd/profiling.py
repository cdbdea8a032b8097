"""Where a training step's time goes: named spans, summed over some steps by torch's profiler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

WARM_UP, STEPS = 3, 20
_PREFIX = "ekd: "
_active = False


def span(name: str) -> AbstractContextManager[Any]:
    """A named part of a step; costs nothing while nothing is profiled."""
    return _timed(name) if _active else nullcontext()


@contextmanager
def _timed(name: str) -> Iterator[None]:
    with record_function(_PREFIX + name):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that the span holds the work that it launched


class StepProfile:
    """While entered, profiles `STEPS` steps after a warm-up; call it at the end of each step."""

    def __init__(self, trace: Path) -> None:
        """`trace` is where a trace for chrome://tracing or Perfetto is written."""
        self.table: dict[str, float] = {}
        """Milliseconds a step by span, largest first, and the rest of the `step`."""
        self._trace = trace
        os.environ.setdefault("KINETO_LOG_LEVEL", "100")  # it writes to stderr otherwise
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        steps = schedule(wait=0, warmup=WARM_UP, active=STEPS, repeat=1)
        self._profile = profile(
            activities=activities, schedule=steps, on_trace_ready=self._finish, acc_events=True
        )

    def __enter__(self) -> StepProfile:
        global _active
        _active = True
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global _active
        _active = False
        self._profile.__exit__(*error)

    def __call__(self) -> None:
        """One step has ended."""
        self._profile.step()

    def _finish(self, done: profile) -> None:
        global _active
        _active = False
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._trace))
        events = [event for event in done.events() if event.name.startswith((_PREFIX, "ProfilerStep"))]
        whole = sum(e.cpu_time_total for e in events if e.name.startswith("ProfilerStep"))
        count = sum(e.name.startswith("ProfilerStep") for e in events) or 1
        sums: dict[str, float] = {}
        for event in events:
            if event.name.startswith(_PREFIX):
                name = event.name.removeprefix(_PREFIX)
                sums[name] = sums.get(name, 0.0) + event.cpu_time_total
        sums["other"] = max(0.0, whole - sum(sums.values()))
        ordered = sorted(sums.items(), key=lambda item: -item[1])
        self.table = {name: time / count / 1000 for name, time in [*ordered, ("step", whole)]}
