"""Pictures for reports, by matplotlib, which is an extra."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..storage import readable_errors
from ..units import format_count

SUFFIXES = (".png", ".svg")
_INCHES = (7.0, 3.6)
_DOTS_PER_INCH = 160
# The Okabe-Ito colours, which people who see few colours tell apart; grey instead of yellow, which is faint on white.
# https://jfly.uni-koeln.de/color/
_BARS, _LINE = "#0072B2", "#D55E00"
_COLOURS = (_BARS, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", _LINE, "#000000", "#888888")
_MARKERS = "osD^vP*Xph"  # beside the colours, of which there are fewer than families
_Place = tuple[float, float]
# Where a label may stand beside its point, right and up, in points.
_STEPS = (12, -12, 40, -40, 80, -80)
_OFFSETS = sorted(((right, up) for right in _STEPS for up in _STEPS), key=lambda offset: math.hypot(*offset))


@dataclass(frozen=True, kw_only=True)
class CostPoint:
    """A way to train: what it takes, whose family of instances it is on, and a winner's label; "" for the others."""

    hours: float
    dollars: float
    family: str
    is_tight: bool
    label: str


def require_picture(path: Path) -> None:
    """ConfigError: a suffix that is not drawn, or matplotlib is not there. To be called before long work."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--picture={path}: found {path.suffix or 'no suffix'}; expected {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--picture={path}: matplotlib is not installed; install it with pip install 'hypershard[plots]'"
        ) from error


def draw_lengths(
    path: Path, edges: Sequence[int], counts: Sequence[int], *, title: str, unit: str, context_tokens: int | None
) -> None:
    """A histogram of lengths in tokens as a PNG or SVG file: counts[i] of `unit` from edges[i] to edges[i + 1] - 1.

    A line marks `context_tokens`. Errors: as `require_picture`; StorageError: the disk refuses.
    """
    require_picture(path)
    # Figure without pyplot: no window system is asked for, no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color=_BARS)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    if context_tokens is not None:
        axes.axvline(context_tokens, color=_LINE, linestyle="--", linewidth=1.5, label=f"context {context_tokens:,}")
        axes.legend(frameon=False)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize="medium")
    counted = FuncFormatter(lambda value, _: format_count(value))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(counted)
    axes.spines[["top", "right"]].set_visible(False)
    with readable_errors(path, "writing"):
        figure.savefig(path)


def draw_costs(
    path: Path, points: Sequence[CostPoint], *, front: Sequence[CostPoint], title: str, deadline_hours: float | None
) -> None:
    """Dollars against hours as a PNG or SVG file, both on logarithmic axes.

    Families of instances have colours and shapes, hollow where memory is tight; `front` is joined by a line; a dashed
    line marks the deadline. Errors: as `draw_lengths`.
    """
    require_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _logarithmic(axes.xaxis, "")
    _logarithmic(axes.yaxis, "$")
    families = sorted({point.family for point in points})
    for family, colour, marker in zip(families, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False):
        for is_tight in (False, True):
            own = [point for point in points if point.family == family and point.is_tight == is_tight]
            axes.scatter(
                [point.hours for point in own],
                [point.dollars for point in own],
                s=34,
                marker=marker,
                facecolors="none" if is_tight else colour,
                edgecolors=colour,
                label=None if is_tight else family,
            )
    axes.plot(
        [point.hours for point in front], [point.dollars for point in front], color="#555555", linewidth=1, zorder=0
    )
    if deadline_hours is not None:
        axes.axvline(deadline_hours, color=_LINE, linestyle="--", linewidth=1, label=f"deadline {deadline_hours:g} h")
    if any(point.is_tight for point in points):
        axes.scatter([], [], s=34, facecolors="none", edgecolors="#555555", label="hollow: tight memory")
    axes.margins(x=0.08, y=0.15)  # room for labels
    axes.set_xlabel("hours")
    axes.set_ylabel("dollars")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    lines = [((one.hours, one.dollars), (other.hours, other.dollars)) for one, other in itertools.pairwise(front)]
    if deadline_hours is not None:
        lines.append(((deadline_hours, axes.get_ylim()[0]), (deadline_hours, axes.get_ylim()[1])))
    _label(figure, axes, points, lines)
    with readable_errors(path, "writing"):
        figure.savefig(path)


def _logarithmic(axis: Any, sign: str) -> None:
    """Ticks at 1, 2 and 5, with `sign` before them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: sign + format_count(value)))
    axis.set_minor_formatter(NullFormatter())


def _label(figure: Any, axes: Any, points: Sequence[CostPoint], drawn: Sequence[tuple[_Place, _Place]]) -> None:
    """Put each label inside the axes where it covers no other label, no `drawn` line, and as few points as may be."""
    from matplotlib.text import Text

    figure.draw_without_rendering()  # from here on it is known what lies where
    renderer, inside = figure.canvas.get_renderer(), axes.get_window_extent()

    def seen(place: _Place) -> _Place:
        across, up = axes.transData.transform(place)
        return float(across), float(up)

    marks = [seen((point.hours, point.dollars)) for point in points]
    lines = [place for start, end in drawn for place in _between(seen(start), seen(end))]
    boxes: list[Any] = []
    for point, mark in zip(points, marks, strict=True):
        if not point.label:
            continue
        found = []
        for offset in _OFFSETS:
            text = _annotated(axes, point, offset)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(4)
            text.remove()
            line = _between(mark, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
            is_outside = not (inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1))
            covered = box.count_overlaps(boxes) + sum(box.contains(*place) for place in lines)
            covered += sum(other.contains(*place) for other in boxes for place in line)
            hidden = sum(box.contains(*other) for other in marks)
            found.append((1000 * is_outside + 20 * covered + hidden + math.hypot(*offset) / 100, offset, box, line))
        _, offset, box, line = min(found, key=lambda one: one[0])
        boxes.append(box)
        lines += line
        _annotated(axes, point, offset)


def _between(start: _Place, end: _Place) -> list[_Place]:
    """Places on the way from `start` to `end`, without the first."""
    steps = [number / 40 for number in range(1, 41)]
    return [(start[0] + (end[0] - start[0]) * part, start[1] + (end[1] - start[1]) * part) for part in steps]


def _annotated(axes: Any, point: CostPoint, offset: tuple[int, int]) -> Any:
    text = axes.annotate(
        point.label,
        (point.hours, point.dollars),
        xytext=offset,
        textcoords="offset points",
        horizontalalignment="left" if offset[0] > 0 else "right",
        verticalalignment="bottom" if offset[1] > 0 else "top",
        fontsize="small",
        arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 0.7},
    )
    text.set_in_layout(False)
    return text
