"""What teachers are worth before anything is distilled: each alone, together, and without each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.analysis.diversity import mutual_information, pair_diversity
from ensemble_kd.analysis.intervals import interval
from ensemble_kd.analysis.plots import draw_heat_maps
from ensemble_kd.calibration import fit_temperature
from ensemble_kd.config import resolve
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Images
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ConfigError, together
from ensemble_kd.metrics import Measure, bootstrap_mean, correct, measure, within
from ensemble_kd.models import parse
from ensemble_kd.runs import RUNS
from ensemble_kd.schema import TeachersOptions
from ensemble_kd.setting import adapt, combination_of, teacher_checks, teacher_of
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.combination import Combination, best_alone, rehearse, set_up
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.weighting import COMBINERS, inputs_of, uniform_weights

FOLDS = 5
_SHARE = (100, 2, " %")


@dataclass(frozen=True)
class TeacherAnalysis:
    """The teachers on the validation split; `numbers` is what teachers.json holds."""

    folder: Path
    numbers: dict[str, Any]

    def table(self) -> str:
        """The teachers, the combiners, the pairs, and what to do."""
        numbers = self.numbers
        title = f"{numbers['data']}, validation split, {numbers['n']:,} images; 95 % intervals over images"
        parts = [_teacher_table(numbers, title), _combiner_table(numbers)]
        if numbers["pairs"]:
            parts.append(_pair_table(numbers))
        oracle, best = numbers["oracle_accuracy"], numbers["best"]
        parts.append(
            f"At least one teacher is right on {interval(oracle, *_SHARE)} of the images; "
            f"the best alone, {best}, on {interval(numbers['teachers'][best]['accuracy'], *_SHARE)}.\n{numbers['advice']}"
        )
        return "\n\n".join(parts)


def analyze_teachers(
    teachers: str | Sequence[str | Teacher] | None = None,
    *,
    combine: str | Callable[..., Tensor] | None = None,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> TeacherAnalysis:
    """Judge teachers on the validation split, alone and combined; nothing is distilled.

    What is fitted there (learned, greedy and best weights, temperatures of `calibrate`) is fitted on
    four fifths and judged on the fifth that is left, in turn. Stored outputs are read where they exist.

    Args:
        teachers: names (see `models.parse`), or `Teacher` objects; those not in the library are trained.
        combine: a combiner of your own to judge beside the others: a function, or `py:FILE.py:function`.
        config_file: YAML with any of the options.
        sets: assignments such as `"pool=logit"`.
        options: the other fields of `schema.TeachersOptions`.

    Returns:
        The numbers, each mean with its interval: `teachers` (accuracy, nll, ece; `temperature` and what
        it makes of nll and ece; `without`, what the mean of all loses without this one), `combiners`
        (accuracy, nll, and their gain over the best single teacher), `pairs` (diversity),
        `oracle_accuracy`, `mutual_information`, `best` and `advice`. teachers.json and teachers.png are
        written to `out`, or to a new folder in runs/.

    Raises:
        EkdError: teachers or data cannot be used.
    """
    listed = [teachers] if isinstance(teachers, str) else teachers
    objects = {t.label: t for t in listed or () if isinstance(t, Teacher)}
    given = {**options, "combine": None if callable(combine) else combine}
    if listed is not None:
        given["teachers"] = [t.label if isinstance(t, Teacher) else t for t in listed]
    file = Path(config_file) if config_file else None
    chosen = resolve(TeachersOptions, given, file=file, sets=sets)
    found, val, data, how = _load(chosen, objects, combine if callable(combine) else None)
    numbers = {"data": data, "split": "val", "n": len(val), "pool": how.pool, "calibrate": how.calibrate}
    numbers |= _Judge(found, val, how, chosen.seed, chosen.resamples).numbers()
    folder = chosen.out or RUNS / f"teachers-{datetime.now():%Y%m%d-%H%M%S}"
    files.write_json(folder / "teachers.json", numbers)
    if len(found) > 1:
        _draw(numbers, folder / "teachers.png")
    return TeacherAnalysis(folder, numbers)


def _load(
    options: TeachersOptions, objects: dict[str, Teacher], function: Callable[..., Tensor] | None
) -> tuple[list[Teacher], Images, str, Combination]:
    if options.combine in COMBINERS and options.combine != "fixed":
        raise ConfigError(
            f"combine: {options.combine} is judged in any case",
            "all combiners of the table are",
            "leave it out, or name a function of yours: py:FILE.py:function",
        )
    texts = [text for text in options.teachers if text not in objects]
    *parsed, how, device, data = together(
        *(partial(parse, text) for text in texts),
        partial(combination_of, options, function),
        partial(choose_device, options.device),
        partial(load_data, **options.load_arguments()),
    )
    adapted, *_ = together(partial(adapt, objects, options, data), *teacher_checks(options, parsed, data))
    rehearse(how, torch.ones(len(options.teachers), len(data.classes), dtype=torch.bool))
    data = data.to(device)
    by_text = {name.text: teacher_of(name, options, data, options.teacher_seed, device) for name in parsed}
    found = [by_text[text] if text in by_text else adapted[text] for text in options.teachers]
    for teacher in found:
        teacher.classifier.to(device)
    return found, data.val, data.name, how


@dataclass
class _Judge:
    """The teachers' logits on the validation split, and everything that is told from them."""

    teachers: Sequence[Teacher]
    val: Images
    how: Combination
    seed: int
    resamples: int

    def __post_init__(self) -> None:
        self.labels = self.val.known_labels
        self.logits = torch.stack([teacher.all_logits(self.val) for teacher in self.teachers])
        self.names = [teacher.label for teacher in self.teachers]
        weights, ones = torch.zeros(len(self.teachers)).to(self.labels.device), torch.ones(len(self.teachers))
        ensemble = Ensemble(self.teachers, weights, ones)
        self.known = ensemble.known_mask
        self.best = int(best_alone(ensemble, self.logits, self.labels).weights.argmax())

    def numbers(self) -> dict[str, Any]:
        """See `analyze_teachers`."""
        right = (self.logits.argmax(dim=2) == self.labels).cpu()
        without = self._without()
        rows = {name: {**self._alone(k), "without": without.get(name)} for k, name in enumerate(self.names)}
        return {
            "best": self.names[self.best],
            "teachers": rows,
            "combiners": self._combiners(),
            "pairs": self._pairs(right.numpy()),
            "oracle_accuracy": self._mean(right.any(dim=0).double()),
            "mutual_information": mutual_information(self.logits.cpu().numpy())
            if bool(self.known.all())
            else None,
            "advice": advice(without),
        }

    def _mean(self, values: Tensor, confidence: float = 0.95) -> Measure:
        return bootstrap_mean(values, resamples=self.resamples, seed=self.seed, confidence=confidence)

    def _alone(self, k: int) -> dict[str, Any]:
        """One teacher, among the classes that it knows."""
        mask = self.known[k]
        logits, labels = within(mask, self.logits[k], self.labels)
        temperature = fit_temperature(logits, labels)
        measured = partial(measure, labels=labels, resamples=self.resamples, seed=self.seed)
        part = {} if bool(mask.all()) else {"classes": int(mask.sum()), "images": len(labels)}
        raw, fitted = measured(logits), measured(logits / temperature)
        return {
            **part,
            **raw,
            "temperature": temperature,
            "calibrated_nll": fitted["nll"],
            "calibrated_ece": fitted["ece"],
        }

    def _cross_fitted(self, how: Combination, members: Sequence[int]) -> Tensor:
        """Log-probabilities (N, C) of an ensemble that was fitted without the sample it is asked about."""
        teachers = [self.teachers[k] for k in members]
        logits, answers = self.logits[list(members)], torch.zeros_like(self.logits[0])
        folds = KFold(min(FOLDS, len(self.val)), shuffle=True, random_state=self.seed)
        for kept, held in folds.split(np.arange(len(self.val))):
            fit, ask = (torch.from_numpy(index).to(self.labels.device) for index in (kept, held))
            ones = torch.ones(len(teachers))
            ensemble = set_up(teachers, ones, how, logits[:, fit], self.labels[fit], seed=self.seed)
            answers[ask] = ensemble.target(logits[:, ask]).plain
        return answers

    def _terms(self, log_p: Tensor) -> dict[str, Tensor]:
        """Each sample's correctness and NLL."""
        nll = -log_p.double().gather(1, self.labels[:, None]).squeeze(1)
        return {"accuracy": correct(log_p, self.labels).double().cpu(), "nll": nll.cpu()}

    def _combiners(self) -> dict[str, Any]:
        alone = replace(self.how, name="mean", weigh=uniform_weights)
        best = self._terms(self._cross_fitted(alone, [self.best]))
        tried = dict(COMBINERS) | {self.how.name: self.how.weigh}
        return {name: self._combiner(name, weigh, best) for name, weigh in tried.items()}

    def _combiner(self, name: str, weigh: Callable[..., Tensor], best: dict[str, Tensor]) -> dict[str, Any]:
        needs = inputs_of(weigh)
        if "given" in needs and not self.how.given:
            return {"left_out": "no weights are given"}
        if "labels" in needs:
            return {"left_out": "it sees the labels by which it would be judged"}
        if needs & {"student_logits", "draws"}:
            return {"left_out": "it depends on a student in training"}
        try:
            answers = self._cross_fitted(replace(self.how, name=name, weigh=weigh), range(len(self.teachers)))
        except ConfigError as error:
            return {"left_out": error.problems[0].why}
        terms = self._terms(answers)
        gains = {
            "accuracy_gain": terms["accuracy"] - best["accuracy"],
            "nll_gain": best["nll"] - terms["nll"],
        }
        return {key: self._mean(values) for key, values in (terms | gains).items()}

    def _without(self) -> dict[str, dict[str, Measure]]:
        """What the mean of all teachers loses without each; intervals at 95 % for all of them together."""
        count = len(self.teachers)
        if count < 2:
            return {}
        mean = replace(self.how, name="mean", weigh=uniform_weights)
        everyone = self._terms(self._cross_fitted(mean, range(count)))
        confidence = 1 - 0.05 / count
        losses = {}
        for k, name in enumerate(self.names):
            try:
                rest = self._terms(self._cross_fitted(mean, [j for j in range(count) if j != k]))
            except ConfigError:
                continue  # the others do not know all classes
            losses[name] = {
                "accuracy": self._mean(everyone["accuracy"] - rest["accuracy"], confidence),
                "nll": self._mean(rest["nll"] - everyone["nll"], confidence),
            }
        return losses

    def _pairs(self, right: np.ndarray) -> list[dict[str, Any]]:
        pairs = []
        for i, j in combinations(range(len(self.teachers)), 2):
            rows = (self.known[i] & self.known[j])[self.labels].cpu().numpy()
            if rows.any():
                measures = pair_diversity(right[i][rows], right[j][rows])
                pairs.append({"first": self.names[i], "second": self.names[j], **measures})
        return pairs


