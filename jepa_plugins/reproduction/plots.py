"""Plots of a report as inline SVG, whose colours follow the page's light or dark scheme."""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jepa_plugins.reproduction.manifest import Manifest
from jepa_plugins.reproduction.report_rows import Section, finite_summary, metric_label
from jepa_plugins.reproduction.results import Result, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders: matplotlib writes them, `to_svg` puts the page's variables in their places.
INK, FAINT, BASE, ACCENT = "#010203", "#010204", "#010205", "#010206"
_COLOURS = {INK: "var(--ink)", FAINT: "var(--line)", BASE: "var(--base)", ACCENT: "var(--accent)"}
# Figure 1 of Mask-JEPA: rows of the with-arms; their baselines are the without-arms (rows 38 and 39).
FIGURE_1: Mapping[str, Mapping[int, str]] = {
    "ResNet-50": {18: "panoptic_seg/PQ", 19: "segm/AP", 20: "sem_seg/mIoU"},
    "Swin-T": {21: "panoptic_seg/PQ", 22: "segm/AP", 23: "sem_seg/mIoU"},
}
WIDTH = 5.6  # inches
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "jepa_plugins",
    "font.family": ["sans-serif"],
    "font.size": 9,
    "hatch.linewidth": 0.8,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Bar:
    """An arm of figure 1: backbone, label of the metric, with or without Mask-JEPA, the paper's number and ours."""

    backbone: str
    label: str
    with_jepa: bool
    paper: float | None
    ours: Summary | None


def figure_1_bars(manifest: Manifest, results: Iterable[Result], scale: str) -> list[Bar]:
    """Numbers of Mask-JEPA's figure 1; empty when the manifest lacks its rows."""
    found = [result for result in results if result.scale == scale]
    bars = []
    for backbone, rows in FIGURE_1.items():
        for row, metric in rows.items():
            names = manifest.rows[row].experiments if row in manifest.rows else ()
            arms = [manifest.experiments[n] for n in names if metric in manifest.experiments[n].metrics][:1]
            arms += [manifest.experiments[arm.baseline] for arm in arms if arm.baseline]
            for index, arm in enumerate(arms):
                ours, _ = finite_summary([r for r in found if r.name == arm.name], metric)
                label = metric_label(metric)
                bars.append(Bar(backbone, label, index == 0, arm.metrics.get(metric), ours))
    return bars


def draw_figure_1(bars: Sequence[Bar], beside: str = "") -> str:
    """Figure 1 of Mask-JEPA: bars of PQ, AP and mIoU, without and with it; the paper's outlined, ours filled.

    Args:
        beside: text behind "ours", for numbers that cannot be compared.
    """
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        backbones = list(dict.fromkeys(bar.backbone for bar in bars))
        figure = Figure(figsize=(WIDTH, 2.75 * len(backbones)), layout="constrained")
        grid = figure.subplots(len(backbones), 1, squeeze=False, sharey=True)
        for axes, backbone in zip(grid[:, 0], backbones, strict=True):
            _draw_bars(axes, [bar for bar in bars if bar.backbone == backbone])
            axes.set_title(backbone, fontsize=9, loc="left")
        shown = [(BASE, "without"), (ACCENT, "with Mask-JEPA")]
        handles = [Patch(fc="none", ec=c, hatch="////", label=f"paper, {name}") for c, name in shown]
        if any(bar.ours for bar in bars):
            short = _short(beside)
            handles += [Patch(fc=c, ec=c, label=f"ours{short}, {name}") for c, name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5)
        return to_svg(figure, "figure-1", _figure_1_text(bars) + beside)


def _short(beside: str) -> str:
    """The scale alone, for a legend: of " (quick: minutes on ...)" it leaves " (quick)"."""
    return beside.split(":")[0] + ")" if beside else ""


def _draw_bars(axes: Axes, bars: Sequence[Bar]) -> None:
    labels = list(dict.fromkeys(bar.label for bar in bars))
    ours = any(bar.ours for bar in bars)
    places = {(False, "paper"): 0, (False, "ours"): 1, (True, "paper"): 2, (True, "ours"): 3}
    if not ours:
        places = {(False, "paper"): 0, (True, "paper"): 1}
    width = 0.84 / len(places)
    for bar in bars:
        colour = ACCENT if bar.with_jepa else BASE
        middle = labels.index(bar.label) - 0.42 + width / 2
        if bar.paper is not None:
            x = middle + width * places[bar.with_jepa, "paper"]
            axes.bar(x, bar.paper, width * 0.92, fc="none", ec=colour, hatch="////", lw=1)
            axes.text(x, bar.paper + 0.6, f"{bar.paper:.1f}", ha="center", va="bottom", fontsize=7.5)
        if bar.ours is not None:
            x, value = middle + width * places[bar.with_jepa, "ours"], bar.ours
            axes.bar(x, value.median, width * 0.92, fc=colour, ec=colour, lw=1)
            if value.seeds > 1:
                axes.plot([x, x], [value.low, value.high], color=INK, lw=1.2)
            axes.text(x, value.high + 0.6, f"{value.median:.1f}", ha="center", va="bottom", fontsize=7.5)
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)


