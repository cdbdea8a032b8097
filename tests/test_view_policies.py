"""Resized crops, TrivialAugment and mixtures against torchvision, image by image, and against plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from scipy import stats
from test_views import MANY, MASK, SHAPES, pictures, reference_hash, reference_uniform, reference_view
from torch import Tensor

from ensemble_kd.data import trivial
from ensemble_kd.data.crops import boxes
from ensemble_kd.data.views import mix, partners, view

OPERATIONS = tuple(trivial.OPERATIONS)
COLOUR_OR_GREY = [*SHAPES[:3], (1, 1, 1), (3, 2, 7)]
LEVELS = range(-30, 31, 3)


# Resized crops


def reference_box(height: int, width: int, sample: int, seed: int, view_id: int) -> tuple[int, ...]:
    mirror, area, ratio, top, left = (
        np.float32(reference_uniform(seed, view_id, sample, s)) for s in range(2, 7)
    )
    pixels = (area * np.float32(0.92) + np.float32(0.08)) * np.float32(height * width)
    step = math.floor(ratio * 1024)
    ratio = np.float32((4 / 3) ** (2 * step / 1023 - 1))
    tall = min(max(round(float(np.sqrt(pixels / ratio))), 1), height)
    wide = min(max(round(float(np.sqrt(pixels * ratio))), 1), width)
    return (
        math.floor(top * (height - tall + 1)),
        tall,
        math.floor(left * (width - wide + 1)),
        wide,
        mirror < 0.5,
    )


@pytest.mark.parametrize("shape", [*SHAPES, (3, 224, 224), (1, 100, 30)])
def test_a_resized_crop_is_torchvisions_within_one_grey_level(shape: tuple[int, int, int]) -> None:
    images, ids = pictures(40 if shape[1] < 200 else 3, *shape), torch.arange(50, 90)
    seen = view(images, ids[: len(images)], policy="rrc", seed=-3, view_id=4).int()
    for image, sample, own in zip(images, ids.tolist(), seen, strict=False):
        top, tall, left, wide, mirrored = reference_box(*shape[1:], sample, -3, 4)
        expected = image.flip(2) if mirrored else image
        left = shape[2] - left - wide if mirrored else left
        box = top, left, tall, wide, list(shape[1:])
        assert int((own - tv.resized_crop(expected, *box).int()).abs().max()) <= 1
        exact = tv.resized_crop(expected.double(), *box, antialias=False)
        assert float((own - exact).abs().max()) < 0.5 + 1 / 8


def test_boxes_are_those_of_szegedy() -> None:
    top, tall, left, wide, mirrored = boxes(2000, 2000, MANY, 0, 0)
    area, ratio = (tall * wide / 2000**2).numpy(), (wide / tall).numpy()
    assert area.min() == pytest.approx(0.08, abs=1e-3)
    assert area.max() <= 1
    small = area[area < 0.7]  # these are never clipped
    assert len(small) / len(MANY) == pytest.approx(0.62 / 0.92, abs=4 * math.sqrt(0.22 / len(MANY)))
    assert stats.kstest(small, stats.uniform(0.08, 0.62).cdf).pvalue > 1e-3
    assert 0.749 < ratio.min() < ratio.max() < 1.335
    spread = 2 * math.log(4 / 3)
    logs = np.log(ratio[area < 0.7])
    assert stats.kstest(logs, stats.uniform(-spread / 2, spread).cdf).pvalue > 1e-3
    room = ((2000 - tall) > 100).numpy()
    assert stats.kstest((top / (2001 - tall)).numpy()[room], "uniform").pvalue > 1e-3
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / len(MANY)))
    for start, length in ((top, tall), (left, wide)):
        assert int(start.min()) >= 0
        assert int((start + length).max()) <= 2000


def test_a_resized_crop_takes_nothing_from_outside_its_box() -> None:
    """Images that are black where their own box does not reach stay free of it."""
    ids = torch.arange(200)
    top, tall, left, wide, _ = boxes(16, 16, ids, 1, 0)
    places = torch.arange(16)
    rows = (places >= top[:, None]) & (places < (top + tall)[:, None])
    columns = (places >= left[:, None]) & (places < (left + wide)[:, None])
    images = (rows[:, None, :, None] & columns[:, None, None]).to(torch.uint8) * 200
    assert bool((view(images, ids, policy="rrc", seed=1, view_id=0) == 200).all())


# TrivialAugment


def theirs(name: str, image: Tensor, level: int) -> Tensor:
    """torchvision's operation at a level of its TrivialAugmentWide; translations as shares of the side."""
    height, width = image.shape[1:]
    strength, degrees = level / 30, math.degrees(math.atan(0.99 * level / 30))
    factor = 1 + 0.99 * strength

    def affine(translate: list[int], shear: list[float], center: list[float] | None = None) -> Tensor:
        return tv.affine(image, 0, translate, 1, shear, center=center)

    functions: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: image,
        "shear-x": lambda: affine([0, 0], [degrees, 0], [0, 0]),
        "shear-y": lambda: affine([0, 0], [0, degrees], [0, 0]),
        "translate-x": lambda: affine([int(width * level / 30), 0], [0, 0]),
        "translate-y": lambda: affine([0, int(height * level / 30)], [0, 0]),
        "rotate": lambda: tv.rotate(image, 135 * strength),
        "brightness": lambda: tv.adjust_brightness(image, factor),
        "colour": lambda: tv.adjust_saturation(image, factor),
        "contrast": lambda: tv.adjust_contrast(image, factor),
        "sharpness": lambda: tv.adjust_sharpness(image, factor),
        "posterize": lambda: tv.posterize(image, 8 - round(abs(level) / 5)),
        "solarize": lambda: tv.solarize(image, 255 * (30 - abs(level)) / 30),
        "autocontrast": lambda: tv.autocontrast(image),
        "equalize": lambda: tv.equalize(image),
    }
    return functions[name]()


