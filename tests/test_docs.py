"""The documentation holds: examples in docstrings run, links lead somewhere, commands parse, nothing public is left out."""

from __future__ import annotations

import doctest
import re
import shlex
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer
from test_structure import sources

import ensemble_kd
from ensemble_kd.cli import VERBS, app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").rglob("*.md"))]  # fmt: skip
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TYPED = [page for page in PAGES if page.name != "walkthrough.md"]
"""All but the record of a first use, in which commands are misspelt on purpose."""
WITH_EXAMPLES = sorted(name for name, path in sources().items() if ">>> " in path.read_text())


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(import_module(f"ensemble_kd.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_every_verb_is_shown(page):
    text = (ROOT / page).read_text()
    assert [verb for verb in VERBS if not re.search(rf"\bekd {verb}\b", text)] == []


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: ensemble_kd\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name for name in ensemble_kd.__all__ if name != "__version__")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", FENCE.sub("", page.read_text()))
    targets = [(page if not path else page.parent / path, anchor) for path, anchor in links]
    assert [str(path) for path, _ in targets if not path.exists()] == []
    assert [f"{path}#{anchor}" for path, anchor in targets if anchor and anchor not in anchors(path)] == []


def commands(page: Path) -> list[str]:
    """The command lines of `ekd` in a page: those in blocks, and those in the text that have a flag."""
    text = page.read_text()
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    lines = re.findall(
        r"^\s*(?:\$ )?(?:\S+=\S+ |torchrun .*)*(?:(?:\S*/)?ekd|-m ensemble_kd) (.+)$", blocks, re.MULTILINE
    )
    return lines + [f"{line} …" for line in re.findall(r"`ekd ([a-z][^`]* -[^`]+)`", FENCE.sub("", text))]


def parse(line: str) -> None:
    """Read a line up to where it would run: unknown verbs and flags and missing values end here; `…` is anything."""
    words = shlex.split(line.split(" | ")[0], comments=True)
    if words[:2] == ["config", "show"]:  # followed by a verb and all of its flags
        words = words[2:]
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="ekd")
    while hasattr(command, "get_command") and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            raise LookupError(f"no verb {words[0]}")
        command, words = found, words[1:]
        context = command.context_class(command, info_name="ekd", parent=context)
    command.make_parser(context).parse_args(words)


@pytest.mark.parametrize("page", [page for page in TYPED if commands(page)], ids=shown)
def test_commands_parse(page):
    for line in commands(page):
        try:
            parse(line)
        except Exception as error:
            raise AssertionError(f"ekd {line}: {error}") from error


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("distil --teachers a", "no verb distil"),
        ("targets mend", "no verb mend"),
        ("distill --teachrs a", "No such option: --teachrs"),
        ("config show train --over 3", "No such option: --over"),
        ("train --epochs", "Option '--epochs' requires an argument."),
    ],
)
def test_a_wrong_command_does_not_parse(line, why):
    with pytest.raises(Exception) as caught:  # noqa: PT011 — typer's own click has no public errors
        parse(line)
    assert str(caught.value) == why


@pytest.fixture(scope="module")
def hooks():
    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("uri", "link", "moved"),
    [
        ("scale.md", "performance.md#on-a-gpu", "performance.md#on-a-gpu"),
        ("scale.md", "../examples/cluster/README.md", "examples/cluster/README.md"),
        ("examples/cluster/README.md", "../../docs/scale.md", "../../scale.md"),
        ("CONTRIBUTING.md", "docs/results.md#cka", "results.md#cka"),
        ("scale.md", "https://a.org/../b", "https://a.org/../b"),
        ("scale.md", "#starting", "#starting"),
    ],
)
def test_links_of_the_repository_become_links_of_the_pages(hooks, uri, link, moved):
    assert hooks.linked(f"see [it]({link}).", uri) == f"see [it]({moved})."


def test_lists_after_a_paragraph_are_set_apart_but_for_those_in_code(hooks):
    text = "Two:\n- a\n  more of a\n- b\n```\nx\n- y\n```\n1. c"
    assert hooks.spaced(text) == "Two:\n\n- a\n  more of a\n- b\n```\nx\n- y\n```\n\n1. c"
