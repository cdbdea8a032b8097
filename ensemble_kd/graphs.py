"""A CUDA graph of a whole training step: recorded once, then replayed without launching its kernels one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ensemble_kd.console import log

WARM_UP = 3


class Replayed:
    """`work` as it is for the first calls, then recorded and replayed.

    `work` must do the same operations on the same tensors in each call, and never wait for the device.
    Where it cannot be recorded, it goes on as it is, and says so.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._device, self._calls = work, device, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        with torch.cuda.device(self._device):  # streams and graphs are those of the current one
            self._once()

    def _once(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        self._calls += 1
        if self._calls == WARM_UP + 1:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        elif self._calls <= WARM_UP:
            self._warm_up()
        else:
            self._work()

    def _warm_up(self) -> None:
        """On a stream of its own, as recording will be; these are real steps."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._work()
        current.wait_stream(stream)

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.clone_state()
        try:
            with torch.cuda.graph(graph):
                self._work()
        except RuntimeError as error:
            generator.graphsafe_set_state(state)  # which would wait for the end of the recording for ever
            torch.cuda.synchronize()
            log.warning("steps are not recorded as a CUDA graph: %s", str(error).splitlines()[0])
            return
        self._graph = graph
