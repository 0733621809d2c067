"""One HTML page that needs nothing else: style, tables that sort, figures, pictures inside. Every name is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from m2f_trainer.viz.charts import Drawing, svg

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --error: #c62f2f; --warning: #b87a00 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.verdict { font-size: 1.1rem; margin: .25rem 0 1rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid var(--line) }
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid } th button::after {
  content: " ↕"; opacity: .5 }
.tall { max-height: 30rem; overflow-y: auto } .tall th { position: sticky; top: 0; background: Canvas }
article { border: 1px solid var(--line); border-left: 5px solid var(--warning); border-radius: 4px; margin: .6rem 0;
  padding: .5rem .8rem }
article.error { border-left-color: var(--error) } article p { margin: .2rem 0 } article small { opacity: .75 }
.error b { color: var(--error) } .warning b { color: var(--warning) }
.scroll + .grid { margin-top: 1rem }
.grid { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)) }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)) }
figure { margin: 0; border: 1px solid var(--line); border-radius: 4px; overflow: hidden }
figure img { display: block; width: 100%; height: auto; background: var(--soft) }
figcaption { padding: .4rem .6rem; font-size: .85rem }
svg { width: 100%; height: auto; display: block } svg text { font-size: 11px }
"""

SORT = """
document.querySelectorAll("th button").forEach(button => button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.dataset.down = head.dataset.down === "1" ? "0" : "1";
  const value = row => { const text = row.cells[column].textContent, number = parseFloat(text);
    return text === "-" ? -1 : isNaN(number) || column === 0 ? text : number };
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    return (x < y ? -1 : x > y ? 1 : 0) * (down === "1" && column ? -1 : 1) }).forEach(row => body.append(row));
});
"""


def page(title: str, parts: Sequence[str], script: str = "") -> str:
    """The whole page; `title` is plain text, the parts are markup."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts) + (f"\n<script>{script}</script>" if script else "")
    content = f"<head>{head}<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body>"
    return f'<!doctype html>\n<html lang="en">{content}</html>\n'


def write_page(path: Path, text: str) -> Path:
    """Write a page, and the folder it goes to; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, sortable: bool = False) -> str:
    """A table of plain values, wider than a phone if it must be; sortable needs `SORT` as the page's script."""
    cell = '<th><button type="button">{}</button></th>' if sortable else "<th>{}</th>"
    top = "".join(cell.format(html.escape(text)) for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row) + "</tr>" for row in rows)
    kind = "scroll tall" if sortable else "scroll"
    return f'<div class="{kind}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(title: str, drawing: Drawing, note: str = "") -> str:
    """A drawing with its title, and a note below."""
    below = f"<figcaption>{html.escape(note)}</figcaption>" if note else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg(drawing)}{below}</figure>"


def photograph(image: Image.Image, name: str, caption: Sequence[str]) -> str:
    """A picture inside the page, its caption's lines of plain text below."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    told = "<br>".join(html.escape(line) for line in caption)
    source = f"data:image/jpeg;base64,{data}"
    return f'<figure><img alt="{html.escape(name)}" src="{source}"><figcaption>{told}</figcaption></figure>'


def grid(parts: Sequence[str], *, wide: bool = False) -> str:
    """Figures beside one another, as many as there is room for."""
    return f'<div class="grid{" wide" * wide}">' + "\n".join(parts) + "</div>"
