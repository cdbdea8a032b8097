"""ensemble-kd: several unlike image classifiers taught into one small one.

The public functions, loaded when first used so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_kd.after_timm import watch as _watch

# In a checkout `teachers/` and `analysis/` lie beside this folder; installed, they lie inside it.
if not (Path(__file__).parent / "teachers").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"
_watch()

_API = {
    "distill": "ensemble_kd.distillation",
    "resume": "ensemble_kd.resuming",
    "train": "ensemble_kd.training",
    "evaluate": "ensemble_kd.evaluation",
    "export": "ensemble_kd.exporting",
    "predict_images": "ensemble_kd.predicting",
    "verify": "ensemble_kd.verifying",
    "load_student": "ensemble_kd.weights",
    "load_teacher": "ensemble_kd.teachers.registry",
    "load_data": "ensemble_kd.data",
    "inspect_data": "ensemble_kd.data.inspect",
    "list_models": "ensemble_kd.teachers.catalogue",
    "analyze_agreement": "ensemble_kd.analysis.agreement",
    "analyze_calibration": "ensemble_kd.analysis.calibration",
    "analyze_features": "ensemble_kd.analysis.features",
    "analyze_surface": "ensemble_kd.analysis.surface",
    "report": "ensemble_kd.analysis.report",
    "study": "ensemble_kd.studying",
    "analyze_teachers": "ensemble_kd.analysis.teachers",
    "build_targets": "ensemble_kd.judges",
    "list_targets": "ensemble_kd.teachers.stored",
    "verify_targets": "ensemble_kd.teachers.stored",
    "prune_targets": "ensemble_kd.teachers.stored",
    "doctor": "ensemble_kd.examining",
    "plan": "ensemble_kd.planning",
    "config_template": "ensemble_kd.configuration",
    "show_config": "ensemble_kd.configuration",
    "validate_config": "ensemble_kd.configuration",
    "EkdError": "ensemble_kd.errors",
}
__all__ = [*_API, "__version__"]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from ensemble_kd.analysis.agreement import analyze_agreement as analyze_agreement
    from ensemble_kd.analysis.calibration import analyze_calibration as analyze_calibration
    from ensemble_kd.analysis.features import analyze_features as analyze_features
    from ensemble_kd.analysis.report import report as report
    from ensemble_kd.analysis.surface import analyze_surface as analyze_surface
    from ensemble_kd.analysis.teachers import analyze_teachers as analyze_teachers
    from ensemble_kd.configuration import config_template as config_template
    from ensemble_kd.configuration import show_config as show_config
    from ensemble_kd.configuration import validate_config as validate_config
    from ensemble_kd.data import load_data as load_data
    from ensemble_kd.data.inspect import inspect_data as inspect_data
    from ensemble_kd.distillation import distill as distill
    from ensemble_kd.errors import EkdError as EkdError
    from ensemble_kd.evaluation import evaluate as evaluate
    from ensemble_kd.examining import doctor as doctor
    from ensemble_kd.exporting import export as export
    from ensemble_kd.judges import build_targets as build_targets
    from ensemble_kd.planning import plan as plan
    from ensemble_kd.predicting import predict_images as predict_images
    from ensemble_kd.resuming import resume as resume
    from ensemble_kd.studying import study as study
    from ensemble_kd.teachers.catalogue import list_models as list_models
    from ensemble_kd.teachers.registry import load_teacher as load_teacher
    from ensemble_kd.teachers.stored import list_targets as list_targets
    from ensemble_kd.teachers.stored import prune_targets as prune_targets
    from ensemble_kd.teachers.stored import verify_targets as verify_targets
    from ensemble_kd.training import train as train
    from ensemble_kd.verifying import verify as verify
    from ensemble_kd.weights import load_student as load_student


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
