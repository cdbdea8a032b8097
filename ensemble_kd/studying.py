"""Studies: a grid of distillations, each a normal run, shared by all processes that work on it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ensemble_kd import files, training
from ensemble_kd.analysis.features import analyze_features
from ensemble_kd.analysis.studies import StudyResult, check_measures, summarise
from ensemble_kd.analysis.surface import analyze_surface
from ensemble_kd.config import read_yaml, resolve
from ensemble_kd.console import hushed, log, progress
from ensemble_kd.device import choose_device
from ensemble_kd.distillation import distill_with, go_on
from ensemble_kd.errors import ConfigError, EkdError, RunError, TrainingError, nearest
from ensemble_kd.grid import Point, StudyOptions, facts, located, points_of, to_yaml, training_before
from ensemble_kd.interrupts import as_interrupt
from ensemble_kd.locks import lock
from ensemble_kd.runs import RUNS, Run
from ensemble_kd.schema import TrainOptions
from ensemble_kd.setting import Objects
from ensemble_kd.shared import Shared
from ensemble_kd.together import distill_together, fleets

STUDIES = Path("examples") / "studies"
_ANALYSES: dict[str, Callable[..., object]] = {"features": analyze_features, "surface": analyze_surface}
_LOOK_AGAIN = 0.5
"""Seconds between two looks at points that other processes work on."""


def study(
    study: str | Path | None = None,
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> StudyResult:
    """Distil at each point of a grid from several seeds, and compare each point with its baseline.

    A point that is finished is not run again, and one that was stopped goes on; so an interrupted study is
    started again by the same command. Several processes, also on several machines, may work on one folder.

    Args:
        study: a YAML file of `grid.StudyOptions`, or the name of one in examples/studies.
        config_file: the same.
        sets: assignments such as `"training.epochs=5"`, over the file.
        options: the fields of `grid.StudyOptions`, over both; those of `distill` hold for all points.

    Returns:
        The folder, runs/study-NAME by default, and what its study.json holds.

    Raises:
        ConfigError: the study or one of its points cannot be; or other options made what is in its folder.
        EkdError: data, models or files cannot be used. A point whose loss becomes infinite is told and left out.
    """
    file = _file(study, config_file)
    chosen = resolve(StudyOptions, options, file=file, sets=sets)
    chosen = located(chosen, file.parent) if file else chosen
    _tell_what_is_left_out(file, chosen)
    folder = chosen.out or RUNS / f"study-{file.stem if file else '-'.join(chosen.over) or 'arms'}"
    before = folder / "before"
    check_measures(chosen)
    points, first = points_of(chosen, before), training_before(chosen, before)
    _claim(folder, chosen)
    for network in first:
        _prepare(network)
    failures = _work(folder, points, chosen)
    return summarise(folder, failures)


def work(folder: str | Path) -> None:
    """Work on the points of a study that another process started."""
    chosen = resolve(StudyOptions, {}, file=Path(folder) / "study.yaml")
    with hushed(logging.ERROR), suppress(EkdError, KeyboardInterrupt), as_interrupt():
        _work(Path(folder), points_of(chosen, Path(folder) / "before"), chosen)


def _file(name: str | Path | None, config_file: str | Path | None) -> Path | None:
    if name is None:
        return Path(config_file) if config_file else None
    if config_file is not None:
        raise ConfigError("the study is named twice", f"{name} and {config_file}", "name one of them")
    places = [STUDIES, Path(__file__).parents[1] / STUDIES, Path(__file__).parent / STUDIES.name]
    found = [Path(name), *(place / f"{name}.yaml" for place in places)]
    for path in found:
        if path.is_file():
            return path
    known = sorted({path.stem for place in places for path in place.glob("*.yaml")})
    raise ConfigError(
        f"there is no study {str(name)!r}",
        f"known are {', '.join(known) or 'none'}, and files of your own",
        nearest(str(name), known) or "name one of these, or a YAML file",
    )


def _tell_what_is_left_out(file: Path | None, chosen: StudyOptions) -> None:
    """`over` takes the place of the file's, also of what it does not name: easily overlooked."""
    asked = read_yaml(file).get("over") if file else None
    if left := [name for name in asked or {} if name not in chosen.over]:
        log.warning("--over takes the place of the study's own: it goes over %s, and not over %s",
                    ", ".join(chosen.over), ", ".join(left))  # fmt: skip


