"""The shape of the house: imports only go down, the wheel holds exactly the sources, files stay small."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ensemble_kd": ROOT / "ensemble_kd", "ensemble_kd.teachers": ROOT / "teachers",
           "ensemble_kd.analysis": ROOT / "analysis"}  # fmt: skip

# fmt: off
LEVELS = [
    {"after_timm", "ensemble_kd"},
    {"errors", "files", "console", "names", "interrupts", "locks", "distributed", "trackers"},
    {
        "losses", "combine", "weighting", "calibration", "metrics", "initialise", "students", "forms",
        "fields", "schema", "device", "imagenet", "topk", "fused", "profiling", "graphs", "guards", "checkpoints",
        "shared_norm", "shared", "deploying", "portable",
    },
    {
        "config", "classifier", "yamls", "timm_students", "models", "features",
        "data.hashing", "data.crops", "data.mixing", "data.trivial",
        "data.views", "data.archives", "data.headers", "data.shards", "data.streams", "data.dataset",
    },
    {
        "data.copies", "data.folders", "data.hf", "data.labels", "data.lists", "data.tar_index", "data.tars",
        "data.unlabelled", "data.sources", "weights", "pretrained", "data", "data.inspect",
        "curves", "objective", "inference", "stepping", "stacked", "timm_form", "exported",
    },
    {"configuration", "fresh", "fit", "fleet", "loop", "recorded", "saving", "runs", "results"},
    {
        "recipes", "tables", "model_card", "teachers", "teachers.library", "teachers.class_map", "teachers.runner",
        "teachers.layout", "teachers.store", "teachers.stored",
    },
    {"teachers.ensemble", "teachers.sharding", "teachers.building", "teachers.targets"},
    {"teachers.registry", "teachers.catalogue", "teachers.combination"},
    {"checking", "setting", "judges", "timing", "planned", "examining"},
    {
        "distillation", "training", "evaluation", "exporting", "predicting", "verifying",
        "analysis", "analysis.plots", "analysis.options", "analysis.diversity",
        "analysis.resampling", "analysis.intervals", "analysis.corruptions", "analysis.pairs", "analysis.fidelity", "analysis.dark",
        "analysis.plots_agreement", "analysis.tables_agreement",
        "analysis.plots_calibration", "analysis.plots_surface", "analysis.planes",
        "analysis.cka", "analysis.layers", "analysis.taps", "analysis.similarity", "analysis.plots_features",
        "analysis.style", "analysis.page", "analysis.parts", "analysis.made", "analysis.sections", "analysis.seeds",
        "analysis.verdict", "analysis.likeness", "analysis.plots_classes", "analysis.blocks", "analysis.parts_inside",
        "grid", "analysis.study_numbers",
    },
    {"analysis.subjects", "resuming", "planning", "together", "analysis.plots_study", "analysis.study_page"},
    {"analysis.agreement", "analysis.calibration", "analysis.features", "analysis.surface", "analysis.teachers"},
    {"analysis.gather", "analysis.studies", "analysis.report"},
    {"studying"},
    {"cli.completion"},
    {"cli.options"},
    {
        "cli.distill", "cli.train", "cli.evaluate", "cli.agreement", "cli.calibration", "cli.teachers", "cli.models", "cli.data",
        "cli.targets", "cli.surface", "cli.features", "cli.report", "cli.study", "cli.config", "cli.doctor",
        "cli.export", "cli.predict", "cli.verify",
    },
    {"cli"},
    {"__main__"},
]
# fmt: on
"""Modules by level; a module may import those below it, and those of its own level without a circle."""


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name under `ensemble_kd`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts[1:]) or "ensemble_kd"] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports when it runs."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ensemble_kd"):
            base = (node.module or "").removeprefix("ensemble_kd").lstrip(".")
            inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            names |= {name for name in inner if name in known} or {base or "ensemble_kd"}
    return names


def test_every_module_has_a_level():
    placed = [name for level in LEVELS for name in level]
    assert len(placed) == len(set(placed))
    assert sorted(placed) == sorted(sources())


def test_imports_only_go_down():
    modules = sources()
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    arrows = {name: imported(path, set(modules)) - {name} for name, path in modules.items()}
    upward = [f"{a} -> {b}" for a, targets in arrows.items() for b in targets if level[b] > level[a]]
    assert upward == []


def test_imports_make_no_circle():
    modules = sources()
    arrows = {name: imported(path, set(modules)) - {name} for name, path in modules.items()}
    remaining = dict(arrows)
    while free := [name for name, targets in remaining.items() if not targets & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert remaining == {}


def test_no_file_is_longer_than_400_lines_and_no_function_than_60():
    long_files = [str(p) for p in sources().values() if len(p.read_text().splitlines()) > 400]
    long_functions = [
        f"{path.name}:{node.name}"
        for path in sources().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert (long_files, long_functions) == ([], [])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy of the sources, so that no old build lies beside them."""
    out, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("copy")
    for name in ("ensemble_kd", "teachers", "analysis", "examples/studies"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_exactly_the_sources(wheel):
    expected = {"ensemble_kd/py.typed"}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            expected.add(f"{package.replace('.', '/')}/{path.relative_to(folder)}")
    expected |= {f"ensemble_kd/studies/{path.name}" for path in (ROOT / "examples" / "studies").glob("*.*")}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_importing_the_package_and_its_help_load_no_heavy_library():
    code = (
        "import sys, ensemble_kd, ensemble_kd.cli\n"
        "print([m for m in ('torch', 'timm', 'torchvision', 'seaborn', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_the_public_names_are_importable():
    import ensemble_kd

    for name in ensemble_kd.__all__:
        assert getattr(ensemble_kd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ensemble_kd.nothing


def test_no_public_name_is_that_of_a_module():
    """Importing the module would put it in the name's place."""
    import ensemble_kd

    assert not set(ensemble_kd.__all__) & set(sources())
