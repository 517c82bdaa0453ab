"""Pictures for reports, by matplotlib, which is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..storage import readable_errors
from ..units import format_count

SUFFIXES = (".png", ".svg")
_INCHES = (7.0, 3.6)
_DOTS_PER_INCH = 160
# Two of the Okabe-Ito colours, which people who see few colours tell apart. https://jfly.uni-koeln.de/color/
_BARS, _LINE = "#0072B2", "#D55E00"


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
