"""Which teachers, weighed how? Judge them first, then distil with learned weights and with your own.

python examples/combine_teachers.py [--fast]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import ensemble_kd
from ensemble_kd.console import log_to_stderr
from ensemble_kd.tables import metrics_table

TEACHERS = ["resnet8", "cifar-quick", "lenet"]
FAST = {"teacher_epochs": 1, "limit_train": 300}


def sharpest(logits: Tensor) -> Tensor:
    """Weights (K, B) by how likely each teacher finds its own answer; logits are (K, B, C)."""
    confidence = torch.softmax(logits, dim=2).amax(dim=2)
    return confidence / confidence.sum(dim=0)


def main(fast: bool = "--fast" in sys.argv) -> None:
    log_to_stderr()
    options = FAST if fast else {}
    print(ensemble_kd.analyze_teachers(TEACHERS, combine=sharpest, **options).table())
    epochs = {"epochs": 2} if fast else {}
    for combine in ("learned", sharpest):
        run = ensemble_kd.distill(
            TEACHERS, "lenet", combine=combine, calibrate="teachers", **options, **epochs
        )
        print(metrics_table(run.metrics))


if __name__ == "__main__":
    main()