def _figure_1_text(bars: Sequence[Bar]) -> str:
    parts = []
    for bar in bars:
        arm = "with" if bar.with_jepa else "without"
        ours = "no result" if bar.ours is None else f"{bar.ours.median:.1f}"
        paper = "not reported" if bar.paper is None else f"{bar.paper:.1f}"
        parts.append(f"{bar.backbone} {bar.label} {arm}: paper {paper}, ours {ours}")
    return "; ".join(parts)


# --- one plot a table


def draw_section(section: Section, name: str, beside: str = "") -> str:
    """A table as dots: the paper's number a hollow diamond, our median a dot on the line of its spread.

    Args:
        section: the table; name: unique on the page; beside: see `draw_figure_1`.

    Returns:
        SVG, empty when the table has no number at all.
    """
    panels: dict[str, list[tuple[str, Any]]] = {}
    for entry in section.entries:
        for line in entry.group.lines:
            if line.paper is not None or line.ours is not None:
                panels.setdefault(line.label, []).append((entry.group.title, line))
    if not panels:
        return ""
    with _style():
        from matplotlib.figure import Figure

        labels = {label: _tick_labels([title for title, _ in panel]) for label, panel in panels.items()}
        lines = sum(len(panel) for panel in panels.values())
        height = 0.4 + 0.58 * len(panels) + 0.21 * lines  # inches
        figure = Figure(figsize=(WIDTH, height))
        longest = max(len(text) for texts in labels.values() for text in texts)
        left, top = min(0.15 + 0.064 * longest, 0.55 * WIDTH), height
        for label, panel in panels.items():  # placed by hand: a layout engine would draw everything twice
            tall = 0.21 * len(panel)
            top -= 0.3 + tall
            place = (left / WIDTH, top / height, 1 - (left + 0.2) / WIDTH, tall / height)
            _draw_dots(figure.add_axes(place), panel, labels[label])
            figure.axes[-1].set_title(label, fontsize=9, loc="left", fontweight="bold", pad=3)
            top -= 0.28
        _dot_legend(figure, section, _short(beside))
        return to_svg(figure, name, f"{section.title}{beside}: the numbers of the table above")


def _draw_dots(axes: Axes, panel: Sequence[tuple[str, Any]], labels: Sequence[str]) -> None:
    for y, (_, line) in enumerate(panel):
        if line.ours is not None:
            if line.difference is not None:
                axes.plot([line.paper, line.ours.median], [y, y], color=FAINT, lw=1, zorder=1)
            axes.plot([line.ours.low, line.ours.high], [y, y], color=ACCENT, lw=2.5, zorder=2, alpha=0.6)
            axes.plot(line.ours.median, y, "o", color=ACCENT, ms=5.5, zorder=4)
        if line.paper is not None:
            axes.plot(line.paper, y, "D", mfc="none", mec=INK, ms=6, zorder=3)
    axes.set_yticks(range(len(panel)), labels, fontsize=8)
    axes.set_ylim(len(panel) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.margins(x=0.08)
    axes.grid(axis="x", color=FAINT, lw=0.5, alpha=0.6)
    axes.spines["left"].set_visible(False)
    if axes.get_xlim()[1] - axes.get_xlim()[0] < 1:  # a single number needs some room to be read off
        middle = sum(axes.get_xlim()) / 2
        axes.set_xlim(middle - 0.6, middle + 0.6)


def _dot_legend(figure: Figure, section: Section, beside: str) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], ls="", marker="D", mfc="none", mec=INK, ms=6, label="paper")]
    if section.measured:
        ours = f"ours{beside}: median, lowest to highest seed"
        handles.append(Line2D([], [], color=ACCENT, lw=2.5, marker="o", ms=5.5, label=ours))
    figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=8.5, borderaxespad=0.1)


def _tick_labels(titles: Sequence[str]) -> list[str]:
    """Titles without their last part, which mostly says the task of the whole panel, where that loses nothing."""
    short = [title.rsplit(", ", 1)[0] for title in titles]
    chosen = short if len(set(short)) == len(set(titles)) else titles
    return [textwrap.shorten(title, 48, placeholder=" ...") for title in chosen]


# --- SVG


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def to_svg(figure: Figure, name: str, text: str) -> str:
    """A figure as SVG for a page that holds several.

    Args:
        figure: of matplotlib; name: unique on the page, it prefixes every id; text: for those who cannot see it.
    """
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r">\s+<", "><", svg)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    head = f'<svg role="img" aria-label="{html.escape(text, quote=True)}" '
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", head, 1)
