"""The report: escaping, what is made and what is read, and a page whose numbers are those of report.json."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import draw_nothing, logged, refused, unexplained
from typer.testing import CliRunner

from ensemble_kd.analysis import gather
from ensemble_kd.analysis.gather import ANALYSES, fits, training
from ensemble_kd.analysis.options import ReportOptions
from ensemble_kd.analysis.page import Html, Section, figure, join, measured, page, table, tag
from ensemble_kd.analysis.report import Report, report
from ensemble_kd.analysis.sections import sections
from ensemble_kd.analysis.subjects import FORM
from ensemble_kd.cli import app
from ensemble_kd.distillation import DistillResult, distill
from ensemble_kd.errors import ConfigError, RunError
from ensemble_kd.runs import OBJECTS
from ensemble_kd.training import train

VOID = ("img", "meta", "br")
HOSTILE = ["<script>alert(1)</script>", "[/b]", "x$\\frac$", "数字と文字", "a" * 200, "\"'&amp;\x00\x1b[31m"]
TITLES = [
    "In plain words",
    "Every pair of models",
    "Who is right, and what happens as images get worse",
    "How far confidence can be trusted",
    "How alike the layers are",
    "What is said between the images",
    "What is said of the wrong classes",
    "How unlike the models are in their errors",
    "Training",
    "How it was made",
]


class Parsed(HTMLParser):
    """A page as a list of elements, its text, and whether its elements are well nested."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs), list(self.open)))
        assert len(attrs) == len(dict(attrs))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of that name."""
        return [attributes for found, attributes, _ in self.elements if found == name]


def check_structure(markup: str) -> Parsed:
    """What holds for every report."""
    parsed = Parsed(markup)
    names = Counter(name for name, _, _ in parsed.elements)
    assert markup.startswith('<!doctype html>\n<html lang="en">')
    assert [names[name] for name in ("h1", "main", "title", "script", "link", "iframe")] == [1, 1, 1, 0, 0, 0]
    assert parsed.all("meta")[:2] == [
        {"charset": "utf-8"},
        {
            "http-equiv": "Content-Security-Policy",
            "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        },
    ]
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for image in parsed.all("img"):
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert image["alt"]
    for link in parsed.all("a"):
        assert (link["href"] or "").startswith("#")
        assert (link["href"] or "")[1:] in ids
    for name, attributes, above in parsed.elements:
        assert not any(key.startswith("on") for key in attributes), attributes
        assert name != "table" or above[-1] == "div"
        assert "src" not in attributes or name == "img"
    assert names["figcaption"] == names["figure"] == names["img"]
    assert "url(" not in markup
    assert "@import" not in markup
    return parsed


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_drawn(finished: DistillResult) -> Iterator[None]:
    """What pictures show is for other tests; to lay them out would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        yield


