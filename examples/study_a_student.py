"""What does the temperature change, and what did one of the students take over? A study, then analyses.

    python examples/study_a_student.py [--fast]

Writes runs/temperatures: each point and seed is a normal run, which every verb can read.
"""

from __future__ import annotations

import sys

import ensemble_kd
from ensemble_kd.console import log_to_stderr

FAST = {"seeds": 2, "epochs": 2, "teacher_epochs": 1, "limit_train": 300}


def main(fast: bool = "--fast" in sys.argv) -> None:
    log_to_stderr()
    study = ensemble_kd.study(
        over={"temperature": [1, 4]},
        teachers=["resnet8", "cifar-quick"],
        student="lenet",
        data="digits",
        out="runs/temperatures",
        **(FAST if fast else {}),
    )
    print(study.table())

    run = study.folder / "points" / "temperature=4" / "seed-0"
    print(ensemble_kd.analyze_agreement(run, quick=fast).table())
    print(ensemble_kd.analyze_calibration(run, quick=fast).table())
    print("page and pictures:", study.page, *sorted((run / "analysis").glob("*.png")), sep="\n  ")


if __name__ == "__main__":
    main()
