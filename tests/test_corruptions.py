"""Corrupted images: the same pixels in any batch and order, and what each kind is meant to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision.transforms.v2.functional import adjust_contrast, gaussian_blur

from ensemble_kd.analysis.corruptions import STRENGTHS, UNITS, corrupt, corrupted
from ensemble_kd.data.dataset import Dataset, Images

KINDS = list(STRENGTHS)


def pictures(count: int = 9, channels: int = 3, height: int = 12, width: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy images and ids that are no positions."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(count) * 7 + 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", range(3))
def test_the_same_bits_in_any_batch_and_order(kind: str, step: int) -> None:
    pixels, ids = pictures()
    strength = STRENGTHS[kind][step]
    whole = corrupt(pixels, ids, kind, strength, seed=3)
    alone = torch.cat(
        [corrupt(pixels[i : i + 1], ids[i : i + 1], kind, strength, seed=3) for i in range(len(ids))]
    )
    order = torch.tensor([4, 0, 8, 2, 2, 7])
    assert torch.equal(whole, alone)
    assert torch.equal(whole[order], corrupt(pixels[order], ids[order], kind, strength, seed=3))
    assert whole.dtype == torch.uint8
    assert whole.shape == pixels.shape


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_leaves_images_as_they_are_and_more_is_worse(kind: str) -> None:
    pixels, ids = pictures()
    assert torch.equal(corrupt(pixels, ids, kind, 0.0, seed=0), pixels)
    assert torch.equal(corrupt(pixels, ids, kind, 1e-9, seed=0), pixels)
    damage = [
        float((corrupt(pixels, ids, kind, strength, seed=0).double() - pixels.double()).abs().mean())
        for strength in STRENGTHS[kind]
    ]
    assert 0 < damage[0] < damage[1] < damage[2]


@pytest.mark.parametrize("kind", KINDS)
def test_only_noise_depends_on_seed_and_id(kind: str) -> None:
    pixels, ids = pictures()
    first, second, other = (
        corrupt(pixels, ids + move, kind, STRENGTHS[kind][1], seed=seed)
        for seed, move in ((0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(first, second) == torch.equal(first, other) == (kind != "noise")


def test_noise_is_normal_with_the_deviation_that_it_says() -> None:
    grey = torch.full((400, 1, 8, 8), 128, dtype=torch.uint8)
    noise = (corrupt(grey, torch.arange(400), "noise", 0.1, seed=0).double() - 128).numpy() / 255
    assert noise.mean() == pytest.approx(0, abs=4 * 0.1 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(0.1, rel=0.02)
    assert stats.kurtosis(noise, axis=None) == pytest.approx(0, abs=0.15)
    flat = noise.reshape(400, -1)
    assert np.abs(np.corrcoef(flat[:, 0], flat[:, 1])[0, 1]) < 0.2  # neighbouring pixels
    assert np.abs(np.corrcoef(flat[:-1].ravel(), flat[1:].ravel())[0, 1]) < 0.03  # neighbouring images


def test_noise_has_the_same_pattern_at_each_strength() -> None:
    grey, ids = torch.full((5, 1, 16, 16), 128, dtype=torch.uint8), torch.arange(5)
    weak, strong = (corrupt(grey, ids, "noise", s, seed=0).double() - 128 for s in (0.05, 0.1))
    assert torch.corrcoef(torch.stack([weak.flatten(), strong.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize("strength", STRENGTHS["blur"])
def test_blur_is_scipys_and_torchvisions(strength: float) -> None:
    pixels, ids = pictures(height=24, width=32)
    sigma = strength * 24
    found = corrupt(pixels, ids, "blur", strength, seed=0)
    deviations = (0, 0, sigma, sigma)
    reference = gaussian_filter(pixels.double().numpy(), deviations, mode="mirror").round()
    np.testing.assert_array_equal(found.numpy(), reference)
    size = 2 * int(4 * sigma + 0.5) + 1
    if size < 2 * 24:  # torchvision mirrors once only
        theirs = gaussian_blur(pixels, [size, size], [sigma, sigma])
        assert int((found.int() - theirs.int()).abs().max()) <= 1


def test_blur_is_a_share_of_the_size() -> None:
    small, ids = pictures(height=8, width=8)
    large = small.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    kept = [
        float(corrupt(images, ids, "blur", 0.12, seed=0).double().std() / images.double().std())
        for images in (small, large)
    ]
    assert kept[0] == pytest.approx(kept[1], abs=0.06)
    assert kept[0] < 0.5


def test_contrast_is_torchvisions_on_grey_images() -> None:
    pixels, ids = pictures(channels=1)
    theirs = adjust_contrast(pixels, 0.25)
    assert int((corrupt(pixels, ids, "contrast", 0.75, seed=0).int() - theirs.int()).abs().max()) <= 1


def test_brightness_is_added_and_cut_off_at_white() -> None:
    pixels, ids = pictures()
    expected = (pixels.double() + 255 * 0.4).round().clamp(max=255).to(torch.uint8)
    assert torch.equal(corrupt(pixels, ids, "brightness", 0.4, seed=0), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (1, 2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_shape_are_taken(kind: str, shape: tuple[int, int, int]) -> None:
    pixels = torch.arange(2 * shape[0] * shape[1] * shape[2], dtype=torch.uint8).view(2, *shape)
    assert corrupt(pixels, torch.arange(2), kind, STRENGTHS[kind][2], seed=0).shape == pixels.shape
    assert len(corrupt(pixels[:0], torch.arange(0), kind, 0.5, seed=0)) == 0


def test_a_split_is_corrupted_as_its_batches_are(few_digits: Dataset) -> None:
    test = few_digits.test
    made = corrupted(test, "noise", 0.2, 5)
    assert isinstance(made, Images)
    assert torch.equal(made.decoded, corrupt(test.decoded, test.ids, "noise", 0.2, seed=5))
    assert torch.equal(made.known_labels, test.known_labels)
    assert torch.equal(made.ids, test.ids)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown corruption 'fog'; known: noise, blur, contrast, brightness"
    ):
        corrupt(*pictures(), "fog", 0.5, seed=0)
    assert list(UNITS) == KINDS
