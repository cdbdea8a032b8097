"""Frozen teachers side by side: stacked logits (K, B, C), and one soft target of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ensemble_kd import distributed
from ensemble_kd.classifier import Classifier
from ensemble_kd.combine import combine
from ensemble_kd.console import progress
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.errors import ModelError
from ensemble_kd.features import FeatureTap, feature_width
from ensemble_kd.inference import EVAL_BATCH, predict, predict_with_features
from ensemble_kd.objective import Target, Viewing
from ensemble_kd.teachers.class_map import ClassMap, map_classes
from ensemble_kd.teachers.layout import Layout, check_finite
from ensemble_kd.teachers.runner import Runner, Running
from ensemble_kd.teachers.store import Store
from ensemble_kd.weighting import call, inputs_of

_ALONE = {"count", "pool", "known", "logits", "temperatures"}
"""What weights may depend on where there is neither a label nor a student."""
_LIBRARIES = ("torch", "timm", "torchvision", "ensemble-kd")
_version = cache(metadata.version)  # reading them takes a while
_DRAW_STREAM = 1000  # of the views' hash, whose first few are the views' own


class Outputs(NamedTuple):
    """What teachers say to images: logits ([K,] N, C), and their penultimate features (N, D_k) if wanted."""

    logits: Tensor
    features: Sequence[Tensor] = ()
    tempered: Tensor | None = None
    """Logits that are right at the teachers' temperatures, where `logits` are at temperature 1 only."""

    def at(self, index: Tensor) -> Outputs:
        """Those of the images at positions `index`."""
        tempered = None if self.tempered is None else self.tempered[..., index, :]
        return Outputs(self.logits[..., index, :], [values[index] for values in self.features], tempered)


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier under a short name, with the hash of its tensors when it was loaded."""

    label: str
    classifier: Classifier
    origin: str
    """Where its weights came from: a path, or the name of published weights."""
    fingerprint: str
    storable: bool = False
    """Whether tensors and card say all about it, so that its outputs can be kept for later runs."""
    class_map: ClassMap | None = None
    """From its classes to those of the data, where they are not the same."""
    running: Running = field(default_factory=Running)
    """How it is run for targets; what networks are measured against is computed in float32, from the original."""
    sharded: bool = False
    """Whether each of several processes holds a part of it (see `sharding`)."""
    _runners: dict[tuple[torch.device, Running], Runner] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        label: str,
        classifier: Classifier,
        origin: str,
        storable: bool = False,
        class_map: ClassMap | None = None,
    ) -> Teacher:
        """Freeze `classifier` as a teacher; leave `storable` out for a module of your own."""
        classifier.freeze()
        return cls(label, classifier, origin, classifier.fingerprint(), storable, class_map)

    def for_data(self, data: Dataset) -> Teacher:
        """Itself, or itself with a class map where its classes are those of `data` in another order.

        Raises:
            ModelError: its classes are others.
        """
        if self.class_map is not None:
            groups = len(self.class_map.groups)
            if groups != len(data.classes):
                raise ModelError(
                    f"the class map of {self.label!r} has {groups} classes, and {data.name} has {len(data.classes)}",
                    "it has one group of the teacher's classes for each class of the data",
                    "make it with class_map.map_classes for this data",
                )
            return self
        mapping = map_classes(self.classifier.classes, data.classes, None, self.label, data.name)
        return replace(self, class_map=mapping)

    def check_unchanged(self) -> str:
        """The hash of its tensors now.

        Raises:
            ModelError: they are not those that were loaded.
        """
        now = self.classifier.fingerprint()
        if now != self.fingerprint:
            raise ModelError(
                f"teacher {self.label!r} changed while it taught",
                "its parameters or buffers have another hash than when it was loaded",
                "a module of your own that writes to its buffers in eval mode cannot be a teacher",
            )
        return now

    @cached_property
    def _tap(self) -> FeatureTap:
        """Made once: finding the last layer takes a forward pass."""
        return FeatureTap(self.classifier, self.label)

    def runner(self, device: torch.device) -> Runner:
        """The network set up for inference on that device; made once."""
        key = (device, self.running)
        if key not in self._runners:
            self._runners[key] = Runner(
                self.classifier,
                self.label,
                device,
                self.running,
                own_code=self.sharded or not self.storable,
                together=self.sharded,
            )
        return self._runners[key]

    def release(self) -> None:
        """Give back the memory of the device; it is taken again when the teacher is run again."""
        self._runners.clear()
        if not self.sharded:
            self.classifier.to("cpu")

    def look(self, batch: Images, features: bool = False) -> Outputs:
        """Its answers to a batch of views, computed now."""
        answers = self.runner(batch.ids.device)(batch.decoded, features)
        return Outputs(
            self.mapped(answers.logits), [answers.features] if answers.features is not None else []
        )

    def all_logits(self, images: Images) -> Tensor:
        """Logits (N, C) of all images, float32, from the store where they are kept.

        Raises:
            ModelError: an output is not finite.
        """
        return self.all_outputs(images).logits

    def all_outputs(self, images: Images, features: bool = False) -> Outputs:
        """`all_logits`, with the penultimate features (N, D) where they are wanted."""
        logits, kept = self._raw(images, features)
        return Outputs(self.mapped(logits), [] if kept is None else [kept])

    def discarded(self, images: Images) -> float:
        """The mean probability that it gives to classes outside its class map; 0 without one."""
        if self.class_map is None:
            return 0.0
        return float(self.class_map.discarded(self._raw(images, False)[0]).mean())

    def mapped(self, logits: Tensor) -> Tensor:
        """Logits of the network itself, brought to the classes of the data."""
        return logits if self.class_map is None else self.class_map.apply(logits)

    def facts(self, images: Images, data: str, viewing: Viewing | None, dtype: torch.dtype) -> dict[str, Any]:
        """All that its outputs for these images depend on; `label` and `data` are for people."""
        plain = viewing is None or viewing.policy == viewing.mix == "none"
        card = self.classifier.card.to_json()
        return {
            "label": self.label,
            "data": data,
            "teacher": self.fingerprint,
            "architecture": f"{card['model']} ({card['form']})",
            "preprocess": card["preprocess"],
            "images": images.digest,
            "policy": "none" if viewing is None else viewing.policy,
            "mix": "none" if viewing is None else viewing.mix,
            "seed": None if plain or viewing is None else viewing.seed,
            "views_version": None if plain else views.VERSION,
            "precision": str(dtype).removeprefix("torch."),
            "folded": self.storable and not self.sharded,
            **{name.replace("-", "_"): _version(name) for name in _LIBRARIES},
        }

    def _raw(self, images: Images, features: bool) -> tuple[Tensor, Tensor | None]:
        """What the network itself says, in its own classes, in float32 and on the device of the images."""
        if not self.storable:
            return self._compute(images, features)
        device = images.ids.device
        width = feature_width(self.classifier, self.label) if features else 0
        layout = Layout(len(images), len(self.classifier.classes), features=width, dtype="float32")
        facts = self.facts(images, "measured split", None, torch.float32) | {"use": "measured"}
        if distributed.size() > 1:
            return self._raw_together(images, features, facts, layout)
        store = Store.open(facts, layout)
        with store.building(1):
            if missing := store.missing(0):
                self._put(store, missing, *self._compute(images, features))
        found = store.rows(0, slice(None), device)
        assert found.logits is not None
        return found.logits, found.features

    def _raw_together(
        self, images: Images, features: bool, facts: dict[str, Any], layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        """Several processes: all compute, and the first looks up before and writes afterwards."""
        store = Store.open(facts, layout) if distributed.first() else None
        computed = None
        if not distributed.told(store is not None and store.views > 0):
            computed = self._compute(images, features)
            if store is not None:
                with store.building(1):
                    self._put(store, store.missing(0), *computed)
            distributed.wait()
        found = (store or Store.open(facts, layout)).rows(0, slice(None), images.ids.device)
        assert found.logits is not None
        return found.logits, found.features

    @staticmethod
    def _put(store: Store, missing: Sequence[range], logits: Tensor, kept: Tensor | None) -> None:
        for rows in missing:
            part = slice(rows.start, rows.stop)
            store.put(0, rows, logits[part], None if kept is None else kept[part])

    def _compute(self, images: Images, features: bool) -> tuple[Tensor, Tensor | None]:
        blocks: list[tuple[Tensor, ...]] = []
        tapped = self._tap if features else nullcontext()
        # Its runner may have turned the weights to channels-last, which other sums, in their last bits, come from.
        if not self.sharded:
            self.classifier.to(images.ids.device).to(memory_format=torch.contiguous_format)
        with progress(f"teacher {self.label}", len(images), "images") as advance, tapped as tap:
            for batch in images.batches(EVAL_BATCH * distributed.size()):
                if tap:
                    blocks.append(predict_with_features(self.classifier, batch, tap))
                else:
                    blocks.append((predict(self.classifier, batch),))
                advance(len(batch))
        logits, *kept = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        check_finite(self.label, logits, *kept)
        return logits, kept[0] if kept else None


@dataclass(frozen=True)
class Ensemble:
    """K teachers with what combines them; weights, temperatures and scales are K numbers each."""

    teachers: Sequence[Teacher]
    weights: Tensor
    """Of the teachers. Where `weigh` gives weights by batch: those used without its inputs."""
    temperatures: Tensor
    pool: str = "prob"
    weigh: Callable[..., Tensor] | None = None
    """Weights by batch or by sample: a function of inputs of `weighting.EACH_BATCH`."""
    scales: Tensor | None = None
    """Temperatures that calibrate the teachers, applied before anything else."""
    after: float = 1.0
    """A temperature that calibrates the pooled target."""
    seed: int = 0
    """Of the draws of weight functions that want any."""
    features: bool = False
    """Whether targets carry the teachers' penultimate features."""

    @cached_property
    def known_mask(self) -> Tensor:
        """Which classes each teacher knows (K, C), on the device of the weights."""
        masks = [
            t.class_map.known if t.class_map else torch.ones(len(t.classifier.classes), dtype=torch.bool)
            for t in self.teachers
        ]
        return torch.stack(masks).to(self.weights.device)

    @cached_property
    def known(self) -> Tensor | None:
        """`known_mask`, or None where all know all."""
        return None if bool(self.known_mask.all()) else self.known_mask

    @property
    def student_temperature(self) -> float:
        """The weighted mean of the teachers' temperatures."""
        return float((self.weights * self.temperatures).sum())

    def all_logits(self, images: Images) -> Tensor:
        """Stacked logits (K, N, C) of all images, one teacher after another.

        Raises:
            ModelError: a teacher's output is not finite.
        """
        return torch.stack([teacher.all_logits(images) for teacher in self.teachers])

    def look(self, batch: Images) -> Outputs:
        """The teachers' answers to a batch of views, computed now."""
        return stacked([teacher.look(batch, self.features) for teacher in self.teachers])

    def release(self) -> None:
        """Give back the memory that the teachers have on the device."""
        for teacher in self.teachers:
            teacher.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def is_fixed(self) -> bool:
        """Whether its targets depend on the teachers' outputs alone, not on labels, a student or an epoch."""
        return self.weigh is None or inputs_of(self.weigh) <= _ALONE

    def calibrated(self, logits: Tensor) -> Tensor:
        """Stacked logits (K, B, C) of the calibrated teachers."""
        return logits if self.scales is None else logits / self.scales[:, None, None]

    def target(
        self,
        logits: Tensor,
        batch: Images | None = None,
        epoch: int = 0,
        student_logits: Tensor | None = None,
        features: Sequence[Tensor] = (),
        tempered: Tensor | None = None,
    ) -> Target:
        """The soft target of stacked logits (K, B, C), tempered and at temperature 1.

        Args:
            logits: as the teachers gave them.
            batch: whose labels and ids weights may depend on; None outside of training, where the
                target is that of `for_measuring`.
            student_logits: (B, C), without a gradient.
            features: carried along.
            tempered: stacked logits for the target at the teachers' temperatures, where these are others.
        """
        z = self.calibrated(logits)
        pooled = partial(combine, pool=self.pool, known=self.known, after=self.after)
        measuring = self.for_measuring()
        plain_weights = measuring._weights(z, None, epoch, None)
        same = batch is None or measuring is self
        weights = plain_weights if same else self._weights(z, batch, epoch, student_logits)
        plain = pooled(z, plain_weights, torch.ones_like(self.temperatures))
        at_temperatures = z if tempered is None else self.calibrated(tempered)
        soft = pooled(at_temperatures, weights, self.temperatures)
        return Target(soft, plain, weights, features)

    def for_measuring(self) -> Ensemble:
        """The ensemble that networks are measured against, which sees neither labels nor a student."""
        return self._measuring

    @cached_property
    def _measuring(self) -> Ensemble:
        return self if self.is_fixed else replace(self, weigh=None)

    def _weights(self, z: Tensor, batch: Images | None, epoch: int, student_logits: Tensor | None) -> Tensor:
        if self.weigh is None:
            return self.weights
        offered: dict[str, Any] = {
            "count": len(z),
            "pool": self.pool,
            "known": self.known_mask,
            "logits": z,
            "temperatures": self.temperatures,
            "student_logits": student_logits,
            "labels": batch.labels if batch else None,
        }
        if batch and "draws" in inputs_of(self.weigh):
            # One hash for all teachers: the number of each in bits that no sample's id has.
            ids = batch.ids + (torch.arange(len(z), device=z.device) << 40)[:, None]
            offered["draws"] = views.uniform(self.seed, epoch, ids.flatten(), _DRAW_STREAM).view(ids.shape)
        return call(self.weigh, offered).to(z)  # a function of the user's may give any type, anywhere


def stacked(outputs: Sequence[Outputs]) -> Outputs:
    """The outputs of several teachers side by side."""
    tempered = [output.tempered for output in outputs if output.tempered is not None]
    return Outputs(
        torch.stack([output.logits for output in outputs]),
        [features for output in outputs for features in output.features],
        torch.stack(tempered) if tempered else None,
    )
