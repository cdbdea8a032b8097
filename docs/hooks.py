"""What mkdocs needs to show pages outside docs/ too, at links that also work in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/*.py",
    "examples/studies/*.yaml",
    "examples/cluster/*",
)
_ITEM = re.compile(r"([-*]|\d+\.) ")
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that its pages link to."""
    from mkdocs.structure.files import File

    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Markdown as it is written for the repository, as mkdocs understands it."""
    return linked(spaced(markdown), page.file.src_uri)


def linked(markdown: str, uri: str) -> str:
    """Links between files of the repository as links between files of the site, where docs/ is the top."""
    here = posixpath.dirname(uri if uri.startswith("examples/") or uri in OUTSIDE else f"docs/{uri}")

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1]))
        return f"]({posixpath.relpath(target.removeprefix('docs/'), posixpath.dirname(uri) or '.')}"

    return _LINK.sub(moved, markdown)


def spaced(markdown: str) -> str:
    """An empty line before each list that follows a paragraph: without it mkdocs sees none."""
    lines: list[str] = []
    in_code = False
    for line in markdown.split("\n"):
        in_code ^= line.startswith("```")
        before = lines[-1] if lines else ""
        if (
            _ITEM.match(line)
            and not in_code
            and before
            and not before.startswith(" ")
            and not _ITEM.match(before)
        ):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)