def at_every_level(name: str, image: Tensor) -> tuple[Tensor, Tensor]:
    """Ours and torchvision's at `LEVELS`."""
    return ours(name, image, LEVELS), torch.stack([theirs(name, image, level) for level in LEVELS]).int()


def ours(name: str, image: Tensor, levels: Sequence[int]) -> Tensor:
    operation = torch.full((len(levels),), OPERATIONS.index(name))
    images = image.expand(len(levels), -1, -1, -1)
    return trivial.apply(images, operation, torch.tensor(levels)).int()


def contrasts(shape: tuple[int, int, int]) -> list[Tensor]:
    """Random images over all grey levels, over few, and of one."""
    wide = pictures(1, *shape)[0]
    return [wide, wide // 4 + 60, torch.full_like(wide, 77)]


ROUNDED = ("brightness", "colour", "contrast", "sharpness", "autocontrast")
EXACT = ("identity", "translate-x", "translate-y", "posterize", "solarize", "equalize")


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", COLOUR_OR_GREY)
def test_these_operations_are_torchvisions_exactly(name: str, shape: tuple[int, int, int]) -> None:
    for image in contrasts(shape):
        own, expected = at_every_level(name, image)
        assert torch.equal(own, expected)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("shape", COLOUR_OR_GREY)
def test_these_operations_are_torchvisions_within_one_grey_level(
    name: str, shape: tuple[int, int, int]
) -> None:
    for image in contrasts(shape):
        own, expected = at_every_level(name, image)
        assert int((own - expected).abs().max()) <= 1


@pytest.mark.parametrize("name", ["shear-x", "shear-y", "rotate"])
@pytest.mark.parametrize("shape", [*COLOUR_OR_GREY, (1, 28, 28)])
def test_affine_operations_take_torchvisions_pixel_or_one_as_near(
    name: str, shape: tuple[int, int, int]
) -> None:
    """An image that tells places by grey level: where both differ, the place lay half-way, as seen by a nudge."""
    height, width = shape[1:]
    image = torch.arange(height * width).mul(255).div(height * width, rounding_mode="floor")
    image = image.to(torch.uint8).view(1, height, width).expand(shape[0], -1, -1).contiguous()
    own, expected = at_every_level(name, image)
    differ = (own != expected).any(dim=1)
    assert float(differ.float().mean()) < 0.03
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    for level, wrong in zip(LEVELS, differ.numpy(), strict=True):
        places = reference_places(name, level / 30, x, y, height, width)
        half_way = np.any([np.abs(p - np.round(p)) < 2e-3 for p in places], axis=0)
        assert not (wrong & ~half_way).any()


def reference_places(
    name: str, strength: float, x: np.ndarray, y: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel comes from, from the image's corner; whole numbers lie half-way between two pixels."""
    if name == "shear-x":
        return x + 0.99 * strength * y, y
    if name == "shear-y":
        return x, y + 0.99 * strength * x
    angle, x, y = math.radians(135 * strength), x - width / 2, y - height / 2
    return (
        math.cos(angle) * x - math.sin(angle) * y + width / 2,
        math.sin(angle) * x + math.cos(angle) * y + height / 2,
    )


def test_quarter_turns_are_exact() -> None:
    image = pictures(1, 3, 12, 12)[0]
    left, right = ours("rotate", image, (20, -20))
    assert torch.equal(left, image.rot90(1, (1, 2)).int())
    assert torch.equal(right, image.rot90(-1, (1, 2)).int())


def test_grey_values_are_exact() -> None:
    values = torch.arange(256, dtype=torch.int32)
    red, green, blue = (v.flatten() for v in torch.meshgrid(values, values, values[::15], indexing="ij"))
    grey = trivial._grey(torch.stack([red, green, blue])[None, :, None])
    exact = (red.long() * 2989 + green.long() * 5870 + blue.long() * 1140) // 10_000
    assert torch.equal(grey.flatten().long(), exact)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_trivial_is_a_flipped_crop_and_then_one_operation(shape: tuple[int, int, int]) -> None:
    images, ids = pictures(150, *shape), torch.arange(1000, 1150)
    views = view(images, ids, policy="trivial", seed=7, view_id=3).int()
    names = set()
    for image, sample, own in zip(images.numpy(), ids.tolist(), views, strict=True):
        draws = [reference_uniform(7, 3, sample, stream) for stream in (7, 8, 9)]
        name, level = OPERATIONS[math.floor(draws[0] * 14)], math.floor(draws[1] * 31)
        level = level if draws[2] < 0.5 else -level
        cropped = torch.from_numpy(reference_view(image, sample, "crop-flip", 7, 3).copy())
        difference = (own - theirs(name, cropped, level).int()).abs()
        assert int(difference.max()) <= (name in ROUNDED) or float((difference > 0).float().mean()) < 0.01, (
            name
        )
        names.add(name)
    assert names == set(OPERATIONS)


def test_operations_levels_and_directions_are_uniform() -> None:
    operation, level = trivial.choices(MANY, 3, 1)
    table = np.zeros((14, 31))
    np.add.at(table, (operation.numpy(), level.abs().numpy()), 1)
    for counts in (table.sum(1), table.sum(0)):
        assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.chi2_contingency(table).pvalue > 1e-3
    signed = level[level != 0]
    assert float((signed > 0).float().mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / len(signed)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12), (2, 5, 5)])
