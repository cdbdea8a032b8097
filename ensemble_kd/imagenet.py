"""The class names of ImageNet and its larger relatives, from timm's own tables."""

from __future__ import annotations

from collections import Counter
from functools import cache


@cache
def class_names(count: int) -> tuple[str, ...] | None:
    """The names of a published network with `count` outputs, in their order; None for other counts.

    WordNet's lemmas, such as `tench, Tinca tinca`; where two classes share them, with the synset's id.
    """
    table = _table(count)
    if table is None:
        return None
    described = Counter(description for _, description in table)
    return tuple(
        description if described[description] == 1 else f"{description} ({synset})"
        for synset, description in table
    )


@cache
def aliases(names: tuple[str, ...]) -> dict[str, list[int]]:
    """Other names of the classes, in lower case: each lemma, and the synset's id; none for other classes."""
    table = _table(len(names))
    if table is None or names != class_names(len(names)):
        return {}
    found: dict[str, list[int]] = {}
    for output, (synset, description) in enumerate(table):
        for name in {synset, description, *description.split(", ")}:
            found.setdefault(name.lower(), []).append(output)
    return found


def _table(count: int) -> list[tuple[str, str]] | None:
    """(synset, lemmas) of each output."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [(name, info.label_name_to_description(name)) for name in info.label_names()]
