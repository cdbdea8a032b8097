"""Two machines distil together: both build the targets, share every batch, and end with one run.

    python examples/several_machines.py [--fast]

Both are this one here. On real machines the printed commands run one on each, with the first one's address;
the cache (EKD_CACHE) and the run folder lie where both can read and write. For SLURM see examples/cluster.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys

import ensemble_kd

OUT = "runs/together"
OPTIONS = ["--teachers", "lenet,resnet8", "--student", "lenet", "--controls", "none", "--out", OUT]
FAST = ["--limit-train", "200", "--epochs", "2", "--teacher-epochs", "1"]


def free_port() -> int:
    """A port on which the machines can meet."""
    with socket.socket() as door:
        door.bind(("localhost", 0))
        return int(door.getsockname()[1])


def command(machine: int, machines: int, address: str, port: int, options: list[str]) -> list[str]:
    """What runs on one of the machines, with one process; with eight GPUs it would be eight."""
    meeting = ["--nnodes", machines, "--node-rank", machine, "--master-addr", address, "--master-port", port]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", 1]
    return [*map(str, launcher), "-m", "ensemble_kd", "distill", *options]


def main(fast: bool = "--fast" in sys.argv) -> None:
    port, options = free_port(), [*OPTIONS, *(FAST if fast else [])]
    commands = [command(machine, 2, "localhost", port, options) for machine in range(2)]
    for number, words in enumerate(commands):
        print(f"machine {number}:", shlex.join(["python", *words[1:]]))
    running = [subprocess.Popen(words) for words in commands]
    if any([process.wait() for process in running]):
        sys.exit(
            "error: a machine gave up\n  why: its own lines above tell\n  fix: mend that; ekd resume goes on"
        )

    print(f"{OUT}: {ensemble_kd.verify(OUT).summary}")


if __name__ == "__main__":
    main()
