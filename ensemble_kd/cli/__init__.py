"""The command line: one small file a verb; each parses, calls one public function and prints."""

from __future__ import annotations

import typer

from ensemble_kd import __version__
from ensemble_kd.cli import (
    agreement,
    calibration,
    data,
    distill,
    evaluate,
    export,
    features,
    models,
    predict,
    report,
    study,
    surface,
    targets,
    teachers,
    train,
    verify,
)

app = typer.Typer(
    name="ekd",
    help="Teach several unlike image classifiers into one small one, and see whether it helped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="print the version"
    ),
) -> None:
    pass


app.command("distill")(distill.distill)
app.command("resume")(distill.resume)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("analyze-agreement")(agreement.analyze_agreement)
app.command("analyze-calibration")(calibration.analyze_calibration)
app.command("analyze-features")(features.analyze_features)
app.command("analyze-surface")(surface.analyze_surface)
app.command("analyze-teachers")(teachers.analyze_teachers)
app.command("report")(report.report)
app.command("study")(study.study)
app.command("models")(models.models)
app.command("data")(data.data)
app.add_typer(targets.targets, name="targets")


def main() -> None:
    """The entry point of `ekd`."""
    app()