def _claim(folder: Path, options: StudyOptions) -> None:
    """Write study.yaml; what was made before by other options is refused or, where that is wanted, removed."""
    with _alone(folder):
        _write_claim(folder, options)


def _write_claim(folder: Path, options: StudyOptions) -> None:
    path = folder / "study.yaml"
    if not path.is_file() and {own.name for own in folder.iterdir()} > {"lock"}:
        raise RunError(
            f"{folder} is not empty",
            "a study writes to a folder of its own",
            "name another folder: --out PATH (what is no study is never overwritten)",
        )
    if path.is_file() and options.overwrite:
        shutil.rmtree(folder / "points", ignore_errors=True)
        shutil.rmtree(folder / "before", ignore_errors=True)
    elif path.is_file():
        kept, now = facts(resolve(StudyOptions, read_yaml(path))), facts(options)
        added = [
            n for n in {**kept, **now} if n.startswith(("arms.", "before.")) and (n in kept) != (n in now)
        ]
        changed = [n for n in {**kept, **now} if kept.get(n) != now.get(n) and n not in added]
        if changed:
            told = "; ".join(f"{n} was {kept.get(n)}, is {now.get(n)}" for n in changed)
            raise ConfigError(
                f"{folder} holds points of other options",
                told,
                "bring that back, or name another folder: --out PATH (or make all anew: --overwrite)",
            )
    files.write_text(path, to_yaml(options))


def _prepare(network: TrainOptions) -> None:
    """Train a network that points need, go on with it, or wait for the process that does."""
    folder = Path(str(network.out))
    while not _is_finished(folder):
        try:
            if not (folder / "status.json").is_file():
                training.train(**network.model_dump(exclude_unset=True, exclude={"overwrite"}))
            elif (run := _unfinished(folder)) is not None:
                training.go_on(run)
        except RunError:
            if not (_is_busy(folder) or _is_finished(folder)):
                raise
            time.sleep(_LOOK_AGAIN)


def _work(folder: Path, points: Mapping[str, Point], options: StudyOptions) -> dict[str, str]:
    """Finish every point; returns those that cannot be finished, with the reason."""
    left = [(point, seed) for seed in range(options.seeds) for point in points.values()]
    shared, failures = Shared(pictures=False), {}
    done = [one for one in left if _is_done(run_folder(folder, *one), options)]
    log.info("study: %d points, %d seeds, %d of %d runs are left", len(points), options.seeds,
             len(left) - len(done), len(left))  # fmt: skip
    left, told_once = [one for one in left if one not in done], True
    with _helpers(folder, options.jobs if left else 1), progress("study", len(left)) as advance:
        if options.fleet and choose_device(options.device).type == "cuda":
            with _alone(folder / "points"):  # others wait, and find the fleets' runs finished
                _fly(folder, left, options, shared, advance)
            left = [one for one in left if not _is_done(run_folder(folder, *one), options)]
        while left:
            busy = []
            for point, seed in left:
                try:
                    with hushed(logging.WARNING if told_once else logging.ERROR):
                        finished = _finish(run_folder(folder, point, seed), point, seed, options, shared)
                except TrainingError as error:
                    failures[f"{point.name}, seed {seed}"] = error.problems[0].what
                    log.warning("%s, seed %d: %s", point.name, seed, error)
                    finished = True
                if not finished:
                    busy.append((point, seed))
                    continue
                told_once = False
                advance(note=f"{point.name}, seed {seed}")
                log.debug("study: %s, seed %d", point.name, seed)
            if len(busy) == len(left):
                time.sleep(_LOOK_AGAIN)
            left = busy
    return failures


