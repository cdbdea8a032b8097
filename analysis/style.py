"""The look of the report: one style sheet for small and large screens, light and dark, and print."""

STYLE = """
:root {
  --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --tint: #f3f5f8; --line: #d0d7de; --link: #0550ae; --mark: #0969da;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6edf3; --soft: #9da7b3; --paper: #0f1318; --tint: #1a2027; --line: #323a44; --link: #79b8ff; --mark: #58a6ff;
  }
}
* { box-sizing: border-box; }
html {
  color: var(--ink); background: var(--paper); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
body { max-width: 76rem; margin: 0 auto; padding: 1rem clamp(1rem, 4vw, 2.5rem) 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, ul, ol { margin: .5rem 0 1rem; max-width: 50rem; }
a { color: var(--link); }
small, figcaption, caption, footer, .note { color: var(--soft); }
small { font-size: .85em; white-space: nowrap; }
code, pre { font: .85em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.skip { position: absolute; left: -100vw; }
.skip:focus { position: static; }
nav { margin: 1.5rem 0; padding: 1rem 1.25rem; background: var(--tint); border-radius: .5rem; }
nav h2 { font-size: 1rem; margin: 0 0 .25rem; }
nav ol { margin: 0; padding-left: 1.5rem; columns: 18rem; column-gap: 3rem; max-width: none; }
section { margin: 2.5rem 0; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.verdict { list-style: none; padding: 0; max-width: none; }
.verdict > li {
  margin: 0 0 .75rem; padding: .75rem 1rem; background: var(--tint);
  border-left: .25rem solid var(--mark); border-radius: .25rem;
}
.verdict p { margin: .25rem 0; max-width: 60rem; }
.verdict b { display: block; }
.scroll, .card { overflow-x: auto; max-width: 100%; margin: 1rem 0; }
.scroll:focus-visible, .card:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 .5rem; font-size: .9rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(50rem, calc(100vw - 2rem)); }
td small { display: block; }
th, td {
  padding: .35rem 1rem .35rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal;
}
th { font-weight: 500; }
thead th { font-weight: 600; vertical-align: bottom; border-bottom-width: 2px; }
th:first-child, td.text, th.text { text-align: left; overflow-wrap: anywhere; min-width: 9rem; max-width: 24rem; }
th:first-child { position: sticky; left: 0; background: var(--paper); max-width: min(24rem, 45vw); }
figure { margin: 1.5rem 0; }
.card { width: fit-content; margin: 0 0 .5rem; padding: .5rem; background: #ffffff; }
.card { border: 1px solid var(--line); border-radius: .5rem; }
.card img { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { .card img { max-width: none; width: min(var(--width), 40rem); } }
figcaption { font-size: .9rem; max-width: 50rem; }
figcaption b { color: var(--ink); font-weight: 600; }
summary { cursor: pointer; color: var(--link); padding: .25rem 0; }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--tint); border-radius: .5rem; }
@media print {
  :root {
    --ink: #000000; --soft: #444444; --paper: #ffffff; --tint: #f3f5f8; --line: #bbbbbb; --link: #000000; --mark: #777777;
  }
  html { font-size: 11px; }
  body { max-width: none; padding: 0; }
  nav, .skip { display: none; }
  .scroll, .card { overflow: visible; }
  .card { border: 0; padding: 0; }
  pre { white-space: pre-wrap; }
  figure, tr { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  section { margin: 1rem 0; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
