"""The look that all figures share."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

DPI = 300
LARGE, SMALL = 7.5, 6.5  # points, of names and of numbers

INK, FAINT, REFERENCE = "#1A1A1A", "#6B6B6B", "#B0B0B0"
# Okabe and Ito's colours, told apart by colour-blind readers; the marker says the same again.
FAMILY_LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
)

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": LARGE,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


def render_png(figure: Figure, **options: Any) -> bytes:
    """A figure as a PNG file; the options are `savefig`'s."""
    content = io.BytesIO()
    figure.savefig(content, format="png", **options)
    return content.getvalue()
