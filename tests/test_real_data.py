"""Real data, where it is at hand: Debian's Fashion-MNIST, and CIFAR-10 as JPEG files in an archive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ensemble_kd

FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR = Path(os.environ.get("EKD_TEST_CIFAR10_JPEG", "/nowhere"))


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_read_and_learned(tmp_path):
    data = ensemble_kd.load_data("fashion-mnist", root=FASHION)
    assert [len(split) for split in (data.train, data.val, data.test)] == [54_000, 6_000, 10_000]
    assert data.test.known_labels.bincount().tolist() == [1000] * 10
    run = ensemble_kd.distill(
        "lenet", "lenet", data="fashion-mnist", data_root=FASHION, limit_train=1500, epochs=2,
        teacher_epochs=1, augment="none", controls="none", out=tmp_path / "run",
    )  # fmt: skip
    assert run.metrics["models"]["student"]["accuracy"]["value"] > 0.6


@pytest.mark.skipif(not CIFAR.is_file(), reason="EKD_TEST_CIFAR10_JPEG names no archive")
def test_cifar10_jpeg_is_read_from_its_archive(own_cache):
    data = ensemble_kd.load_data(f"imagefolder:{CIFAR}")
    assert [len(split) for split in (data.train, data.val, data.test)] == [45_000, 5_000, 10_000]
    assert data.classes == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    assert (data.channels, data.image_size) == (3, 32)
