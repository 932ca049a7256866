"""A report as one HTML page: no file beside it, no request, readable without scripts, on paper and in the dark."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from jepa_plugins.reproduction import plots
from jepa_plugins.reproduction.manifest import PAPERS
from jepa_plugins.reproduction.report_cells import (
    NO_COSTS,
    cost_lines,
    cost_table,
    facts_of,
    ours_text,
    paper_text,
    signed,
)
from jepa_plugins.reproduction.report_contents import Report
from jepa_plugins.reproduction.report_rows import (
    NO_RESULT,
    Entry,
    Line,
    RowReport,
    Section,
    sections,
)
from jepa_plugins.reproduction.results import Result

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1e23; --paper: #ffffff; --soft: #5b6470; --line: #c9ced6;
  --stripe: #f4f6f8; --base: #7d8794; --accent: #1461b8; --good: #1a6b35; --bad: #a3301f; --warn: #fff3cd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171b; --soft: #a3acb8; --line: #3e4651;
  --stripe: #1c2026; --base: #98a2af; --accent: #6db1ff; --good: #79cf93; --bad: #ff9b8a; --warn: #3d3414; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2.5rem) 4rem; max-width: 100rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; } p, ul { max-width: 48rem; } code { font-size: .88em;
  overflow-wrap: anywhere; } a { color: var(--accent); }
.scale { background: var(--warn); padding: .6rem .9rem; border-left: .3rem solid var(--bad); max-width: 48rem; }
.wide { overflow-x: auto; margin: .5rem 0; border: 1px solid var(--line); border-radius: .3rem; }
.wide:focus-visible, summary:focus-visible, a:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .6rem; color: var(--soft); font-size: .85rem; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody { border-bottom: 1px solid var(--line); } tbody th { font-weight: 400; }
.group th { font-weight: 600; background: var(--stripe); padding-top: .45rem; } .ours { text-align: right; }
.number { text-align: right; white-space: nowrap; } #rows tr { border-bottom: 1px solid var(--line); }
#rows tbody th { min-width: 14rem; max-width: 36rem; }
thead .number { white-space: normal; } .ours .soft { white-space: nowrap; }
.full .more { color: var(--good); } .full .less { color: var(--bad); } .none, .soft { color: var(--soft); }
.soft { font-weight: 400; font-size: .8rem; }
.notes { border-left: .3rem solid var(--accent); padding: .1rem .9rem; margin: .6rem 0; font-size: .9rem;
  max-width: 60rem; } .notes p { margin: .4rem 0; max-width: none; }
figure { margin: .75rem 0; max-width: 44rem; overflow-x: auto; }
figure svg { width: 100%; height: auto; display: block; } details figure svg { min-width: 26rem; }
figcaption { color: var(--soft); font-size: .85rem; } details { margin: .5rem 0; }
summary { cursor: pointer; padding: .35rem 0; } dl { display: grid; grid-template-columns: max-content 1fr;
  gap: .15rem 1rem; margin: .3rem 0 1rem; font-size: .85rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; } nav ul { columns: 16rem; padding-left: 1.2rem; max-width: none; }
.filter { display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; } .filter[hidden] { display: none; }
.filter input { font: inherit; padding: .3rem .6rem; border: 1px solid var(--soft); border-radius: .3rem;
  color: inherit; background: transparent; min-width: min(22rem, 100%); }
@media (min-width: 80rem) { .beside { display: grid; grid-template-columns: minmax(0, 1fr) 31rem; gap: 1.5rem;
  align-items: start; } .beside:has(> div > details:not([open])) { display: block; } }
@media (min-width: 40rem) { .ours { white-space: nowrap; } }
@media (max-width: 40rem) { body { font-size: 15px; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .3rem; }
  th, td { padding: .25rem .35rem; } table { font-size: .8rem; } .ours .soft { display: block; }
  .keep { position: sticky; left: .35rem; display: inline-block; max-width: calc(100vw - 3rem); } }
@media print { body { max-width: none; } .wide { overflow: visible; border: 0; } .filter { display: none; } }
"""
_SCRIPT = """
const box = document.querySelector('.filter'), word = box.querySelector('input'), said = box.querySelector('output');
const rows = [...document.querySelectorAll('#rows tbody tr')];
box.hidden = false;
word.addEventListener('input', () => {
  const words = word.value.toLowerCase().split(/\\s+/);
  for (const row of rows) row.hidden = !words.every(w => row.textContent.toLowerCase().includes(w));
  said.textContent = rows.filter(row => !row.hidden).length + ' of ' + rows.length + ' rows';
});
"""


