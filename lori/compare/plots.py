"""Plots of adapters with matplotlib (the extra `plot`). Needs no display and does not change pyplot's current figure."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lori.compare.statistics import ModuleStatistics, total
from lori.errors import AdapterError
from lori.mask import group_of

FORMATS = ("png", "svg", "pdf")
DPI = 150
CELL_WIDTH, CELL_HEIGHT = 0.55, 0.26
"""Size of a cell of a heat map with numbers, in inches."""
FONT_SIZE, NUMBER_SIZE = 9, 7
LETTER = 0.08
"""Width of a letter of a label, in inches."""
NO_LAYER = "–"
"""Label of the row for modules that are in no layer."""


def plot_statistics(name: str, statistics: Sequence[ModuleStatistics]) -> Figure:
    """Return heat maps, layer x projection, of the norm of the delta and, for a sparse adapter, of B's density.

    A row is a layer, a column a projection. Modules with the same layer and projection (experts) share a cell.
    """
    cells: defaultdict[tuple[str, str], list[ModuleStatistics]] = defaultdict(list)
    for row in statistics:
        cells[group_of(row.module, "layer"), row.module.rpartition(".")[2]].append(row)
    layers, projections = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))

    def grid(value: Callable[[Sequence[ModuleStatistics]], float]) -> NDArray[np.float64]:
        return np.array([[value(cells[i, j]) if (i, j) in cells else math.nan for j in projections] for i in layers])

    maps = [(grid(lambda rows: total(rows).norm_delta), "norm of ΔW", ".3g")]
    if total(statistics).density < 1:
        maps.insert(0, (grid(lambda rows: 100 * total(rows).density), "kept entries of B (%)", ".1f"))
    figure = new_figure(len(maps) * (CELL_WIDTH * len(projections) + 1.8), CELL_HEIGHT * len(layers) + 1.8)
    figure.suptitle(name, parse_math=False)
    for axes, (values, title, spec) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        _heat_map(axes, values, title, "viridis", spec)
        _label(axes, projections, _layer_labels(layers))
        axes.set_xlabel("projection")
        axes.set_ylabel("layer")
    return figure


def plot_matrix(names: Sequence[str], matrix: NDArray[np.float64]) -> Figure:
    """Return a heat map of the cosines `matrix` (n, n) of the adapters `names` (n,). The colour scale is centred on zero."""
    assert matrix.shape == (len(names), len(names))
    side = CELL_WIDTH * len(names) + 0.7 + LETTER * max(map(len, names))
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    _heat_map(axes, matrix, "cosine of ΔW", "RdBu_r", "z.2f", Normalize(-1.0, 1.0))
    _label(axes, names, names)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of `path`'s suffix, one of `FORMATS`.

    Raises `AdapterError` for another suffix, or if the file cannot be written.
    """
    if (suffix := path.suffix.lower().removeprefix(".")) not in FORMATS:
        raise AdapterError(f"{path} ends in {path.suffix!r}, expected {' or '.join('.' + name for name in FORMATS)}")
    try:
        figure.savefig(path, format=suffix, dpi=DPI)
    except OSError as error:
        raise AdapterError(f"{path} cannot be written: {error.strerror}") from error


def new_figure(width: float, height: float) -> Figure:
    """Return a new figure of this size in inches, independent of pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heat_map(axes: Axes, grid: NDArray[np.float64], title: str, colours: str, spec: str, norm: Normalize | None = None) -> None:
    """Draw `grid` (rows, columns) with its numbers, a colour bar and a title; NaN stays blank."""
    largest = float(np.nanmax(grid, initial=0.0))
    norm = norm or Normalize(0.0, largest or 1.0)
    image = axes.imshow(grid, cmap=colours, norm=norm, aspect="auto")
    axes.set_title(title, fontsize=FONT_SIZE)
    for (i, j), value in np.ndenumerate(grid):
        if not math.isnan(value):
            ink = _ink(float(norm(float(value))), colours)
            axes.text(j, i, format(value, spec), ha="center", va="center", fontsize=NUMBER_SIZE, color=ink)
    bar = axes.figure.colorbar(image, ax=axes)
    bar.ax.tick_params(labelsize=FONT_SIZE)


def _ink(position: float, colours: str) -> str:
    """Return a text colour that is readable on the colour at `position` (0 to 1), by relative luminance (ITU-R BT.709)."""
    red, green, blue, _ = colormaps[colours](position)
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"


def _label(axes: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.tick_params(labelsize=FONT_SIZE)


def _layer_labels(layers: Sequence[str]) -> list[str]:
    """Return the number of each layer, or its full name if two layers have the same number."""
    counts = Counter(layer.rpartition(".")[2] for layer in layers)
    short = [layer.rpartition(".")[2] for layer in layers]
    return [(number if counts[number] == 1 else layer) or NO_LAYER for layer, number in zip(layers, short, strict=True)]
