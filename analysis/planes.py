"""Planes through three images, and what models say on them: pure functions.

After Somepalli et al. 2022, "Can Neural Nets Learn the Same Model Twice?" (dbViz). A plane lies
in the space of pixels in [0, 1], which all models share; each brings its own preprocessing to it.

Shapes: `P` points along each side of a plane, `M` models, `C` classes. Grids have y along their rows and
x along their columns, both rising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from scipy import ndimage
from torch import Tensor

from ensemble_kd.errors import DataError

BORDER = 0.1
"""How far the box goes beyond its points, as a share of its size, on each side."""
_FLAT = 1e-4  # height of the triangle by its longer side; below it, float32 pixels blur the grid
_TRIES = 100


@dataclass(frozen=True)
class Plane:
    """origin + x · basis[0] + y · basis[1]; distances on it are Euclidean distances between images."""

    origin: Tensor
    """The first image, float64 (C, H, W)."""
    basis: Tensor
    """Two orthonormal images, float64 (2, C, H, W)."""
    corners: np.ndarray
    """The coordinates of the three images, float64 (3, 2): (0, 0), (x, 0) and (x, y) with y > 0."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top: the three points with a border of `BORDER` of their extent."""
        low, high = self.corners.min(axis=0), self.corners.max(axis=0)
        border = BORDER * (high - low)
        (left, bottom), (right, top) = low - border, high + border
        return float(left), float(right), float(bottom), float(top)

    def axes(self, points: int) -> tuple[np.ndarray, np.ndarray]:
        """The coordinates of the grid along x and along y, `points` each, from side to side of the box."""
        left, right, bottom, top = self.box
        return np.linspace(left, right, points), np.linspace(bottom, top, points)

    def images(self, places: Float[np.ndarray, "N 2"]) -> Float[Tensor, "N C H W"]:
        """The images at coordinates (x, y), float32, on the device of the plane.

        Their pixels are not clipped to [0, 1]. dbViz does not clip either; clipping would bend the plane,
        so that distances along it would no longer be those between images.
        """
        coordinates = torch.from_numpy(places).to(self.basis)
        moved = self.origin + torch.tensordot(coordinates, self.basis, dims=1)
        return moved.float()


def grid(xs: Float[np.ndarray, " P"], ys: Float[np.ndarray, " P"]) -> Float[np.ndarray, "P P 2"]:
    """The coordinates (x, y) of all points of a grid."""
    return np.stack(np.meshgrid(xs, ys), axis=2)


def plane_through(images: Float[Tensor, "3 C H W"]) -> Plane | None:
    """The plane through three images with pixels in [0, 1], by Gram–Schmidt; None where they lie on a line."""
    first, second, third = images.double()
    side, other = second - first, third - first
    length = side.norm()
    across = other - (other * side).sum() / length.square() * side
    height = across.norm()
    # Negated, so that NaN from two equal images is caught as well.
    if not bool(height > _FLAT * torch.maximum(length, other.norm())):
        return None
    basis = torch.stack([side / length, across / height])
    corners = torch.stack(
        [(basis * edge).sum(dim=(1, 2, 3)) for edge in (torch.zeros_like(side), side, other)]
    )
    return Plane(first, basis, corners.cpu().numpy())


def triplets(labels: Int[np.ndarray, " N"], seed: int) -> Iterator[np.ndarray]:
    """Positions (3,) of samples of three different classes, drawn without end.

    Three classes are drawn evenly, then one sample of each; nothing is kept from coming twice.
    """
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while True:
        classes = generator.choice(len(members), 3, replace=False)
        yield np.array([generator.choice(members[k]) for k in classes])


def draw_planes(
    labels: Int[np.ndarray, " N"], look: Callable[[np.ndarray], Tensor], count: int, seed: int
) -> Iterator[tuple[np.ndarray, Plane]]:
    """`count` planes through images of three different classes each, with the positions of these.

    Triplets on a line, equal images among them, are drawn anew.

    Args:
        labels: of all samples; of three classes or more.
        look: the images (3, C, H, W) at three positions, pixels in [0, 1].
        count: how many planes.
        seed: of the choice.

    Raises:
        DataError: no plane was found in a hundred triplets one after another.
    """
    found = missed = 0
    for triplet in triplets(labels, seed):
        if found == count:
            return
        plane = plane_through(look(triplet))
        if plane is not None:
            found, missed = found + 1, 0
            yield triplet, plane
            continue
        missed += 1
        if missed == _TRIES:
            raise DataError(
                f"no plane through three images was found in {_TRIES} draws",
                "images of different classes are equal, or lie on a line in the space of pixels",
                "look at the images: ekd data",
            )


def reproducibility(answers: Integer[np.ndarray, "M P P"]) -> Float[np.ndarray, "M M"]:
    """The share of the points where two models say the same (Somepalli et al. 2022), for all pairs."""
    flat = answers.reshape(len(answers), -1)
    return np.stack([(flat == row).mean(axis=1) for row in flat])


def components(answers: Integer[np.ndarray, "P P"]) -> dict[int, int]:
    """How many connected regions each class has that occurs on a plane.

    Points that touch at a corner are connected, as in dbViz: a strip narrower than the grid's step would
    fall to pieces otherwise.
    """
    touching = np.ones((3, 3))
    return {
        int(label): int(ndimage.label(answers == label, structure=touching)[1])
        for label in np.unique(answers)
    }


def margin(
    scores: Float[np.ndarray, "P P C"],
    xs: Float[np.ndarray, " P"],
    ys: Float[np.ndarray, " P"],
    place: Float[np.ndarray, " 2"],
    own: int,
) -> float:
    """The distance along the plane from `place` to where class `own` is no longer the likeliest.

    The boundary is looked for on the lines of the grid: the lead of `own` over the best other class is
    interpolated linearly between neighbours of which one has `own` and one has not. So it is an upper bound
    of the distance to the boundary within the box, close where boundaries are straight over a step.

    Args:
        scores: logits or log-probabilities on the grid; a shift or positive scale of them changes nothing.
        xs: coordinates of the grid's columns.
        ys: coordinates of its rows.
        place: coordinates of an image whose class is `own` to the model.
        own: this class.

    Returns:
        The distance in units of pixels in [0, 1]; infinite where all points of the grid have class `own`.
    """
    wide = scores.astype(np.float64)
    lead = wide[..., own] - np.delete(wide, own, axis=2).max(axis=2)
    within = lead > 0
    if within.all():
        return float("inf")
    points = grid(xs, ys)
    beyond = [points[~within]]  # also these, for an image whose region lies between the lines
    for axis in (0, 1):
        (here, there), (start, end) = _neighbours(lead, axis), _neighbours(points, axis)
        crossed = (here > 0) != (there > 0)
        share = here[crossed] / (here - there)[crossed]
        beyond.append(start[crossed] + share[:, None] * (end - start)[crossed])
    return float(np.linalg.norm(np.concatenate(beyond) - place, axis=1).min())


def _neighbours(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Each point of a grid but the last along an axis, and the one after it."""
    moved = np.moveaxis(values, axis, 0)
    return moved[:-1], moved[1:]
