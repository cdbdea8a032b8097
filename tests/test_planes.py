"""Planes through three images against plain numpy with loops, and against boundaries that are known."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from support import refused
from torch import Tensor

from ensemble_kd.analysis.planes import (
    Plane,
    components,
    draw_planes,
    grid,
    margin,
    plane_through,
    reproducibility,
    triplets,
)
from ensemble_kd.errors import DataError

SHAPES = [(1, 8, 8), (3, 5, 7), (3, 32, 32), (1, 1, 2)]


def images(shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> Tensor:
    """Three images of whole grey levels, in [0, 1]."""
    levels = np.random.default_rng(seed).integers(0, 256, (3, *shape))
    return torch.from_numpy(levels).double() / 255


def through(shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> Plane:
    plane = plane_through(images(shape, seed))
    assert plane is not None
    return plane


def dot(x: np.ndarray, y: np.ndarray) -> float:
    return sum(float(p) * float(q) for p, q in zip(x, y, strict=True))


def plain_gram_schmidt(three: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Basis (2, D) and coordinates (3, 2), number by number."""
    a, b, c = three.reshape(3, -1)
    u = (b - a) / dot(b - a, b - a) ** 0.5
    rest = (c - a) - dot(c - a, u) * u
    v = rest / dot(rest, rest) ** 0.5
    return np.stack([u, v]), np.array([[0, 0], [dot(b - a, u), 0], [dot(c - a, u), dot(c - a, v)]])