@pytest.fixture(scope="module")
def reported(finished: DistillResult, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report on the finished run; all its analyses are new."""
    return report(finished.folder, quick=True, images=60, out=tmp_path_factory.mktemp("report"))


@pytest.fixture
def copied(finished: DistillResult, reported: Report, tmp_path: Path) -> Path:
    """The finished run with its analyses, to be changed."""
    folder = tmp_path / "copied"
    shutil.copytree(finished.folder, folder)
    shutil.copytree(reported.folder / "analysis", folder / "analysis", dirs_exist_ok=True)
    return folder


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("an analysis is made")

    monkeypatch.setattr(gather, "subjects_of", never)
    monkeypatch.setattr(gather, "analyze_agreement", never)


def test_texts_are_escaped_and_markup_is_not() -> None:
    made = tag("p", "<b> & \"'", tag("i", "x"), Html("<br>"), class_='a"b', hidden=True, id=None, open=False)
    assert made == Html('<p class="a&quot;b" hidden>&lt;b&gt; &amp; &quot;&#x27;<i>x</i><br></p>')
    assert tag("meta", http_equiv="<") == Html('<meta http-equiv="&lt;">')
    assert join(["a\x00\x1b\n\tb", Html("<i>")]) == Html("a\ufffd\ufffd\n\tb<i>")


@pytest.mark.parametrize(
    ("measure", "form", "expected"),
    [
        (
            {"value": 0.9765, "low": 0.9, "high": 1.0},
            (100, 1, " %"),
            '<data value="0.9765">97.7 %</data> <small>[90.0, 100.0]</small>',
        ),
        (
            {"value": -1e-9, "low": -0.5, "high": 0.5},
            (1, 2, "", "+"),
            '<data value="-1e-09">+0.00</data> <small>[-0.50, +0.50]</small>',
        ),
        (
            {"value": 2, "low": None, "high": None},
            (1, 1),
            '<data value="2.0">2.0</data> <small>[?, ?]</small>',
        ),
        ({"value": None, "low": None, "high": None, "reason": "0/0"}, (), '<span title="0/0">–</span>'),
        (None, (), "<span>–</span>"),
    ],
)
def test_numbers_have_their_interval(measure: Any, form: tuple[Any, ...], expected: str) -> None:
    assert measured(measure, *form).markup == expected


def test_a_page_of_hostile_names_is_well_formed() -> None:
    png = b"\x89PNG\r\n\x1a\n" + bytes(8) + (640).to_bytes(4, "big") + (48).to_bytes(4, "big")
    body = [table(["", *HOSTILE], [[name, *HOSTILE] for name in HOSTILE], HOSTILE[0], words=[2])]
    body += [figure(png, name, name) for name in HOSTILE]
    markup = page(HOSTILE[0], [tag("p", HOSTILE[0])], [Section("a", HOSTILE[0], body)], HOSTILE[0])
    parsed = check_structure(markup)
    shown = "".join(text for texts in parsed.texts.values() for text in texts)
    for name in (*HOSTILE[:-1], "\"'&amp;\ufffd\ufffd[31m"):
        assert shown.count(name) >= 10
    assert {(image["width"], image["height"]) for image in parsed.all("img")} == {("640", "48")}


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({}, {}, True),
        ({"quick": True}, {}, False),
        ({"quick": True}, {"quick": True}, True),
        ({}, {"quick": True}, True),
        ({"images": 50}, {}, True),
        ({"images": 50}, {"images": 60}, False),
        ({"images": 60}, {"images": 60, "seed": 0}, True),
        ({"seed": 1}, {}, True),
        ({"seed": 1}, {"seed": 0}, False),
        ({"bins": 3}, {}, True),
    ],
)
def test_which_analyses_will_do(settings: dict[str, Any], given: dict[str, Any], expected: bool) -> None:
    made = {"form": FORM, "settings": {"quick": False, "seed": 0, **settings}, "roles": {"a": "student"}}
    assert fits(made, ReportOptions(**given), ["a"]) is expected
    assert not fits(made, ReportOptions(**given), ["a", "b"])
    assert not fits({**made, "form": FORM - 1}, ReportOptions(**given), ["a"])
    assert not fits({**made, "corruption": {"left_out": ""}}, ReportOptions(**given), ["a"])


def test_a_page_has_all_sections_pictures_and_numbers(finished: DistillResult, reported: Report) -> None:
    markup = reported.page.read_text(encoding="utf-8")
    parsed = check_structure(markup)
    assert [text for text in parsed.texts["h2"] if text != "Contents"] == TITLES
    assert parsed.texts["h1"] == ["Distillation report: finished"]
    numbers = json.loads((reported.folder / "report.json").read_text(encoding="utf-8"))
    assert numbers == reported.numbers
    (run,) = numbers["runs"]
    pictures = [about for part in ANALYSES for about in run[part]["pictures"].values()]
    assert len(parsed.all("img")) == len(pictures) + 1
    assert {about["alt"] for about in pictures} < {image["alt"] for image in parsed.all("img")}
    known = set(numbers_in(numbers))
    shown = [float(data["value"] or "") for data in parsed.all("data")]
    assert len(shown) > 500
    assert set(shown) <= known
    accuracy = run["metrics"]["models"]["student"]["accuracy"]
    cell = f'<data value="{accuracy["value"]!r}">{100 * accuracy["value"]:.2f} %</data>'
    assert f"{cell} <small>[{100 * accuracy['low']:.2f}, {100 * accuracy['high']:.2f}]</small>" in markup
    sentences = [line for finding in run["findings"] for line in finding["sentences"]]
    assert [text for text in parsed.texts["p"] if text in sentences] == sentences
    assert len(sentences) == 10
    for fact in (*run["manifest"]["versions"].values(), run["manifest"]["teachers"][0]["after"]):
        assert fact in markup


def test_every_null_has_a_reason(reported: Report) -> None:
    for part in ANALYSES:
        numbers = json.loads((reported.folder / "analysis" / f"{part}.json").read_text())
        assert unexplained(numbers) == [], part


def test_what_the_analyses_know_is_shown(reported: Report) -> None:
    parsed, (run,) = Parsed(reported.page.read_text(encoding="utf-8")), reported.numbers["runs"]
    shown = {float(data["value"] or "") for data in parsed.all("data")}
    pair = run["features"]["pairs"][0]
    assert {pair["procrustes"]["value"], pair["procrustes"]["chance"]} <= shown
    plane = next(p for p in run["surface"]["pairs"] if (p["first"], p["second"]) == ("student", "ensemble"))
    assert plane["reproducibility"]["sd"] in shown
    assert {
        run["agreement"]["pairs"][0]["kl"][way]["value"] for way in ("first_second", "second_first")
    } <= shown
    best = next(p for p in run["features"]["pairs"] if (p["first"], p["second"]) == ("student", "resnet8"))
    assert {row["cka"] for row in best["best"]["first"]} <= shown
    (caption,) = (
        text for text in parsed.texts["span"] if text.startswith("The most similar layer of each teacher")
    )
    assert "One-sided and optimistic: the best of many" in caption


def test_an_analysis_of_fewer_images_is_read_and_said_to_be(
    copied: Path, nothing_is_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged() as lines:
        made = report(copied, quick=True)
    said = "made before, on 60 images; --images 500 makes it anew on more"
    (run,) = made.numbers["runs"]
    assert run["fewer"] == [f"{part}: {said}" for part in ("agreement", "calibration", "features")]
    assert f"WARNING: copied: features: {said}" in lines
    assert f"features: {said}." in Parsed(made.page.read_text(encoding="utf-8")).texts["p"]


def test_analyses_are_made_as_the_verbs_make_them(reported: Report) -> None:
    (run,) = reported.numbers["runs"]
    for part in ANALYSES:
        assert json.loads((reported.folder / "analysis" / f"{part}.json").read_text()) == run[part]
        assert run[part]["settings"]["quick"] is True
    assert run["calibration"]["n"] == run["features"]["n"] == 60
    assert run["agreement"]["n"] == run["metrics"]["n"] == 360


def test_what_is_there_is_read(copied: Path, nothing_is_made: None) -> None:
    made = report(copied, quick=True, images=60)
    assert made.folder == copied / "report"
    assert sorted(path.name for path in made.folder.iterdir()) == ["index.html", "report.json"]
    check_structure(made.page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "harm", ["missing", "damaged", "of an older version", "without its picture", "too quick"]
)
def test_what_does_not_fit_is_made_anew(harm: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = copied / "analysis" / "surface.json", {"quick": True, "images": 60}
    kept = json.loads(path.read_text())
    if harm == "missing":
        path.unlink()
    elif harm == "damaged":
        path.write_text("{")
    elif harm == "of an older version":
        path.write_text(json.dumps({key: value for key, value in kept.items() if key != "settings"}))
    elif harm == "without its picture":
        (path.parent / kept["pictures"]["planes"]["file"]).unlink()
    else:
        for part in ANALYSES:  # all others are as they should be
            other = path.with_name(f"{part}.json")
            numbers = json.loads(other.read_text())
            numbers["settings"]["quick"] = part == "surface"
            other.write_text(json.dumps(numbers))
        options = {"images": 60}
    made = []

    def make(part: str) -> Any:
        def work(subjects: Any, given: Any) -> None:
            made.append((part, given.quick, given.images, given.out))
            shutil.copytree(reported_analysis, given.out, dirs_exist_ok=True)

        return work

    reported_analysis = copied.parent / "kept"
    shutil.copytree(copied / "analysis", reported_analysis)
    (reported_analysis / "surface.json").write_text(json.dumps(kept))
    for picture in kept["pictures"].values():
        (reported_analysis / picture["file"]).write_bytes((copied / "curves.png").read_bytes())
    monkeypatch.setattr(
        gather, "ANALYSES", {part: (kind, make(part)) for part, (kind, _) in ANALYSES.items()}
    )
    report(copied, **options)
    assert made == [("surface", options.get("quick", False), 60, copied / "analysis")]


def test_an_analysis_in_another_folder_is_read_if_it_is_of_this_run(
    finished: DistillResult, reported: Report, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def left(*given: Any) -> None:
        asked.append(given)
        raise RunError("not now", "", "")

    monkeypatch.setattr(gather, "subjects_of", left)
    monkeypatch.setattr(gather, "analyze_agreement", lambda **given: left())
    again = report(finished.folder, quick=True, images=60, out=reported.folder)
    assert asked == []
    assert again.numbers["runs"] == reported.numbers["runs"]
    shutil.rmtree(copied / "analysis")
    other = report(copied, quick=True, images=60, out=reported.folder)
    assert len(asked) == 2
    assert [other.numbers["runs"][0][part].get("left_out") for part in ANALYSES] == ["not now"] * 4


def test_a_run_of_python_objects_says_what_is_left_out(copied: Path) -> None:
    shutil.rmtree(copied / "analysis")
    status = json.loads((copied / "status.json").read_text())
    (copied / "status.json").write_text(json.dumps({**status, "verb": OBJECTS}))
    why = f"the models of {copied} are not all in files: it was given teachers, a student or a function as Python objects"
    with logged() as lines:
        made = report(copied, quick=True)
    (run,) = made.numbers["runs"]
    for part in ("calibration", "features", "surface"):
        assert run[part] == {"left_out": why}
        assert f"WARNING: copied: {part} is left out: the models of {copied} are not all in files" in lines
    assert run["agreement"]["corruption"]["left_out"].startswith(
        f"the models of {copied} are not all in files"
    )
    markup = made.page.read_text(encoding="utf-8")
    parsed = check_structure(markup)
    assert [text for text in parsed.texts["h2"] if text != "Contents"] == TITLES
    assert parsed.texts["p"].count(f"Left out: {why}.") == 3
    assert f"Not measured: likeness of layers ({why})." in parsed.texts["p"]
    assert sum(text.startswith("Agreement under corruption is left out: ") for text in parsed.texts["p"]) == 1


def test_runs_side_by_side_and_over_seeds(copied: Path, nothing_is_made: None) -> None:
    folders = [copied]
    for seed in (1, 2):
        folders.append(copied.with_name(f"seed{seed}"))
        shutil.copytree(copied, folders[-1])
        config = yaml.safe_load((copied / "config.yaml").read_text())
        (folders[-1] / "config.yaml").write_text(yaml.safe_dump({**config, "seed": seed}))
        metrics = json.loads((copied / "metrics.json").read_text())
        metrics["models"]["student"]["accuracy"]["value"] += 0.01 * seed
        (folders[-1] / "metrics.json").write_text(json.dumps(metrics))
    out = copied.parent / "out"
    made = report(folders, quick=True, images=60, out=out)
    assert [run["name"] for run in made.numbers["runs"]] == ["copied", "seed1", "seed2"]
    (group,) = made.numbers["groups"]
    assert (group["runs"], group["seeds"]) == (["copied", "seed1", "seed2"], [0, 1, 2])
    first = made.numbers["runs"][0]["metrics"]["models"]["student"]["accuracy"]["value"]
    assert group["models"]["student"]["accuracy"]["value"] == pytest.approx(first + 0.01)
    markup = made.page.read_text(encoding="utf-8")
    parsed = check_structure(markup)
    assert set(group["sentences"]) <= set(parsed.texts["p"])
    assert len(group["sentences"]) == 4
    assert made.table().endswith("\n".join(group["sentences"]))
    assert "The runs side by side; 95 % intervals over test images or planes" in parsed.texts["span"]
    # Three copies of one run: every likeness is the same in all, and shown with an interval that is a point.
    surface = made.numbers["runs"][0]["surface"]
    gain = next(row for row in surface["gains"] if (row["control"], row["target"]) == ("labels", "ensemble"))
    found = group["likeness"]["planes"]["differences"]["labels"]
    assert list(found.values()) == pytest.approx([gain["gain"]["value"]] * 3)
    assert parsed.texts["th"].count("CKA, best matches: student − labels") == 1
    assert (
        parsed.texts["th"].count("the ensemble's answer on planes between images: student − labels, points")
        == 1
    )
    assert any(text.startswith("How alike to the ensemble and, in CKA") for text in parsed.texts["span"])
    assert (
        "copied, seed1, seed2: means over the seeds 0, 1, 2, with 95 % t intervals over seeds"
        in parsed.texts["span"]
    )
    assert parsed.texts["h3"] == ["copied", "seed1", "seed2"] * len(TITLES)
    assert parsed.texts["th"].count("seed") == 2  # side by side, and among the options that differ
    assert set(float(data["value"] or "") for data in parsed.all("data")) <= set(numbers_in(made.numbers))


def test_runs_of_one_name_are_told_by_their_paths(copied: Path, nothing_is_made: None) -> None:
    other = copied.parent / "other" / "copied"
    shutil.copytree(copied, other)
    made = report([copied, other], quick=True, images=60, out=copied.parent / "out")
    assert [run["name"] for run in made.numbers["runs"]] == [str(copied), str(other)]
    assert made.numbers["groups"] == []


def renamed(value: Any, name: str, new: str) -> Any:
    """`value` with a model's name replaced everywhere, keys included, and classes replaced by hostile ones."""
    if isinstance(value, dict):
        return {
            key.replace(name, new): [HOSTILE[int(c) % len(HOSTILE)] for c in item]
            if key == "classes" and isinstance(item, list)
            else HOSTILE[int(item) % len(HOSTILE)]
            if key == "class"
            else renamed(item, name, new)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [renamed(item, name, new) for item in value]
    return value.replace(name, new) if isinstance(value, str) else value


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_as_text(name: str, reported: Report) -> None:
    numbers = renamed(reported.numbers, "resnet8", name)
    (run,) = numbers["runs"]
    png = (reported.folder / "analysis" / "surface-planes.png").read_bytes()
    pictures = {(part, key): png for part in ANALYSES for key in run[part]["pictures"]}
    markup = page(name, [], sections(numbers, [pictures]), name)
    parsed = check_structure(markup)
    shown = "".join(text for texts in parsed.texts.values() for text in texts)
    assert shown.count(name.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")) > 30
    assert "<script>alert(1)</script>" in shown


def test_the_command_line(copied: Path, nothing_is_made: None, tmp_path: Path) -> None:
    arguments = ["report", str(copied), "--quick", "--images", "60", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    numbers = json.loads(result.stdout)
    assert numbers["folder"] == str(tmp_path / "out")
    assert [run["name"] for run in numbers["runs"]] == ["copied"]
    assert f"report: {tmp_path / 'out' / 'index.html'}" in result.stderr
    plain = CliRunner().invoke(app, arguments)
    assert plain.stdout.splitlines()[:2] == ["copied: digits, 360 test images", "  Did distilling help?"]


def test_one_teacher_and_no_control(few_digits: Any, tmp_path: Path) -> None:
    run = distill(
        ["lenet"],
        "lenet",
        controls="none",
        epochs=1,
        teacher_epochs=1,
        limit_train=200,
        out=tmp_path / "alone",
    )
    made = report(run.folder, quick=True, images=30)
    parsed = check_structure(made.page.read_text(encoding="utf-8"))
    said = parsed.texts["p"]
    for line in (
        "No control on labels alone was trained, so nothing can be said of what distilling gained.",
        "There was one teacher, so nothing can be said of what several would gain.",
        "No control was trained (--controls), so the student stands beside no other student.",
        "There is one teacher, so teachers have no diversity.",
    ):
        assert said.count(line) == 1, line
    assert not any("left_out" in made.numbers["runs"][0][part] for part in ANALYSES)


def test_training_is_summed_up_by_network() -> None:
    rows = [
        {
            "network": "a",
            "epoch": epoch,
            "step": 10 * epoch,
            "seconds": 1.5,
            "train": {"accuracy": epoch},
            "val": {},
        }
        for epoch in (1, 2)
    ]
    assert training(rows) == [
        {"network": "a", "seconds": 3.0, "epochs": 2, "steps": 20, "train": {"accuracy": 2}, "val": {}}
    ]


def test_errors_are_told(copied: Path, finished: DistillResult, tmp_path: Path) -> None:
    with refused(ConfigError, f"runs: {copied} is named 2 times", "each run is one column", "name it once"):
        report([copied, copied / ".." / "copied"])
    with refused(
        RunError,
        f"{tmp_path} is no run folder",
        "it has no config.yaml and status.json",
        "name a folder made by `ekd distill`",
    ):
        report(tmp_path)
    (copied / "file").write_text("")
    with refused(
        RunError, f"cannot write to {copied / 'file'}", "File exists", "name another folder: --out PATH"
    ):
        report(copied, out=copied / "file")
    (copied / "metrics.json").unlink()
    with refused(
        RunError, f"{copied} did not finish", "it has no metrics.json", f"go on: ekd resume {copied}"
    ):
        report(copied, quick=True)
    alone = train("lenet", role="control", epochs=1, limit_train=100, out=tmp_path / "alone").folder
    with refused(
        RunError,
        f"{alone} is no run of `ekd distill`",
        "it has no student and no teachers",
        f"judge it by: ekd evaluate {alone}",
    ):
        report(alone)
