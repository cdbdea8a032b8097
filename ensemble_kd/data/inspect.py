"""A look at a data source: classes, counts, sizes, a contact sheet, and what is wrong with it."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ensemble_kd import files
from ensemble_kd.data import load_data, scanned
from ensemble_kd.data.copies import copies
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.errors import DataError, Problem

_CELL = 48
_COLUMNS = 12
_ROWS = 20


def inspect_data(
    source: str = "digits", *, sheet: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Describe a source; what is wrong with images in files is listed, not raised.

    Args:
        source: as for `load_data`.
        sheet: where to write a contact sheet (PNG), one row a class; None writes none.
        options: the other arguments of `load_data`.

    Returns:
        `data`, `errors` and `warnings` (texts); where it can be loaded also `classes`, `counts` (by
        split and class), `channels`, `image_size`, `mean`, `std`, `augment`, `sheet`.

    Raises:
        DataError: there is no such source.
    """
    errors: list[Problem] = []
    warnings: list[Problem] = []
    facts: dict[str, Any] = {"data": source}
    folder = scanned(source, options.get("columns"), options.get("offline", False))
    if folder is not None:
        errors, warnings = folder.errors, folder.warnings
        facts["file_sizes"] = {f"{w}×{h}": n for (w, h), n in sorted(folder.shapes.items())}
    if not errors:
        try:
            data = load_data(source, **options)
            facts |= _describe(data, sheet)
            warnings += copies(data) if folder is not None else []
        except DataError as error:
            if folder is None:
                raise
            errors = list(error.problems)
    return facts | {"errors": [str(p) for p in errors], "warnings": [str(p) for p in warnings]}


def _describe(data: Dataset, sheet: str | Path | None) -> dict[str, Any]:
    counts = {
        name: _counts(split, data.classes)
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
    }
    mean, std = data.mean_and_std
    if sheet is not None:
        draw_sheet(data, Path(sheet))
    height, width = data.train.pixels.shape[2:]
    return {
        "classes": list(data.classes),
        "counts": counts,
        "channels": data.channels,
        "image_size": [height, width],
        "mean": mean,
        "std": std,
        "augment": data.augment,
        "sheet": str(sheet) if sheet is not None else None,
    }


def _counts(images: Images, classes: tuple[str, ...]) -> dict[str, int]:
    counted = Counter(images.known_labels.tolist())
    return {name: counted[label] for label, name in enumerate(classes)}


def draw_sheet(data: Dataset, path: Path) -> None:
    """The first training images of each class (of the first 20), one row a class, as a PNG."""
    from torchvision.utils import make_grid

    labels, picked = data.train.known_labels, []
    for label in range(min(_ROWS, len(data.classes))):
        index = (labels == label).nonzero().flatten()[:_COLUMNS]
        row = data.train.pixels[index]
        blank = row.new_full((_COLUMNS - len(index), *row.shape[1:]), 255)
        picked.append(torch.cat([row, blank]))
    cells = torch.nn.functional.interpolate(torch.cat(picked).float(), (_CELL, _CELL), mode="nearest")
    grid = make_grid(cells, nrow=_COLUMNS, padding=2, pad_value=255).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    files.write_bytes(path, buffer.getvalue())
