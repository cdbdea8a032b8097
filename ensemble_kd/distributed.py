"""Several processes that train as one: started by torchrun, on torch's own process groups.

Every process holds all networks and runs the same program; each takes its share of every batch. What is asked
of the outside world, files above all, is asked by the first alone, and told to the others. Outside of
torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ensemble_kd.errors import ConfigError, EkdError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
_WAIT = timedelta(hours=2)
"""For the slowest of the processes, which may be reading data or training a teacher."""


def started_by_torchrun() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process prints results; also before they are joined."""
    return int(os.environ.get("RANK", "0")) == 0 or not started_by_torchrun()


def restarted() -> bool:
    """Whether torchrun started these processes again after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """While entered, the processes that torchrun started are one group.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    if not started_by_torchrun():
        yield
        return
    import torch
    import torch.distributed as dist

    local, on_gpu = int(os.environ["LOCAL_RANK"]), device != "cpu" and torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise ConfigError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes for {torch.cuda.device_count()} GPU(s)",
            "each process needs a GPU of its own",
            f"say torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu",
        )
    if on_gpu:
        torch.cuda.set_device(local)
    # Of each attempt its own keys: after a restart the store still holds the addresses of the dead.
    base, own_rank, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", base)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=count, timeout=_WAIT)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Which of the processes this is; 0 is the first."""
    return _ask("get_rank", 0)


def size() -> int:
    """How many processes there are."""
    return _ask("get_world_size", 1)


def _ask(what: str, alone: int) -> int:
    if not started_by_torchrun():
        return alone
    import torch.distributed as dist

    return int(getattr(dist, what)()) if dist.is_initialized() else alone


def first() -> bool:
    """Whether this process is the one that reads and writes files, and speaks."""
    return rank() == 0


def own_seed(seed: int) -> int:
    """Of draws in which the processes must differ, such as dropout; `seed` itself in the first."""
    return seed + 1_000_003 * rank()


def told(value: T) -> T:
    """What the first process gives, in all of them."""
    if size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def by_first(work: Callable[[], T]) -> T | None:
    """Do `work` in the first process; the others go on when it is done, and fail as it does.

    Returns:
        What `work` gives, in the first process; None in the others.
    """
    if size() == 1:
        return work()
    if not first():
        failure: Any = told(None)
        if failure is not None:
            kind, problems = failure
            raise kind(problems)
        return None
    try:
        result = work()
    except EkdError as error:
        failed: Any = (type(error), error.problems)
        told(failed)
        raise
    told(None)
    return result


def wait() -> None:
    """Go on when all processes are here."""
    if size() > 1:
        import torch.distributed as dist

        dist.barrier()


def share(index: Tensor) -> Tensor:
    """This process' contiguous part of `index`; together, in order, the parts are all of it."""
    count = size()
    if count == 1:
        return index
    import torch

    return torch.tensor_split(index, count)[rank()]


def own_part(index: Tensor) -> Tensor:
    """This process' `share` of `index`, filled up by its first to as many as any process has.

    So each has work to do, and forward passes that all take part in are equally many.
    """
    own = share(index)
    missing = -(-len(index) // size()) - len(own)
    if not missing:
        return own
    import torch

    return torch.cat([own, index[:1].expand(missing)])


def gathered(part: Tensor, total: int) -> Tensor:
    """The results (n_r, …) of all processes one after another, (total, …), each for its `own_part` of `total`."""
    count = size()
    if count == 1:
        return part
    import torch
    import torch.distributed as dist

    lengths = [len(own) for own in torch.tensor_split(torch.arange(total), count)]
    padded = part.new_zeros((max(lengths), *part.shape[1:]))
    padded[: lengths[rank()]] = part[: lengths[rank()]]
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return torch.cat([own[:length] for own, length in zip(parts, lengths, strict=True)])


def add_up(values: Tensor) -> None:
    """Replace `values`, in place, by their sum over the processes."""
    if size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)


def greatest(values: Tensor) -> None:
    """Replace `values`, in place, by their maximum over the processes."""
    if size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values, op=dist.ReduceOp.MAX)


def most(count: int, device: torch.device) -> int:
    """The largest of the processes' counts."""
    if size() == 1:
        return count
    import torch

    box = torch.tensor(count, device=device)
    greatest(box)
    return int(box)


def whole(values: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part (see `teachers.sharding`); others as they are."""
    parts: Any = values
    return parts.full_tensor() if hasattr(parts, "full_tensor") else values
