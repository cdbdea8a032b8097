"""Where a training step's time goes: named spans, summed over some steps by torch's profiler."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ensemble_kd import files
from ensemble_kd.console import log

WARM_UP, STEPS = 3, 20
_PREFIX = "ekd: "
_active = False


def report(parts: Mapping[str, float], trace: Path) -> None:
    """Log where a step's time goes, and write it beside the trace: milliseconds by part, and of the whole `step`."""
    files.write_json(trace.with_name("profile.json"), {"milliseconds": parts})
    log.info("a training step takes %.2f ms (trace for ui.perfetto.dev: %s)", parts["step"], trace)
    for name, milliseconds in parts.items():
        if name != "step":
            log.info("  %-10s %8.3f ms  %4.1f %%", name, milliseconds, 100 * milliseconds / parts["step"])


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
    """While entered, profiles up to `STEPS` steps after a warm-up; call it at the end of each step."""

    def __init__(self, trace: Path, steps: int) -> None:
        """`trace` is where a trace for Perfetto is written; there will be `steps` steps, two or more."""
        self.table: dict[str, float] = {}
        """Milliseconds a step by span, largest first, and the rest of the `step`."""
        self._trace = trace
        os.environ.setdefault("KINETO_LOG_LEVEL", "100")  # it writes to stderr otherwise
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        warm_up = min(WARM_UP, steps - 1)
        self._steps = min(STEPS, steps - warm_up)
        plan = schedule(wait=0, warmup=warm_up, active=self._steps, repeat=1)
        self._profile = profile(
            activities=activities, schedule=plan, on_trace_ready=self._finish, acc_events=True
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
        sums: dict[str, float] = {}
        for event in events:
            if event.name.startswith(_PREFIX):
                name = event.name.removeprefix(_PREFIX)
                sums[name] = sums.get(name, 0.0) + event.cpu_time_total
        sums["other"] = max(0.0, whole - sum(sums.values()))
        ordered = sorted(sums.items(), key=lambda item: -item[1])
        self.table = {name: time / self._steps / 1000 for name, time in [*ordered, ("step", whole)]}