def _fly(
    folder: Path,
    left: Sequence[tuple[Point, int]],
    options: StudyOptions,
    shared: Shared,
    advance: Callable[..., None],
) -> None:
    """Train what has not begun in fleets, where that can be; the rest is left."""
    new = [one for one in left if not run_folder(folder, *one).exists()]
    chosen = [
        point.options(seed, out=run_folder(folder, point, seed), device=options.device) for point, seed in new
    ]
    groups = fleets(chosen)
    while groups:
        group = groups.pop(0)
        if len(group) == 1:
            continue
        try:
            with hushed():
                reason = distill_together([chosen[position] for position in group], shared)
        except torch.OutOfMemoryError:
            half = (len(group) + 1) // 2
            log.info("study: a fleet of %d does not fit into memory; next %d at once", len(group), half)
            groups[:0] = [group[:half], group[half:]]
            continue
        if reason:
            log.info("study: %s and others are trained one after another: %s", new[group[0]][0].name, reason)
        else:
            done = [_is_done(run_folder(folder, *new[position]), options) for position in group]
            advance(sum(done), note=f"a fleet of {len(group)}")


def run_folder(folder: Path, point: Point, seed: int) -> Path:
    """The run of a point from a seed."""
    return folder / "points" / point.folder / f"seed-{seed}"


def _is_finished(folder: Path) -> bool:
    return (folder / "status.json").is_file() and Run.open(folder).status()["state"] == "finished"


def _is_done(folder: Path, options: StudyOptions) -> bool:
    """Whether the run is finished and analysed."""
    made = all((folder / "analysis" / f"{name}.json").is_file() for name in options.analyses)
    return made and _is_finished(folder)


def _finish(folder: Path, point: Point, seed: int, options: StudyOptions, shared: Shared) -> bool:
    """Make or go on with a run; False where another process is at it."""
    try:
        if not (folder / "status.json").is_file():
            chosen = point.options(seed, out=folder, device=options.device)
            distill_with(chosen, Objects({}, shared=shared))
        elif (run := _unfinished(folder)) is not None:
            go_on(run, shared)
        if not _is_done(folder, options):
            _analyse(Run.open(folder).locked(), options)
    except RunError:
        if _is_busy(folder) or _is_finished(folder):
            return _is_done(folder, options)
        raise
    return True


def _analyse(run: Run, options: StudyOptions) -> None:
    """Make the analyses that are not there; the run is held meanwhile, so that no other process makes them too."""
    try:
        for name in options.analyses:
            if not run.path(f"analysis/{name}.json").is_file():
                _ANALYSES[name](run.folder, quick=True, device=options.device)
    finally:
        run.unlock()


def _unfinished(folder: Path) -> Run | None:
    """The run, held, if it is not finished: looked at under its lock, as another process may have been faster."""
    run = Run.open(folder).locked()
    if run.status()["state"] != "finished":
        return run
    run.unlock()
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, after waiting for the process that holds it.

    Raises:
        RunError: it cannot be written to.
    """
    try:
        held = lock(folder, lambda: None)
    except OSError as error:
        what, fix = f"cannot write to {folder}", "name another folder: --out PATH"
        raise RunError(what, str(error.strerror), fix) from error
    assert held is not None
    try:
        yield
    finally:
        (folder / "lock").unlink(missing_ok=True)
        held.close()


def _is_busy(folder: Path) -> bool:
    held = lock(folder)
    if held is not None:
        held.close()
    return held is None


@contextmanager
def _helpers(folder: Path, jobs: int) -> Iterator[None]:
    """Further processes that work on the same points, until this one has nothing left to do."""
    if jobs == 1:
        yield
        return
    before = torch.get_num_threads()
    threads = max(1, before // jobs)
    code = "import sys; from ensemble_kd.studying import work; work(sys.argv[1])"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    helpers = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment) for _ in range(jobs - 1)
    ]
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.wait()