def advice(without: dict[str, dict[str, Measure]]) -> str:
    """In one sentence, which teacher to leave out, if any: one without which the others do clearly better.

    Args:
        without: by teacher, how much the mean of all loses in `nll` without it, with an interval.
    """
    if not without:
        return "There is nothing to leave out."
    lost = {name: losses["nll"] for name, losses in without.items()}
    clear = {name: loss for name, loss in lost.items() if loss["high"] < 0}
    name, loss = min((clear or lost).items(), key=lambda item: item[1]["value"])
    if clear:
        return (
            f"Drop {name}: without it the mean of the others has a validation NLL lower by "
            f"{-loss['value']:.4f} (interval {-loss['high']:.4f} … {-loss['low']:.4f}, "
            f"95 % for all {len(without)} teachers together)."
        )
    return (
        f"Keep all: leaving out none of them clearly lowers the validation NLL of their mean (closest is "
        f"{name}: without it the NLL changes by {interval(loss, sign='+')}, 95 % for all {len(without)} together)."
    )


def _teacher_table(numbers: dict[str, Any], title: str) -> str:
    headers = ["", "accuracy", "NLL", "ECE", "temperature", "NLL there", "ECE there", "NLL lost without it"]
    rows = []
    for name, row in numbers["teachers"].items():
        among = f" (of {row['classes']} classes)" if "classes" in row else ""
        lost = row["without"] and row["without"]["nll"]
        rows.append(
            [
                name + among,
                interval(row["accuracy"], *_SHARE),
                f"{row['nll']['value']:.4f}",
                f"{row['ece']['value']:.4f}",
                f"{row['temperature']:.2f}",
                f"{row['calibrated_nll']['value']:.4f}",
                f"{row['calibrated_ece']['value']:.4f}",
                interval(lost, sign="+") if lost else "–",
            ]
        )
    return text_table(headers, rows, title)


