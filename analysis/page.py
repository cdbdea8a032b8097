"""HTML as text: elements that escape whatever they are given, and one page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ensemble_kd.analysis.intervals import written
from ensemble_kd.analysis.style import STYLE

_VOID = ("img", "meta", "br")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Html:
    """Markup, as opposed to a text that is still to be escaped."""

    markup: str


Child = Html | str
"""A text stands for itself: it is escaped."""


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """An element; an attribute that is None or False is left out, and `class_` is `class`, `aria_label` `aria-label`."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children).markup}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Elements and texts one after another."""
    return Html("".join(child.markup if isinstance(child, Html) else text(child) for child in children))


def text(value: str) -> str:
    """Escaped for text and attributes; what cannot be printed becomes a replacement character."""
    printable = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value)
    return escape(printable, quote=True)


def number(value: float, shown: str) -> Html:
    """A number that programs can read in full and people as `shown`."""
    return tag("data", shown, value=repr(float(value)))


def measured(
    measure: Mapping[str, Any] | None, scale: float = 1, digits: int = 4, unit: str = "", sign: str = ""
) -> Html:
    """A number with its interval; `–` where there is none, with the reason where one is given.

    Args:
        measure, scale, digits, unit, sign: see `intervals.written`.
    """
    found = None if measure is None else written(measure, scale, digits, unit, sign)
    if measure is None or found is None:
        return tag("span", "–", title=(measure or {}).get("reason"))
    value, ends = found
    return join([number(measure["value"], value), " ", tag("small", ends)])


def table(
    headers: Sequence[Child], rows: Iterable[Sequence[Child]], caption: str, words: Sequence[int] = ()
) -> Html:
    """A table in a container of its own that scrolls sideways; the first column names its row.

    Args:
        headers: of the columns.
        rows: their cells.
        caption: what the table shows.
        words: columns of text, which is set to the left.
    """
    kinds = ["text" if number in words else None for number in range(len(headers))]
    head = [tag("th", header, scope="col", class_=kind) for header, kind in zip(headers, kinds, strict=True)]
    body = [
        tag(
            "tr",
            tag("th", first, scope="row"),
            *(tag("td", cell, class_=kind) for cell, kind in zip(rest, kinds[1:], strict=True)),
        )
        for first, *rest in rows
    ]
    made = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", tag("tr", *head)), tag("tbody", *body)
    )
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def figure(png: bytes, title: str, alt: str) -> Html:
    """A picture inside the page, on a light card, that scrolls sideways where it is too small to read."""
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    image = tag("img", src=source, alt=alt, width=width, height=height, style=f"--width:{width}px")
    card = tag("div", image, class_="card", tabindex="0", role="region", aria_label=title)
    return tag("figure", card, tag("figcaption", tag("b", title), ". ", alt))


def details(summary: str, *children: Child) -> Html:
    """What is shown when it is asked for, and in print."""
    return tag("details", tag("summary", summary), *children)


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own."""

    key: str
    title: str
    body: Sequence[Child]

    def element(self) -> Html:
        """The section with its heading."""
        heading = tag("h2", self.title, id=f"{self.key}-title")
        return tag("section", heading, *self.body, id=self.key, aria_labelledby=f"{self.key}-title")


def page(title: str, lead: Sequence[Child], sections: Sequence[Section], foot: str) -> str:
    """A whole document: what stands under the title, a list of contents, and the sections."""
    links = [tag("li", tag("a", section.title, href=f"#{section.key}")) for section in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    body = tag(
        "body",
        tag("a", "Skip to the report", href="#report", class_="skip"),
        tag("header", tag("h1", title), *lead),
        tag("nav", tag("h2", "Contents", id="contents"), tag("ol", *links), aria_labelledby="contents"),
        tag("main", *(section.element() for section in sections), id="report"),
        tag("footer", tag("p", foot)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en').markup}\n"
