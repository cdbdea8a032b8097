"""Two features and three spirals, so that what models say everywhere fits on a page.

    python examples/toy_surface.py [--fast]

Three unlike teachers, a student that learns from the three combined, and the same network on labels
alone. Written to toy_surface.png: how each divides the plane.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.inspection import DecisionBoundaryDisplay
from torch import Tensor, nn

from ensemble_kd.combine import combine
from ensemble_kd.losses import distillation_loss

TEMPERATURE = 2.0
CLASSES = 3
COLOURS = ListedColormap(["#0173b2", "#de8f05", "#029e73"])


def spirals(each: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 2) of three spirals around each other, and their classes (N,)."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), each)
    radius = generator.uniform(0.1, 1, len(labels))
    angle = 4 * radius + labels * 2 * np.pi / CLASSES + generator.normal(0, noise, len(labels))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), labels


class Waves(nn.Module):
    """Fixed random waves of the two features: a network on them bends its boundaries smoothly."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("directions", 3 * torch.randn(2, count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.directions)


def networks() -> dict[str, nn.Sequential]:
    """The teachers, each of another kind."""
    return {
        "teacher relu": nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)
        ),
        "teacher tanh": nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, CLASSES)
        ),
        "teacher waves": nn.Sequential(Waves(64), nn.Linear(64, CLASSES)),
    }


def small() -> nn.Sequential:
    """The student: the same weights each time it is called."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def train(
    net: nn.Module, x: Tensor, y: Tensor, steps: int, *, moved: float = 0, ensemble: nn.Module | None = None
) -> nn.Module:
    """All points in every step, on labels or, where there is one, mostly on what an ensemble says.

    The points are moved at random by about `moved`: the same views for student and control.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        view = x + moved * torch.randn(x.shape, generator=generator)
        log_target = None if ensemble is None else ensemble(view)
        soft_weight = 0.0 if ensemble is None else 0.9
        loss = distillation_loss(net(view), y, log_target, soft_weight=soft_weight, temperature=TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


class Ensemble(nn.Module):
    """The teachers combined as one model: log-probabilities of their mean at a temperature."""

    def __init__(self, teachers: list[nn.Module], temperature: float = 1.0) -> None:
        super().__init__()
        self.teachers, self.temperature = nn.ModuleList(teachers), temperature

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([teacher(x) for teacher in self.teachers])
        count = len(self.teachers)
        return combine(logits, torch.full((count,), 1 / count), torch.full((count,), self.temperature))


class Adapter(ClassifierMixin, BaseEstimator):
    """A network as scikit-learn sees a fitted classifier."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.classes_ = np.arange(CLASSES)

    def fit(self, x: np.ndarray, y: np.ndarray) -> Adapter:
        return self  # trained already

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.net(torch.as_tensor(x, dtype=torch.float32)).argmax(dim=1).numpy()


def draw(models: dict[str, nn.Module], points: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Draw how each model divides the plane into toy_surface.png; what each says on the grid, by name."""
    figure = Figure(figsize=(3 * len(models), 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    answers = {}
    for axis, (name, net) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        display = DecisionBoundaryDisplay.from_estimator(
            Adapter(net), points, response_method="predict", plot_method="pcolormesh",
            grid_resolution=150, eps=0.2, alpha=0.5, ax=axis,
        )  # fmt: skip
        answers[name] = display.response
        display.surface_.set_cmap(COLOURS)  # scikit-learn's own way to name colours changed with its versions
        axis.scatter(*points.T, c=labels, cmap=COLOURS, s=8, edgecolor="black", linewidth=0.3)
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig("toy_surface.png", dpi=100)
    return answers


def main(fast: bool = "--fast" in sys.argv) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)  # networks this small would only wait for each other
    steps = 100 if fast else 300
    torch.manual_seed(0)
    points, labels = spirals(40, 0.25, seed=0)
    x, y = torch.as_tensor(points, dtype=torch.float32), torch.as_tensor(labels)
    teachers = {name: train(net, x, y, steps) for name, net in networks().items()}
    together = list(teachers.values())
    models = {
        **teachers,
        "ensemble": Ensemble(together),
        "student": train(small(), x, y, steps, moved=0.2, ensemble=Ensemble(together, TEMPERATURE)),
        "control on labels": train(small(), x, y, steps, moved=0.2),
    }
    answers = draw(models, points, labels)
    alike = {
        name: {other: float((answers[name] == answers[other]).mean()) for other in [*teachers, "ensemble"]}
        for name in ("student", "control on labels")
    }
    for name, shares in alike.items():
        told = ", ".join(f"{other} {100 * share:.1f} %" for other, share in shares.items())
        print(f"{name} says the same on the grid as {told}")
    return alike


if __name__ == "__main__":
    main()