def _combiner_table(numbers: dict[str, Any]) -> str:
    headers = ["combiner", "accuracy", "NLL", f"points over {numbers['best']}", "NLL below it"]
    rows = []
    for name, row in numbers["combiners"].items():
        if "left_out" in row:
            rows.append([f"{name}: {row['left_out']}", "–", "–", "–", "–"])
            continue
        points, nll = row["accuracy_gain"], row["nll_gain"]
        rows.append(
            [
                name,
                f"{100 * row['accuracy']['value']:.2f} %",
                f"{row['nll']['value']:.4f}",
                interval(points, 100, 2, sign="+"),
                interval(nll, sign="+"),
            ]
        )
    pool = f"pool {numbers['pool']}, calibrated: {numbers['calibrate']}"
    return text_table(
        headers, rows, f"Together ({pool}); fitted weights judged on images they were not fitted on"
    )


def _pair_table(numbers: dict[str, Any]) -> str:
    headers = ["pair", "one right, one wrong", "both wrong", "Q", "error consistency"]
    rows = [
        [
            f"{pair['first']} – {pair['second']}",
            f"{100 * pair['disagreement']:.1f} %",
            f"{100 * pair['double_fault']:.1f} %",
            f"{pair['q']:.3f}",
            f"{pair['error_consistency']:.3f}",
        ]
        for pair in numbers["pairs"]
    ]
    return text_table(headers, rows, "Diversity")


def _draw(numbers: dict[str, Any], path: Path) -> None:
    names = list(numbers["teachers"])
    titles = {
        "disagreement": "one right, one wrong",
        "double_fault": "both wrong",
        "error_consistency": "error consistency",
    }
    matrices = {}
    for key, title in titles.items():
        square = np.full((len(names), len(names)), np.nan)
        for pair in numbers["pairs"]:
            i, j = names.index(pair["first"]), names.index(pair["second"])
            square[i, j] = square[j, i] = pair[key]
        matrices[title] = square
    draw_heat_maps(matrices, names, path)
