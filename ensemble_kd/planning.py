"""What a verb would do, for how long, and how much disk and memory it would take; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ensemble_kd import config, recipes, trackers
from ensemble_kd.classifier import Classifier
from ensemble_kd.data import FOLDER, load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.device import choose_device, free_memory, peak_memory
from ensemble_kd.errors import ConfigError, EkdError, Problem, nearest, together
from ensemble_kd.features import feature_width
from ensemble_kd.files import cache_dir, free_at, sha256_file
from ensemble_kd.fresh import new_classifier
from ensemble_kd.judges import OTHER_SEEDS
from ensemble_kd.loop import Engine
from ensemble_kd.models import ModelName, parse
from ensemble_kd.objective import Viewing
from ensemble_kd.planned import METHOD, Network, Plan, Targets, most, rows_of, seconds_of
from ensemble_kd.resuming import stopped
from ensemble_kd.runs import RUNS, Run
from ensemble_kd.schema import DataOptions, DistillOptions, TrainOptions
from ensemble_kd.setting import Objects, Setting, asked_of, engine_of, prepare, running_of, teacher_of
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers.building import Keeping, facts_of
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.registry import can_be_trained, look_up
from ensemble_kd.teachers.store import key_of, read_kept, targets_dir
from ensemble_kd.teachers.targets import HELD_BYTES
from ensemble_kd.timing import seconds_a_step, seconds_a_view, seconds_an_image
from ensemble_kd.training import check_options

_ROW_BYTES, _REST_BYTES = 700, 150_000
"""Of an epoch in history.jsonl, and of all else in a run folder: curves, metrics, configuration, log."""
_VERBS = ("distill", "train", "targets build", "resume")


def plan(
    verb: str = "distill",
    *,
    folder: str | Path | None = None,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Plan:
    """Try everything that `verb` tries beforehand, take a few steps with its networks, and tell what it would do.

    Nothing is downloaded, unpacked, kept or written.

    Args:
        verb: `distill`, `train`, `targets build`, or `resume` with the `folder` of a stopped run.
        config_file: YAML with any of the options.
        sets: assignments such as `"training.weight_decay=0.01"`.
        options: those of the verb.

    Returns:
        The plan. Its `facts` have `networks` (a row each, teachers first), `targets`, `seconds` by part and of
        `all`, `disk` and `memory` with `needed` and `free` bytes, whether these are `enough`, and the `method`.

    Raises:
        EkdError: what the verb itself would refuse, and what is not on this machine yet.
    """
    if verb not in _VERBS:
        raise ConfigError(
            f"there is no plan of {verb!r}", f"known are {', '.join(_VERBS)}", nearest(verb, _VERBS)
        )
    file, run = Path(config_file) if config_file else None, None
    model: type[TrainOptions] | type[DistillOptions] = TrainOptions if verb == "train" else DistillOptions
    if verb == "resume":
        run = stopped(folder or "")
        model, file = (
            (TrainOptions if run.status()["verb"] == "train" else DistillOptions),
            run.path("config.yaml"),
        )
    chosen = config.resolve(model, options, file=file, sets=sets)
    with _nothing_fetched(chosen):
        offline = chosen.model_copy(update={"offline": True})
        if isinstance(offline, TrainOptions):
            found, device = _train(offline, run)
        else:
            found, device = _distill(offline, run, stores_only=verb == "targets build")
    room = _room(found, run.folder if run else chosen.out or RUNS, device)
    return Plan({"verb": verb, **found, **room, "method": METHOD})


@contextmanager
def _nothing_fetched(options: DataOptions) -> Iterator[None]:
    """Refuse what would be unpacked; what would be downloaded is refused in the words of a dry run."""
    path = Path(options.data.removeprefix(FOLDER)).expanduser()
    if options.data.startswith(FOLDER) and path.is_file():
        unpacked = cache_dir() / "archives" / sha256_file(path)[:16]
        if not unpacked.exists():
            fix = f"unpack it first: ekd data {options.data}"
            raise ConfigError(f"{path} is not unpacked yet", "a dry run writes nothing", fix)
    try:
        yield
    except EkdError as error:
        if options.offline:
            raise
        raise type(error)([_reworded(problem) for problem in error.problems]) from error


def _reworded(problem: Problem) -> Problem:
    why = problem.why.replace("--offline forbids to download", "a dry run does not download")
    return Problem(problem.what, why, problem.fix.replace("--offline", "--dry-run"))


@dataclass(frozen=True)
class _Seat:
    """A teacher, its recipe where it would be trained, and the seconds of a step and of an image."""

    teacher: Teacher
    recipe: Recipe | None
    step: float
    image: float

    def row(self, data: Dataset, seed: str = "") -> Network:
        classifier = self.teacher.classifier
        model, size = classifier.card.model, classifier.parameter_count
        name = f"teacher {self.teacher.label}{seed}"
        if self.recipe is None:
            return Network(name, model, size, "at hand", bytes=classifier.byte_count)
        return _to_train(
            name, classifier, self.recipe, len(data.train), self.step, self.image * len(data.val)
        )


def _to_train(
    name: str,
    network: Classifier,
    recipe: Recipe,
    images: int,
    step: float,
    judging: float,
    left: float = 1.0,
) -> Network:
    """A network with what its training takes; `judging` are the seconds after each epoch, `left` a share."""
    steps = recipe.epochs * max(1, images // min(recipe.batch_size, images))
    seconds = left * (steps * step + recipe.epochs * judging)
    model, parameters = network.card.model, network.parameter_count
    return Network(
        name, model, parameters, "to train", recipe.epochs, round(left * steps), seconds, network.byte_count
    )


def _distill(
    options: DistillOptions, run: Run | None, stores_only: bool
) -> tuple[dict[str, Any], torch.device]:
    _, (setting, names) = together(
        lambda: trackers.check(options.track), lambda: prepare(options, Objects({}))
    )
    data, viewing = setting.data, setting.viewing
    seats = [_seat(name, setting, options.teacher_seed) for name in names if name is not None]
    targets, live = _targets(seats, setting)
    others: list[_Seat] = []
    if "independent" in options.controls and not stores_only:
        seeds = [(name, options.teacher_seed if name.seed is None else name.seed) for name in names if name]
        others = [
            _seat(replace(name, seed=seed + OTHER_SEEDS), setting, seed, alike)
            for (name, seed), alike in zip(seeds, seats, strict=True)
        ]
        targets = targets + _targets(others, setting)[0]
    teachers = [seat.row(data) for seat in seats] + [seat.row(data, ", another seed") for seat in others]
    networks, image = ([], 0.0) if stores_only else _students(setting, run, live)
    measured = len(data.test) + len(data.val)
    passes = [seat.image for seat in [*seats, *others]]
    test = sum(passes) * measured + len(networks) * image * len(data.test)
    logits = 4 * len(data.classes)
    told = (len(networks) + len(seats) + 1) * logits * len(data.test)
    facts = {
        **_of_data(data, setting.device, len(setting.transfer)),
        "policy": viewing.policy,
        "mix": viewing.mix,
        "networks": rows_of([*teachers, *networks]),
        "targets": asdict(targets),
        "seconds": seconds_of(teachers, targets.seconds, networks, test),
        "run_bytes": _run_bytes(networks, told),
        "run_peak_bytes": _run_bytes(networks, told) + most(networks),
        "cache_bytes": sum(row.new_bytes for row in teachers)
        + targets.missing_bytes
        + len(passes) * logits * measured,
        "cache_passing_bytes": most(teachers),
    }
    return facts, setting.device


def _of_data(data: Dataset, device: torch.device, transfer: int | None = None) -> dict[str, Any]:
    images = {split: len(getattr(data, split)) for split in ("train", "val", "test")}
    if transfer is not None and transfer != images["train"]:
        images["transfer"] = transfer
    return {"data": data.name, "images": images, "device": str(device)}


def _seat(name: ModelName, setting: Setting, seed: int, alike: _Seat | None = None) -> _Seat:
    """The teacher, timed, where it is not known from one `alike`."""
    options, data = setting.options, setting.data
    if can_be_trained(name, options.class_map.get(name.label)) and options.train_teachers:
        found, recipe = look_up(name, data, device=setting.device, **asked_of(name, options, seed))
    else:
        found, recipe = teacher_of(name, options, data, seed, setting.device), None
    teacher = replace(found, running=running_of(options))
    policy = data.augment if options.augment == "auto" else options.augment
    step = 0.0
    if recipe is not None and alike and alike.step:
        step = alike.step
    elif recipe is not None:
        step = seconds_a_step(
            teacher.classifier, data.train, recipe, Viewing(policy, 0, seed), engine_of(options)
        )
    return _Seat(
        teacher, recipe, step, alike.image if alike else seconds_an_image(teacher.classifier, data.val)
    )


def _targets(seats: Sequence[_Seat], setting: Setting) -> tuple[Targets, float]:
    """What is stored, and what a live look at an image takes where nothing is."""
    viewing, transfer = setting.viewing, setting.transfer
    device, missing, size, held = setting.device, [], 0, 0
    for seat in seats:
        layout = _layout(seat.teacher, setting)
        count = viewing.count * len(transfer) - _stored_rows(seat, layout, setting)
        missing.append((count, layout.row_bytes))
        size += viewing.count * layout.view_bytes
        held += layout.features
    wanted = [seat for seat, (count, _) in zip(seats, missing, strict=True) if count or not viewing.count]
    each = 0.0
    if wanted:
        largest = max((seat.teacher.classifier for seat in wanted), key=lambda c: max(c.card.preprocess.size))
        each = seconds_a_view([seat.teacher.runner(device) for seat in wanted], transfer, viewing, largest)
    if not viewing.count:
        return Targets(), each
    rows = max(count for count, _ in missing)
    width = (len(seats) + 2) * len(setting.data.classes) + held
    table = 4 * len(transfer) * width
    left = sum(count * row_bytes for count, row_bytes in missing)
    return Targets(
        viewing.count, len(transfer), size, left, rows * each, table if table <= HELD_BYTES else 0
    ), 0.0


def _layout(teacher: Teacher, setting: Setting) -> Layout:
    """As it is kept; with top-k, where nothing is calibrated."""
    options, classifier, count = setting.options, teacher.classifier, len(setting.transfer)
    width = feature_width(classifier, teacher.label) if options.feature_weight > 0 else 0
    if options.top_k is None:
        return Layout(count, len(classifier.classes), features=width)
    classes, temperatures = len(setting.data.classes), (1.0, setting.temperatures[teacher.label])
    return Layout(count, classes, min(options.top_k, classes), temperatures, width)


def _stored_rows(seat: _Seat, layout: Layout, setting: Setting) -> int:
    """How much of the wanted views of a teacher is kept already."""
    if seat.recipe is not None or not seat.teacher.storable:
        return 0
    keeping = Keeping(setting.data.name, setting.options.top_k)
    facts = facts_of(seat.teacher, setting.transfer, setting.viewing, keeping)
    kept = read_kept(targets_dir() / key_of(facts, layout))
    shards = kept.shards if kept else {}
    return sum(
        len(rows)
        for view_id in range(setting.viewing.count)
        for rows, digest in zip(layout.shards, shards.get(view_id, [None] * len(layout.shards)), strict=True)
        if digest is not None
    )


def _students(setting: Setting, run: Run | None, live: float) -> tuple[list[Network], float]:
    """The student and its controls, and the seconds of an image in a pass through one of them."""
    data, recipe, start = setting.data, setting.recipe, setting.start.to(setting.device)
    step = seconds_a_step(start, data.train, recipe, setting.viewing, engine_of(setting.options))
    image = seconds_an_image(start.eval(), data.val)
    rows = []
    for name in ["student", *setting.options.controls]:
        images = len(data.train if name == "labels" else setting.transfer)
        looking = 0.0 if name == "labels" else live * min(recipe.batch_size, images)
        done = _share_done(run, name, recipe, images)
        if done is None:
            rows.append(
                Network(name, start.card.model, start.parameter_count, "finished", bytes=start.byte_count)
            )
            continue
        rows.append(_to_train(name, start, recipe, images, step + looking, image * len(data.val), 1 - done))
    return rows, image


def _share_done(run: Run | None, name: str, recipe: Recipe, images: int) -> float | None:
    """Of the steps of a network, in an earlier part of the run; None where it is finished."""
    if run is None:
        return 0.0
    if name in run.status()["networks"]:
        return None
    kept = run.checkpoints(name).latest()
    steps = recipe.epochs * max(1, images // min(recipe.batch_size, images))
    return kept.state["steps"] / steps if kept else 0.0


def _train(options: TrainOptions, run: Run | None) -> tuple[dict[str, Any], torch.device]:
    data = load_data(**options.load_arguments())
    check_options(options, data)
    name, device = parse(options.model), choose_device(options.device)
    data, training = data.to(device), options.training.model_dump()
    policy = data.augment if options.augment == "auto" else options.augment
    viewing, engine = Viewing(policy, 0, options.seed), engine_of(options)
    common: dict[str, Any] = {"size": options.size, "stem": options.stem, "seed": options.seed}
    if options.role == "teacher":
        teacher, recipe = look_up(name, data, **common, augment=policy, training=training, device=device)
        network = teacher.classifier
    else:
        network = new_classifier(name, data, **common, offline=True).to(device)
        recipe = recipes.student_recipe(network, len(data.train), training)
    row = _alone(name, network, recipe, data, viewing, engine, run)
    test = seconds_an_image(network.eval(), data.test) * len(data.test)
    library = row.new_bytes if options.role == "teacher" else 0
    facts = {
        **_of_data(data, device),
        "policy": policy,
        "networks": rows_of([row]),
        "seconds": seconds_of([], 0.0, [row], test),
        "run_bytes": _run_bytes([row], 0),
        "run_peak_bytes": _run_bytes([row], 0) + most([row]),
        "cache_bytes": library,
        "cache_passing_bytes": most([row]) if library else 0,
    }
    return facts, device


def _alone(
    name: ModelName,
    network: Classifier,
    recipe: Recipe | None,
    data: Dataset,
    viewing: Viewing,
    engine: Engine,
    run: Run | None,
) -> Network:
    if recipe is None or (done := _share_done(run, "model", recipe, len(data.train))) is None:
        return Network(
            name.label, network.card.model, network.parameter_count, "at hand", bytes=network.byte_count
        )
    step = seconds_a_step(network, data.train, recipe, viewing, engine)
    judging = seconds_an_image(network.eval(), data.val) * len(data.val)
    return _to_train(name.label, network, recipe, len(data.train), step, judging, 1 - done)


def _run_bytes(networks: Sequence[Network], told: int) -> int:
    """What is in a run folder at the end; `told` are the bytes of its predictions."""
    if not networks:
        return 0
    return sum(row.bytes + _ROW_BYTES * row.epochs for row in networks) + told + _REST_BYTES


def _room(found: dict[str, Any], out: Path, device: torch.device) -> dict[str, Any]:
    """What is needed and free on disks and in memory."""
    wanted = [("the run", out, found["run_peak_bytes"])] if found["run_bytes"] else []
    wanted.append(("teachers and targets", cache_dir(), found["cache_bytes"] + found["cache_passing_bytes"]))
    disk = [
        {"what": what, "folder": str(folder), "needed": needed, "free": free_at(folder)}
        for what, folder, needed in wanted
    ]
    held = found.get("targets", {}).get("held_bytes", 0)
    memory = {"needed": peak_memory(device) + held, "free": free_memory(device)}
    enough = memory["free"] is None or memory["needed"] <= memory["free"]
    enough = enough and all(row["needed"] <= row["free"] for row in disk)
    return {"disk": disk, "memory": memory, "enough": enough}
