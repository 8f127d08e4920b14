"""One HTML file that needs nothing else: no network, no file beside it."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from lightning_peft.report.figures import short, svg

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1040px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em;margin-bottom:.2em} h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}
p.note{color:#555} figure{display:inline-block;margin:.5em 0;vertical-align:top}
figure.half{width:49%} svg{max-width:100%;height:auto}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:14px}
th,td{padding:3px 10px;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th:first-child,td:first-child{text-align:left} th{background:#f6f6f6} table.sortable th{cursor:pointer}
table.texts td{white-space:pre-wrap;text-align:left;max-width:22em;vertical-align:top;overflow-wrap:anywhere}
pre{background:#f7f7f7;padding:1em;overflow-x:auto;font-size:12px} summary{cursor:pointer}
"""
SORT = """
document.querySelectorAll('table.sortable th').forEach((th,i)=>{th.onclick=()=>{
 const body=th.closest('table').tBodies[0],up=th.dataset.up!=='1';th.dataset.up=up?'1':'0';
 const at=[...th.parentNode.children].indexOf(th),v=r=>{const t=r.children[at].dataset.v;
 return t===''?null:isNaN(t)?t:Number(t)};
 [...body.rows].sort((a,b)=>{const x=v(a),y=v(b);if(x===null||y===null)return (x===null)-(y===null);
 return (x<y?-1:x>y?1:0)*(up?1:-1)}).forEach(r=>body.appendChild(r))}})
"""


@dataclass
class Page:
    """A page as it is put together, and its pictures by the names of their files."""

    title: str
    parts: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def note(self, text: str) -> None:
        self.parts.append(f'<p class="note">{html.escape(text)}</p>')

    def figure(self, name: str, figure: Figure, caption: str = "", kind: str = "") -> None:
        """Add a picture; `name` is that of its PNG. Two of kind `half` stand side by side."""
        self.figures[name] = figure
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self.parts.append(f'<figure id="{name}" class="{kind}">{svg(figure)}{below}</figure>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> None:
        """Add a table; of kind `sortable` a click on a heading sorts it, of kind `texts` its cells are long texts."""
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        table = f'<table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
        self.parts.append(f'<div class="scroll">{table}</div>')

    def folded(self, summary: str, text: str) -> None:
        """Add a text that a click unfolds."""
        self.parts.append(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")

    def text(self) -> str:
        """Return the whole file."""
        head = f"<meta charset=utf-8><title>{html.escape(self.title)}</title><style>{STYLE}</style>"
        body = f"<h1>{html.escape(self.title)}</h1>" + "\n".join(self.parts)
        return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{body}<script>{SORT}</script></body></html>\n"


def _cell(value: Any) -> str:
    shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else short(value)
    return f'<td data-v="{html.escape("" if value is None else str(value))}">{html.escape(shown)}</td>'