def html(report: Report) -> str:
    """One page with everything; see `markdown` for what it holds."""
    tables = sections(report.rows)
    body = [
        _head(report),
        _contents(tables, report),
        _figure_1(report),
        *_tables(tables, report),
        _costs(report),
        _overview(report),
        _appendix(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f'<body class="{escape(report.scale)}">\n'
        + "\n".join(part for part in body if part)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def element(name: str, content: str, **attributes: str) -> str:
    """An element around content that is HTML already; attribute values are text."""
    given = "".join(f' {key.rstrip("_")}="{escape(value, quote=True)}"' for key, value in attributes.items())
    return f"<{name}{given}>{content}</{name}>"


def _head(report: Report) -> str:
    facts = "".join(element("li", escape(fact)) for fact in report.facts)
    warning = element("p", escape(report.warning), class_="scale") if report.warning else ""
    return f"<header>\n<h1>{escape(report.title)}</h1>\n{warning}\n<ul>{facts}</ul>\n</header>"


def _contents(tables: Sequence[Section], report: Report) -> str:
    links = [("figure-1-mask-jepa", "Figure 1 of Mask-JEPA")] if report.bars else []
    links += [(_id(section), section.title) for section in tables]
    links += [("costs", "Costs of training")] if _costs(report) else []
    links += [("all-rows", "All rows"), ("protocol", "Results and their protocols")]
    items = "".join(element("li", element("a", escape(text), href=f"#{target}")) for target, text in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _id(section: Section) -> str:
    text = f"{section.paper} {section.table}".lower()
    return "table-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)


# --- plots


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _figure_1(report: Report) -> str:
    if not report.bars:
        return ""
    there = sum(bar.ours is not None for bar in report.bars)
    caption = (
        "PQ, AP and mIoU on ADE20K val, Mask2Former without and with Mask-JEPA (rows 18-23, 38, 39). "
        "Hatched: the paper. "
        + (f"Filled: ours, {there} of {len(report.bars)}." if there else f"Ours: {NO_RESULT}.")
        + (f" Scale {report.scale_text}." if report.warning else "")
    )
    drawing = plots.draw_figure_1(report.bars, report.beside) if _can_plot() else _no_plots()
    head = f"Figure 1 of Mask-JEPA{report.beside}"
    return f'<h2 id="figure-1-mask-jepa">{escape(head)}</h2>\n{_figure(drawing, caption)}'


def _no_plots() -> str:
    return "<p>No plots: matplotlib is not installed.</p>"


def _section_plot(section: Section, report: Report) -> str:
    if not _can_plot():
        return _no_plots()
    title = section.title + report.beside
    drawing = plots.draw_section(section, _id(section), report.beside)
    if not drawing:
        return ""
    missing = "" if section.measured else f" The paper's numbers alone: ours {NO_RESULT}."
    picture = _figure(drawing, f"{title}.{missing}")
    opened = " open" if section.measured else ""
    return f"<details{opened}><summary>Plot of {escape(title)}</summary>{picture}</details>"


# --- tables of the papers


def _tables(tables: Sequence[Section], report: Report) -> Iterable[str]:
    paper = None
    for section in tables:
        if section.paper != paper:
            paper = section.paper
            yield element("h2", escape(PAPERS.get(paper, "Other") + report.beside))
        yield element("h3", escape(section.title + report.beside), id=_id(section))
        table = _table(section, report) + _notes(section)
        yield f'<div class="beside"><div>{table}</div><div>{_section_plot(section, report)}</div></div>'


def _wide(table: str, label: str) -> str:
    """A table that scrolls by itself where it does not fit, by keyboard too."""
    return element("div", table, class_="wide", tabindex="0", role="region", aria_label=label).replace(
        "aria_label", "aria-label"
    )


def _header(names: Mapping[str, str]) -> str:
    """Column heads; the class of the others' cells in this column is the value."""
    cells = "".join(element("th", escape(name), scope="col", class_=kind) for name, kind in names.items())
    return f"<thead><tr>{cells}</tr></thead>"


def _table(section: Section, report: Report) -> str:
    numbers = ("Paper", "Ours", "Ours \N{MINUS SIGN} paper", "Gain, paper", "Gain, ours")
    head = _header({"Metric": "", **dict.fromkeys(numbers, "number")})
    caption = section.title + report.beside
    caption += ". Ours: median, in small print lowest\N{EN DASH}highest and seeds."
    bodies = "".join(_entry(entry) for entry in section.entries)
    caption = f"<caption>{_kept(escape(caption))}</caption>"
    return _wide(f"<table>{caption}{head}{bodies}</table>", section.title)


def _kept(content: str) -> str:
    """What stays in view while a table scrolls."""
    return element("span", content, class_="keep")


def _entry(entry: Entry) -> str:
    """An experiment: a line with what it is, then its metrics."""
    group = entry.group
    beside = [f"gains over {group.baseline}"] if group.baseline else []
    beside += [part for part in (group.source, entry.origin, entry.state) if part]
    title = f'<span class="soft">row {escape(entry.numbers)}</span> {escape(group.title)} '
    title += f'<span class="soft">{escape("; ".join(beside))}</span>'
    rows = element("tr", element("th", _kept(title), scope="rowgroup", colspan="6"), class_="group")
    for line in group.lines or (Line("", "none reported"),):
        rows += element("tr", _cells(line, entry))
    return element("tbody", rows)


def _cells(line: Line, entry: Entry) -> str:
    ours = escape(ours_text(line, entry.group))
    if line.ours is not None:
        median, _, rest = ours_text(line, entry.group).partition(" (")
        parts = rest.removesuffix(")").split(", ")
        ours = escape(median) + "".join(f' <span class="soft">{escape(part)}</span>' for part in parts)
    return "".join(
        (
            element("th", escape(line.label), scope="row"),
            element(
                "td", escape(paper_text(line)), class_="number" + (" none" if line.paper is None else "")
            ),
            element("td", ours, class_="ours" + ("" if line.ours is not None else " none")),
            _signed(line.difference),
            element("td", escape(signed(line.paper_gain, digits=1)), class_="number"),
            _signed(line.gain),
        )
    )


def _signed(value: float | None) -> str:
    shown = round(value or 0.0, 2)
    kind = " more" if shown > 0 else " less" if shown < 0 else ""
    return element("td", escape(signed(value)), class_=f"number{kind}")


def _notes(section: Section) -> str:
    if not section.notes:
        return ""
    parts = (f"<p><strong>Row {escape(rows)}.</strong> {escape(note)}</p>" for rows, note in section.notes)
    return f'<div class="notes" role="note" aria-label="Contradictions in the paper">{"".join(parts)}</div>'


# --- costs, all rows, protocols


def _costs(report: Report) -> str:
    out = []
    for row in (row for row in report.rows if row.row.costs):
        where = f" ({', '.join(row.row.where)})" if row.row.where else ""
        out.append(element("h3", escape(f"Row {row.row.number}: {row.row.item}{where}{report.beside}")))
        out += [element("p", escape(text)) for text in cost_lines(row)]
        caption = f"Measured for row {row.row.number}{report.beside}"
        out.append(_cost_table(row.costs, caption) if row.costs else f'<p class="none">{NO_COSTS}</p>')
        out += [f'<div class="notes" role="note"><p>{escape(note)}</p></div>' for note in row.notes]
    if report.other_costs:
        out += [element("h3", "Other configurations"), _cost_table(report.other_costs, "Measured besides")]
    head = f"Costs of training{report.beside}"
    return "\n".join([f'<h2 id="costs">{escape(head)}</h2>', *out]) if out else ""


def _cost_table(entries: Sequence[Mapping[str, Any]], caption: str) -> str:
    names, cells = cost_table(entries)
    body = ""
    for first, *rest in cells:
        body += f'<tr><th scope="row">{escape(first)}</th>'
        body += "".join(element("td", escape(cell)) for cell in rest) + "</tr>"
    head = _header(dict.fromkeys(names, ""))
    caption = escape(caption)
    return _wide(f"<table><caption>{caption}</caption>{head}<tbody>{body}</tbody></table>", caption)


def _overview(report: Report) -> str:
    head = _header(
        dict.fromkeys(("Row", "Item", "Paper", "Where", "Kind", "Origin", "Toolkit", "State", "Result"), "")
    )
    body = "".join(_overview_row(row) for row in report.rows)
    caption = f"<caption>{escape(f'All {len(report.rows)} rows of this report{report.beside}')}</caption>"
    table = f'<table id="rows">{caption}{head}<tbody>{body}</tbody></table>'
    box = (
        '<p class="filter" hidden><label for="word">Filter rows</label>'
        '<input id="word" type="search" placeholder="mask-jepa run builds"><output aria-live="polite"></output></p>'
    )
    return f'<h2 id="all-rows">All rows{escape(report.beside)}</h2>\n{box}\n{_wide(table, "All rows")}'


def _overview_row(report: RowReport) -> str:
    row = report.row
    shown = "; ".join((*row.tests, *row.commands))
    item = escape(row.item) + (f'<br><code class="soft">{escape(shown)}</code>' if shown else "")
    item += f'<br><span class="soft">waits for {escape(row.waits_for)}</span>' if row.waits_for else ""
    item += "".join(f'<br><span class="soft">{escape(note)}</span>' for note in report.notes)
    cells = (
        ", ".join(PAPERS.get(name, name) for name in row.paper),
        ", ".join(row.where) or "-",
        row.kind,
        ", ".join(row.origin) or "-",
        ", ".join(row.toolkits) or "-",
        report.state,
        report.summary,
    )
    rest = "".join(element("td", escape(cell)) for cell in cells)
    return f'<tr><td class="number">{row.number}</td><th scope="row">{item}</th>{rest}</tr>'


def _appendix(report: Report) -> str:
    if not report.results:
        content = f"<p>{NO_RESULT.capitalize()} at the scale {escape(report.scale)}.</p>"
    else:
        content = "\n".join(_result(result) for result in report.results)
    return f'<h2 id="protocol">Results and their protocols{escape(report.beside)}</h2>\n{content}'


def _result(result: Result) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts_of(result))
    head = escape(f"{result.name}, seed {result.seed} ({result.kind})")
    return f"<details><summary>{head}</summary><dl>{facts}</dl></details>"
