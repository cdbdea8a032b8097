"""Views against a splitmix64 of plain Python integers and against slices of padded images."""

from __future__ import annotations

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from ensemble_kd.data.hashing import below, hash_streams, uniforms
from ensemble_kd.data.views import (
    MIXES,
    POLICIES,
    VERSION,
    hash_samples,
    mix,
    order,
    partners,
    uniform,
    view,
)

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MANY = torch.arange(20_000)
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 24, 41), (2, 5, 3), (1, 1, 1)]


def splitmix(state: int) -> int:
    """The output function of splitmix64, in unsigned integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def reference_hash(seed: int, view_id: int, sample: int, stream: int) -> int:
    state = sample & MASK
    for part in (seed, view_id, stream):
        state = splitmix((state + GOLDEN) & MASK) ^ (part & MASK)
    return splitmix((state + GOLDEN) & MASK)


def reference_uniform(seed: int, view_id: int, sample: int, stream: int) -> float:
    return (reference_hash(seed, view_id, sample, stream) >> 40) / 2**24


def reference_view(image: np.ndarray, sample: int, policy: str, seed: int, view_id: int) -> np.ndarray:
    height, width = image.shape[1:]
    pad = max(1, min(height, width) // 8)
    top, left = (math.floor(reference_uniform(seed, view_id, sample, s) * (2 * pad + 1)) for s in (0, 1))
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    crop = padded[:, top : top + height, left : left + width]
    mirrored = policy == "crop-flip" and reference_uniform(seed, view_id, sample, 2) < 0.5
    return crop[:, :, ::-1] if mirrored else crop


def pictures(count: int, channels: int = 1, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def test_the_reference_gives_the_published_numbers_of_splitmix64() -> None:
    outputs = [splitmix((1234567 + step * GOLDEN) & MASK) for step in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


SEEDS = [0, 1, -1, 1234567, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 + 5, -(2**63), -(2**70) - 3]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("view_id", "stream"), [(0, 0), (3, 2), (-1, 5), (10**12, -1)])
def test_the_hash_equals_the_reference(seed: int, view_id: int, stream: int) -> None:
    samples = [0, 1, 2, 1796, 10**9, 2**40, -1, 2**63 - 1, -(2**63)]
    ours = [value & MASK for value in hash_samples(seed, view_id, torch.tensor(samples), stream).tolist()]
    assert ours == [reference_hash(seed, view_id, sample, stream) for sample in samples]
    numbers = uniform(seed, view_id, torch.tensor(samples), stream)
    assert numbers.tolist() == [reference_uniform(seed, view_id, sample, stream) for sample in samples]


def test_samples_may_be_numbered_in_any_integer_type() -> None:
    ids = torch.arange(100)
    assert torch.equal(hash_samples(0, 0, ids.int()), hash_samples(0, 0, ids))


@pytest.mark.parametrize(("seed", "view_id", "stream"), [(0, 0, 0), (1, 0, 0), (-5, 7, 2), (2**63, 3, 1)])
def test_uniform_numbers_are_uniform(seed: int, view_id: int, stream: int) -> None:
    numbers = uniform(seed, view_id, MANY, stream).double()
    assert 0 <= float(numbers.min()) < 0.001
    assert 0.999 < float(numbers.max()) < 1
    # Four standard errors: of the mean √(1/12n), of the variance √(1/180n).
    assert float(numbers.mean()) == pytest.approx(1 / 2, abs=4 * math.sqrt(1 / 12 / len(MANY)))
    assert float(numbers.var()) == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / len(MANY)))
    counts = torch.histc(numbers, 50, 0, 1)
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert chi_square < 49 + 4 * math.sqrt(2 * 49)


def test_neighbouring_seeds_views_streams_and_samples_are_unrelated() -> None:
    draws = {
        "first": uniform(0, 0, MANY, 0),
        "seed": uniform(1, 0, MANY, 0),
        "view": uniform(0, 1, MANY, 0),
        "stream": uniform(0, 0, MANY, 1),
        "next sample": uniform(0, 0, MANY + 1, 0),
    }
    bound = 4 / math.sqrt(len(MANY))
    for (a, first), (b, second) in itertools.combinations(draws.items(), 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < bound, (a, b)


@pytest.mark.parametrize("first", [-1, 0, 7])
def test_streams_hashed_together_are_those_hashed_alone(first: int) -> None:
    ids = torch.arange(-3, 50)
    together = hash_streams(-5, 7, ids, first, 4)
    assert torch.equal(together, torch.stack([hash_samples(-5, 7, ids, first + s) for s in range(4)]))
    numbers = uniforms(-5, 7, ids, first, 4)
    assert torch.equal(numbers, torch.stack([uniform(-5, 7, ids, first + s) for s in range(4)]))
    assert torch.equal(ids, torch.arange(-3, 50))  # and the ids are left as they are


@pytest.mark.parametrize("count", [*range(1, 40), 224, 257, 2**20, 2**24 - 1, 2**24])
def test_integers_stay_below_their_count(count: int) -> None:
    numbers = torch.tensor([0, 0.5, 1 - 2**-24])
    assert below(numbers, count).tolist() == [0, count // 2, count - 1]


def test_integers_below_counts_of_their_own() -> None:
    assert below(torch.tensor([0.5, 0.9, 0.999]), torch.tensor([1, 2, 3])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("changed", [{"seed": 1}, {"view_id": 1}])
def test_another_seed_or_view_gives_other_pixels(policy: str, changed: dict[str, int]) -> None:
    images, ids = pictures(100), torch.arange(100)
    options = {"policy": policy, "seed": 0, "view_id": 0}
    differ = (view(images, ids, **options) != view(images, ids, **options | changed)).flatten(1).any(dim=1)
    assert float(differ.float().mean()) > 0.7


def test_policy_none_returns_the_images() -> None:
    images = pictures(3)
    assert view(images, torch.arange(3), policy="none", seed=0, view_id=4) is images


@pytest.mark.parametrize("policy", ["crop", "crop-flip"])
@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (3, 24, 40), (1, 5, 3), (2, 1, 1), (3, 224, 224)],
)
def test_a_view_is_a_slice_of_the_padded_image(policy: str, channels: int, height: int, width: int) -> None:
    count = 30 if height < 200 else 4
    images, ids = pictures(count, channels, height, width), torch.arange(7, 7 + count)
    ours = view(images, ids, policy=policy, seed=-3, view_id=1)
    expected = [
        reference_view(image.numpy(), int(sample), policy, -3, 1)
        for image, sample in zip(images, ids, strict=True)
    ]
    assert ours.dtype == torch.uint8
    np.testing.assert_array_equal(ours, np.stack(expected))


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_layout_does_not_matter(policy: str) -> None:
    images, ids = pictures(40, 3), torch.arange(40)
    options = {"policy": policy, "seed": 0, "view_id": 0}
    for same in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        assert torch.equal(view(same, ids, **options), view(images, ids, **options))


def test_small_images_move_by_one_pixel_in_all_nine_ways() -> None:
    images = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    moved = view(images, torch.arange(2000), policy="crop", seed=0, view_id=0)
    places, counts = moved.flatten(1).argmax(dim=1).unique(return_counts=True)
    assert places.tolist() == [8 * row + column for row in (3, 4, 5) for column in (3, 4, 5)]
    assert float((counts / 2000 - 1 / 9).abs().max()) < 4 * math.sqrt(1 / 9 * 8 / 9 / 2000)


def test_about_half_of_the_images_are_mirrored() -> None:
    images, ids = pictures(2000), torch.arange(2000)
    cropped, flipped = (view(images, ids, policy=p, seed=0, view_id=0) for p in ("crop", "crop-flip"))
    same = (cropped == flipped).flatten(1).all(dim=1)
    mirrored = (cropped.flip(3) == flipped).flatten(1).all(dim=1)
    assert bool((same ^ mirrored).all())
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 2000))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown policy 'flip'; known: none, crop, crop-flip, rrc, trivial$"
    ):
        view(pictures(1), torch.arange(1), policy="flip", seed=0, view_id=0)


def taken(everything: Tensor, rows: Tensor, policy: str, kind: str) -> tuple[Tensor, Tensor]:
    """Views of the images at some rows, mixed with views of their partners, as training makes them."""
    ids = rows + 100
    others = partners(ids, len(everything), seed=5, view_id=2)
    options = {"policy": policy, "seed": 5, "view_id": 2}
    first, second = (view(everything[r], r + 100, **options) for r in (rows, others))
    return mix(first, second, ids, kind=kind, seed=5, view_id=2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MIXES)
def test_pixels_depend_on_nothing_but_seed_view_and_sample(policy: str, kind: str) -> None:
    images = pictures(512, 3, 9, 8)
    before, state = images.clone(), torch.get_rng_state()
    pixels, share = taken(images, torch.arange(512), policy, kind)
    turned = torch.randperm(512, generator=torch.Generator().manual_seed(1))

    def same(rows: Tensor) -> bool:
        own, parts = taken(images, rows, policy, kind)
        return torch.equal(own, pixels[rows]) and torch.equal(parts, share[rows])

    chunks = [turned, *turned.split(64), *turned.split(7)[:10], *turned.split(1)[:10]]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, chunks))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MIXES)
def test_nothing_waits_for_another_device(policy: str, kind: str) -> None:
    """Tensors without values can be neither read nor counted: what they cannot do would wait for a GPU."""
    images, ids = (t.to("meta") for t in (pictures(6, 3), torch.arange(6)))
    seen = view(images, ids, policy=policy, seed=0, view_id=0)
    pixels, share = mix(seen, seen, ids, kind=kind, seed=0, view_id=0)
    assert (pixels.shape, pixels.dtype, share.shape) == (images.shape, torch.uint8, (6,))
    assert partners(ids, 9, seed=0, view_id=0).shape == (6,)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_any_shape_and_no_images(policy: str, shape: tuple[int, int, int]) -> None:
    images, ids = pictures(30, *shape), torch.arange(30)
    assert view(images, ids, policy=policy, seed=0, view_id=0).shape == images.shape
    assert view(images[:0], ids[:0], policy=policy, seed=0, view_id=0).shape == (0, *shape)


DIGESTS = {
    "crop": "c00da548ddc70763",
    "crop-flip": "f8ac5f3adf058cf5",
    "rrc": "d0cedb2c08902741",
    "trivial": "55c72fb2b0cf503b",
    "mixup": "373878d31671b8a5",
    "cutmix": "dc6cfcb15520d78b",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_pixels_are_those_of_this_version(name: str) -> None:
    """Stored outputs of teachers belong to these pixels: where they must change, raise `views.VERSION`."""
    ids, options = torch.arange(600), {"seed": 3, "view_id": 4}
    images = ((torch.arange(600 * 3 * 16 * 12) * 2654435761 >> 11) % 256).to(torch.uint8).view(600, 3, 16, 12)
    if name in POLICIES:
        pixels = view(images, ids, policy=name, **options)
    else:
        pixels, _ = mix(images, images[partners(ids, 600, **options)], ids, kind=name, **options)
    assert (VERSION, hashlib.sha256(pixels.numpy()).hexdigest()[:16]) == (1, DIGESTS[name])


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**64) - 1])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_an_order_is_a_permutation(seed: int, count: int) -> None:
    first = order(seed, 3, count)
    assert torch.equal(first.sort().values, torch.arange(count))
    torch.manual_seed(99)
    assert torch.equal(order(seed, 3, count), first)


def test_orders_differ_by_epoch_and_seed() -> None:
    orders = [order(seed, epoch, 5000) for seed in (0, 1) for epoch in (0, 1)]
    for first, second in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(5000)
    assert abs(np.corrcoef(orders[0], np.arange(5000))[0, 1]) < 4 / math.sqrt(5000)