# The plane


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_basis_and_coordinates_are_those_of_gram_schmidt(shape: tuple[int, ...], seed: int) -> None:
    plane = through(shape, seed)
    basis, corners = plain_gram_schmidt(images(shape, seed).numpy())
    np.testing.assert_allclose(plane.basis.reshape(2, -1).numpy(), basis, atol=1e-12)
    np.testing.assert_allclose(plane.corners, corners, atol=1e-12)
    flat = plane.basis.reshape(2, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_three_images_come_back_at_their_coordinates(shape: tuple[int, ...]) -> None:
    three = images(shape, seed=1)
    found = through(shape, seed=1).images(through(shape, seed=1).corners)
    assert found.dtype == torch.float32
    assert float((found - three).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_three_images_come_back_exactly_after_rounding(shape: tuple[int, ...]) -> None:
    for seed in range(5):
        pixels = torch.randint(
            256, (3, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
        )
        plane = plane_through(pixels.double() / 255)
        assert plane is not None
        assert torch.equal((255 * plane.images(plane.corners)).round().to(torch.uint8), pixels)


def test_distances_on_the_plane_are_those_between_images() -> None:
    plane, places = through(seed=2), np.random.default_rng(0).normal(size=(6, 2)) * 3
    pixels = plane.images(places).double().reshape(6, -1)
    expected = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.testing.assert_allclose(torch.cdist(pixels, pixels), expected, atol=1e-5)


def test_images_at_coordinates_equal_a_loop_and_are_not_clipped() -> None:
    plane = through((3, 4, 4))
    xs, ys = plane.axes(5)
    places = grid(xs, ys)
    found = plane.images(places.reshape(-1, 2)).reshape(5, 5, 3, 4, 4)
    origin, (u, v) = plane.origin.numpy(), plane.basis.numpy()
    for row in range(5):
        for column in range(5):
            assert tuple(places[row, column]) == (xs[column], ys[row])
            expected = origin + xs[column] * u + ys[row] * v
            np.testing.assert_allclose(found[row, column], expected, atol=1e-6)
    assert float(found.min()) < 0
    assert float(found.max()) > 1


def test_the_box_goes_a_tenth_of_its_points_size_beyond_them() -> None:
    corners = np.array([[0, 0], [10, 0], [-2, 5]], dtype=float)
    plane = Plane(torch.zeros(1, 1, 1), torch.zeros(2, 1, 1, 1), corners)
    assert plane.box == pytest.approx((-3.2, 11.2, -0.5, 5.5))
    xs, ys = plane.axes(4)
    np.testing.assert_allclose(xs, [-3.2, 1.6, 6.4, 11.2])
    np.testing.assert_allclose(ys, [-0.5, 1.5, 3.5, 5.5])


@pytest.mark.parametrize("weights", [(0, 0), (0, 1), (1, 0), (1, 1), (0.25, 0.75), (-1, 2)])
def test_images_on_a_line_have_no_plane(weights: tuple[float, float]) -> None:
    """Each of the three is the first plus a multiple of one difference; equal images among them."""
    base, other, _ = images()
    three = torch.stack([base, *(base + weight * (other - base) for weight in weights)])
    assert plane_through(three) is None


def test_a_flat_triangle_is_one_as_long_as_floats_can_tell_its_images_apart() -> None:
    base, other, third = images()
    for height, flat in ((1e-2, False), (1e-6, True)):
        assert (plane_through(torch.stack([base, other, base + height * (third - base)])) is None) is flat


# The choice of images

LABELS = np.repeat(np.arange(6), [1, 2, 30, 5, 5, 7])


def test_triplets_are_of_three_different_classes() -> None:
    found = list(islice(triplets(LABELS, seed=0), 600))
    assert all(len(set(LABELS[triplet])) == 3 for triplet in found)
    counts = np.bincount(LABELS[np.concatenate(found)], minlength=6) / 1800
    assert counts.min() > 0.12  # classes are drawn evenly, however many samples they have
    assert {int(i) for triplet in found for i in triplet} == set(range(50))


def test_the_seed_fixes_the_triplets_and_more_of_them_begin_alike() -> None:
    first, again, other = (np.stack(list(islice(triplets(LABELS, seed), 20))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    pool = torch.from_numpy(np.random.default_rng(0).random((50, 1, 3, 3)))
    few, many = (
        [triplet.tolist() for triplet, _ in draw_planes(LABELS, lambda t: pool[t], count, seed=0)]
        for count in (3, 7)
    )
    assert few == many[:3] == first[:3].tolist()
    assert len(many) == 7


def test_triplets_without_a_plane_are_drawn_anew() -> None:
    """Classes 0 and 1 show the same image: no plane may hold both."""
    labels = np.arange(4)
    pool = torch.from_numpy(np.random.default_rng(0).random((4, 1, 3, 3)))
    pool[1] = pool[0]
    drawn = [set(triplet.tolist()) for triplet in islice(triplets(labels, seed=0), 40)]
    assert any({0, 1} <= triplet for triplet in drawn)
    kept = [set(triplet.tolist()) for triplet, _ in draw_planes(labels, lambda t: pool[t], 10, seed=0)]
    assert kept == [triplet for triplet in drawn if not {0, 1} <= triplet][:10]


def test_images_that_are_all_equal_are_refused() -> None:
    pool = torch.ones(6, 1, 2, 2)
    with refused(
        DataError,
        "no plane through three images was found in 100 draws",
        "images of different classes are equal, or lie on a line in the space of pixels",
        "look at the images: ekd data",
    ):
        list(draw_planes(np.arange(6) % 3, lambda triplet: pool[triplet], 1, seed=0))


# What models say on it


def flood(answers: np.ndarray) -> dict[int, int]:
    """Regions by class: filled one after another, from each point to its eight neighbours."""
    left = {(r, c) for r in range(answers.shape[0]) for c in range(answers.shape[1])}
    counts: dict[int, int] = {}
    while left:
        start = left.pop()
        label, stack = int(answers[start]), [start]
        counts[label] = counts.get(label, 0) + 1
        while stack:
            r, c = stack.pop()
            for near in [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if near in left and answers[near] == label:
                    left.remove(near)
                    stack.append(near)
    return counts


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("points", [2, 7, 20])
def test_regions_are_those_of_a_flood(points: int, classes: int) -> None:
    answers = np.random.default_rng(classes).integers(classes, size=(points, points))
    assert components(answers) == flood(answers)


def test_regions_that_are_known() -> None:
    rings = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    assert components(rings) == {0: 2, 1: 1}
    assert components(np.eye(4, dtype=int)) == {0: 1, 1: 1}  # points that touch at a corner belong together
    assert components(np.full((3, 3), 7)) == {7: 1}


@pytest.mark.parametrize("classes", [2, 10])
def test_reproducibility_is_the_share_of_equal_answers(classes: int) -> None:
    answers = np.random.default_rng(0).integers(classes, size=(4, 9, 9))
    answers[3] = answers[0]
    found = reproducibility(answers)
    for i in range(4):
        for j in range(4):
            same = sum(answers[i, r, c] == answers[j, r, c] for r in range(9) for c in range(9))
            assert found[i, j] == pytest.approx(same / 81, abs=1e-12)
    assert found[0, 3] == 1
    assert (np.diag(found) == 1).all()
    assert abs(found[0, 1] - 1 / classes) < 0.2  # chance


AXES = np.linspace(-1, 5, 13), np.linspace(-2, 2, 13)


def plain_margin(scores: np.ndarray, place: np.ndarray, own: int) -> float:
    """The nearest of all points on the lines of the grid where the lead of `own` is nothing."""
    xs, ys = AXES

    def lead(r: int, c: int) -> float:
        return scores[r, c, own] - max(z for k, z in enumerate(scores[r, c]) if k != own)

    best = np.inf
    for r in range(len(ys)):
        for c in range(len(xs)):
            here = lead(r, c)
            if here <= 0:
                best = min(best, np.hypot(xs[c] - place[0], ys[r] - place[1]))
            for r2, c2 in ((r + 1, c), (r, c + 1)):
                if r2 < len(ys) and c2 < len(xs) and (here > 0) != (lead(r2, c2) > 0):
                    t = here / (here - lead(r2, c2))
                    x, y = xs[c] + t * (xs[c2] - xs[c]), ys[r] + t * (ys[r2] - ys[r])
                    best = min(best, np.hypot(x - place[0], y - place[1]))
    return float(best)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_the_margin_equals_a_loop(classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(13, 13, classes)).astype(np.float32)
    for own in range(2):
        place = generator.uniform((-1, -2), (5, 2))
        expected = plain_margin(scores.astype(float), place, own)
        assert margin(scores, *AXES, place, own) == pytest.approx(expected, abs=1e-12)


def linear(normal: tuple[float, float], offset: float) -> np.ndarray:
    """Scores of two classes, the first of which is likelier where normal · x > offset."""
    lead = grid(*AXES) @ np.array(normal) - offset
    return np.stack([lead, -lead], axis=2)


@pytest.mark.parametrize("place", [(3.3, 0.2), (2.0, -1.1), (4.9, 1.9)])
def test_the_margin_to_a_straight_boundary_is_found_to_less_than_a_step(place: tuple[float, float]) -> None:
    checked = 0
    for degrees in range(-60, 61, 15):
        normal = (np.cos(np.radians(degrees)), np.sin(np.radians(degrees)))
        true = float(np.dot(normal, place)) - 1.0
        foot = np.array(place) - true * np.array(normal)
        if true > 0 and (np.abs(foot - (2, 0)) < (3, 2)).all():
            # The foot lies in a cell, through whose sides the boundary goes.
            found = margin(linear(normal, 1.0), *AXES, np.array(place), 0)
            assert true - 1e-9 <= found <= np.hypot(true, np.hypot(1 / 2, 1 / 3))
            checked += 1
    assert checked >= 4


def test_the_margin_on_a_line_of_the_grid_is_exact() -> None:
    assert margin(linear((1, 0), 1.23), *AXES, np.array([3.0, 1 / 3]), 0) == pytest.approx(1.77, abs=1e-12)
    assert margin(linear((1, 0), 1.23), *AXES, np.array([0.2, 1 / 3]), 1) == pytest.approx(1.03, abs=1e-12)


def test_a_shift_or_a_positive_scale_of_scores_changes_no_margin() -> None:
    generator = np.random.default_rng(0)
    scores, place = generator.normal(size=(13, 13, 4)), np.array([2.0, 0.3])
    expected = margin(scores, *AXES, place, 1)
    shifts = generator.normal(size=(13, 13, 1))
    for changed in (scores + 3, scores + shifts, 7 * scores, 0.01 * scores - 5):
        assert margin(changed, *AXES, place, 1) == pytest.approx(expected, abs=1e-9)


def test_a_class_that_is_everywhere_has_no_boundary() -> None:
    assert margin(linear((0, 0), -1.0), *AXES, np.array([0.0, 0.0]), 0) == np.inf


def test_a_region_between_the_lines_has_a_boundary_nearer_than_a_step() -> None:
    """The model gives the image class 1, and all points of the grid class 0."""
    found = margin(linear((0, 0), -1.0), *AXES, np.array([0.2, 0.1]), 1)
    assert found == pytest.approx(np.hypot(0.2, 0.1), abs=1e-12)
