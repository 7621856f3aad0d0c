"""One HTML file that opens without a network: style inside, pictures as data URIs, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

__all__ = ["Page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --paper: #ffffff; --panel: #f6f7f9; --line: #d9dde3;
  --accent: #0b63a5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #a3abb8; --paper: #15181d; --panel: #1e2229;
  --line: #363c46; --accent: #7cc0f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 46rem; }
.lead { font-size: 1.08rem; color: var(--soft); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: 1.2rem 0 0; }
a { color: var(--accent); }
a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
figure { margin: 1rem 0 1.6rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
figure img.pixels { image-rendering: pixelated; width: 100%; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 0 1.4rem; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .45rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; margin: .8rem 0; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .32rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); }
th.name, td.name { text-align: left; }
td.best { font-weight: 700; color: var(--accent); }
tbody tr:hover { background: var(--panel); }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  overflow-x: auto; font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { color: var(--soft); } dd { margin: 0; }
"""


def _figure(png: bytes, alt: str, caption: str, style: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img{style} alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


class Page:
    """A page that grows section by section; :meth:`render` gives the file."""

    def __init__(self, title: str, lead: str) -> None:
        self._title, self._lead = title, lead
        self._sections: list[tuple[str, str, list[str]]] = []

    def section(self, title: str) -> None:
        anchor = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
        self._sections.append((anchor, title, []))

    def _add(self, html: str) -> None:
        self._sections[-1][2].append(html)

    def text(self, text: str) -> None:
        self._add(f"<p>{escape(text)}</p>")

    def heading(self, text: str) -> None:
        self._add(f"<h3>{escape(text)}</h3>")

    def code(self, text: str) -> None:
        self._add(f'<pre tabindex="0"><code>{escape(text)}</code></pre>')

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        self._add("<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts) + "</dl>")

    def picture(self, png: bytes, alt: str, caption: str) -> None:
        """A picture with the text that stands for it where it cannot be seen."""
        self._add(_figure(png, alt, caption, ""))

    def gallery(self, pictures: Sequence[tuple[bytes, str, str]]) -> None:
        """Pictures made of few pixels, side by side: (png, alt, caption) of each."""
        self._add(f'<div class="gallery">{"".join(_figure(*p, " class=pixels") for p in pictures)}</div>')

    def table(
        self,
        head: Sequence[str],
        lines: Sequence[Sequence[str]],
        caption: str,
        names: int = 1,
        best: Sequence[tuple[int, int]] = (),
    ) -> None:
        """A table: the first ``names`` columns are texts; cells (line, column) of ``best`` stand out."""
        marked = set(best)

        def kind(i: int) -> str:
            return ' class="name"' if i < names else ""

        top = "".join(f'<th scope="col"{kind(i)}>{escape(h)}</th>' for i, h in enumerate(head))
        body = []
        for r, line in enumerate(lines):
            cells = [f'<th scope="row" class="name">{escape(line[0])}</th>']
            for c, value in enumerate(line[1:], 1):
                style = ' class="best"' if (r, c) in marked else kind(c)
                cells.append(f"<td{style}>{escape(value)}</td>")
            body.append("<tr>" + "".join(cells) + "</tr>")
        self._add(
            f'<div class="scroll" tabindex="0"><table><caption>{escape(caption)}</caption>'
            f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )

    def render(self) -> str:
        links = "".join(f'<li><a href="#{a}">{escape(t)}</a></li>' for a, t, _ in self._sections)
        sections = "\n".join(
            f'<section aria-labelledby="{a}"><h2 id="{a}">{escape(t)}</h2>\n{chr(10).join(parts)}\n</section>'
            for a, t, parts in self._sections
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
            f'<header><h1>{escape(self._title)}</h1><p class="lead">{escape(self._lead)}</p>'
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n{sections}\n</main></body></html>\n'
        )
