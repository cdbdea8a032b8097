"""The main job from Python: two unlike teachers, one small student, and the question whether it helped.

python examples/quickstart.py [--fast]
"""

from __future__ import annotations

import sys

import ensemble_kd
from ensemble_kd.console import log_to_stderr
from ensemble_kd.tables import metrics_table

FAST = {"epochs": 2, "teacher_epochs": 1, "limit_train": 300}  # a minute less, and worse networks


def main(fast: bool = "--fast" in sys.argv) -> None:
    log_to_stderr()
    run = ensemble_kd.distill(
        teachers=["resnet8", "cifar-quick"],
        student="lenet",
        data="digits",
        temperature=4,
        soft_weight=0.3,
        **(FAST if fast else {}),
    )
    print(metrics_table(run.metrics))

    # The student labels raw images: uint8 (or floats in [0, 1]), any size; it brings its preprocessing.
    student = ensemble_kd.load_student(run.folder)
    images = ensemble_kd.load_data("digits").test.pixels[:5]
    print("the first five test images are", [student.classes[i] for i in student(images).argmax(dim=1)])

    print(ensemble_kd.analyze_agreement(run.folder, quick=fast).table())


if __name__ == "__main__":
    main()