def test_all_stages_for_all_images_give_the_same_pixels(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, against what a CPU does."""
    images, ids = pictures(500, *shape), torch.arange(500)
    options = {"policy": "trivial", "seed": 0, "view_id": 0}
    few = view(images, ids, **options)
    monkeypatch.setattr(trivial, "_where_needed", trivial._everywhere)
    assert torch.equal(view(images, ids, **options), few)


# Mixtures


def shares(kind: str, shape: tuple[int, int, int] = (1, 8, 8), count: int = 3000) -> tuple[Tensor, Tensor]:
    """Black images mixed with white ones."""
    black = torch.zeros(count, *shape, dtype=torch.uint8)
    return mix(black, ~black, torch.arange(count), kind=kind, seed=2, view_id=1)


def test_mixup_is_the_weighted_mean_rounded() -> None:
    images, ids = pictures(300, 3), torch.arange(300)
    pixels, share = mix(images, images.flip(0), ids, kind="mixup", seed=-9, view_id=8)
    expected = [math.floor(reference_uniform(-9, 8, sample, 11) * 257) / 256 for sample in range(300)]
    assert share.tolist() == expected
    weight = share.double()[:, None, None, None]
    exact = weight * images.double() + (1 - weight) * images.flip(0).double()
    assert torch.equal(pixels, (exact + 0.5).floor().to(torch.uint8))


def test_mixups_share_is_uniform_and_reaches_both_ends() -> None:
    images = pictures(4, 3)
    few, ids = images[torch.arange(20_000) % 4], MANY
    pixels, share = mix(few, few.flip(0), ids, kind="mixup", seed=2, view_id=1)
    counts = (share * 256).long().bincount(minlength=257).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3
    assert torch.equal(pixels[share == 1], few[share == 1])
    assert torch.equal(pixels[share == 0], few.flip(0)[share == 0])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 24, 41), (1, 1, 1), (1, 224, 224)])
def test_cutmix_pastes_a_box_and_its_share_is_exact(shape: tuple[int, int, int]) -> None:
    count, (height, width) = 40 if shape[1] > 100 else 400, shape[1:]
    pixels, share = shares("cutmix", shape, count)
    for sample, (image, part) in enumerate(zip(pixels.numpy(), share.tolist(), strict=True)):
        lam, y, x = (np.float32(reference_uniform(2, 1, sample, s)) for s in (11, 12, 13))
        side = np.sqrt(np.float32(1) - lam)
        expected = np.zeros(shape[1:], np.uint8)
        row, column = math.floor(y * np.float32(height)), math.floor(x * np.float32(width))
        tall, wide = (round(float(side * np.float32(size))) for size in (height, width))
        row, column = row - tall // 2, column - wide // 2
        expected[max(row, 0) : row + tall, max(column, 0) : column + wide] = 255
        np.testing.assert_array_equal(image, np.broadcast_to(expected, shape))
        assert part == float(np.float32((expected == 0).sum() / expected.size))


def test_cutmix_takes_either_images_pixels() -> None:
    images, ids = pictures(300, 3), torch.arange(300)
    others = images.flip(0)
    pixels, _ = mix(images, others, ids, kind="cutmix", seed=0, view_id=0)
    assert bool(((pixels == images) | (pixels == others)).all())


def test_boxes_of_cutmix_lie_anywhere_and_have_every_size() -> None:
    pixels, share = shares("cutmix", (1, 16, 16))
    # Of a box around a uniform place, clipped at the edges: E[share] by the sum over all places and areas.
    sides = [round(math.sqrt(1 - (k + 0.5) / 4096) * 16) for k in range(4096)]
    length = [np.mean([min(c - s // 2 + s, 16) - max(c - s // 2, 0) for c in range(16)]) for s in sides]
    mean = 1 - np.mean(np.square(length)) / 256
    assert float(share.mean()) == pytest.approx(mean, abs=4 * float(share.std()) / math.sqrt(3000))
    assert float(share.min()) < 0.1
    assert float(share.max()) == 1
    centre = (pixels == 255).float().mean(dim=(0, 1))
    assert float((centre - centre.flip(0)).abs().max()) < 0.05
    assert float((centre - centre.mT).abs().max()) < 0.05


def test_mix_none_returns_the_images() -> None:
    images = pictures(3)
    pixels, share = mix(images, images.flip(0), torch.arange(3), kind="none", seed=0, view_id=0)
    assert pixels is images
    assert share.tolist() == [1, 1, 1]


def test_an_unknown_mix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^unknown mix 'blend'; known: none, mixup, cutmix$"):
        mix(pictures(1), pictures(1), torch.arange(1), kind="blend", seed=0, view_id=0)


@pytest.mark.parametrize("count", [1, 7, 50_000, 2**40])
def test_partners_come_from_the_hash(count: int) -> None:
    ids = torch.arange(-20, 200)
    found = partners(ids, count, seed=3, view_id=2)
    assert found.dtype == torch.int64
    half = MASK >> 1
    assert found.tolist() == [(reference_hash(3, 2, sample, 10) & half) % count for sample in ids.tolist()]


def test_partners_are_uniform() -> None:
    counts = partners(MANY, 50, seed=0, view_id=0).bincount(minlength=50).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3


def test_there_must_be_partners() -> None:
    with pytest.raises(ValueError, match=r"^no partners among 0 images$"):
        partners(torch.arange(1), 0, seed=0, view_id=0)
