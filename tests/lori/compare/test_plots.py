"""Plots: the labels of their axes, and their files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lori.compare.plots import FORMATS, plot_matrix, plot_statistics, save_figure
from lori.compare.statistics import ModuleStatistics, statistics, total
from lori.errors import AdapterError
from tests.lori.adapters import SHAPES, make_adapter

# Cosines of -1, of almost zero, and of a delta that is zero.
MATRIX = np.array([[1.0, -0.001, np.nan], [-0.001, 1.0, -1.0], [np.nan, -1.0, 1.0]])
NAMES = ["math", "intent", "safety-of-$x$_and_$y"]


def of_modules(*names: str) -> list[ModuleStatistics]:
    """Return the statistics of an adapter with these modules."""
    return statistics(make_adapter("a", dict.fromkeys(names, (8, 5)), tuple({name.rpartition(".")[2] for name in names})))


def labels(figure: Figure, axes: int = 0) -> tuple[list[str], list[str]]:
    """Return the labels of the columns and of the rows of a heat map."""
    own = figure.axes[axes]
    return [t.get_text() for t in own.get_xticklabels()], [t.get_text() for t in own.get_yticklabels()]


def grid(figure: Figure, axes: int) -> NDArray[np.float64]:
    (image,) = figure.axes[axes].images
    return np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan)


def numbers(figure: Figure, axes: int) -> list[str]:
    return [text.get_text() for text in figure.axes[axes].texts]


def a_statistics_figure() -> Figure:
    return plot_statistics("an adapter", statistics(make_adapter("a", targets=("q_proj", "up_proj", "o_proj"))))


def a_matrix_figure() -> Figure:
    return plot_matrix(NAMES, MATRIX)


FIGURES = [a_statistics_figure, a_matrix_figure]


def test_the_density_map_is_drawn_only_if_entries_are_zero() -> None:
    titles = [axes.get_title() for axes in a_statistics_figure().axes if axes.images]
    assert titles == ["kept entries of B (%)", "norm of ΔW"]
    whole = [replace(row, num_kept=row.num_entries) for row in of_modules("model.layers.0.q_proj")]
    assert [axes.get_title() for axes in plot_statistics("a", whole).axes if axes.images] == ["norm of ΔW"]


def test_rows_are_layers_and_columns_projections() -> None:
    figure = a_statistics_figure()
    for axes in (0, 1):
        columns, rows = labels(figure, axes)
        assert columns == ["q_proj", "up_proj", "o_proj"]
        assert rows == ["0", "1"]
        assert (figure.axes[axes].get_xlabel(), figure.axes[axes].get_ylabel()) == ("projection", "layer")
    assert figure.get_suptitle() == "an adapter"


def test_cells_hold_density_and_norm_and_are_empty_without_a_module() -> None:
    rows = statistics(make_adapter("a", targets=("q_proj", "up_proj", "o_proj")))
    figure = plot_statistics("a", rows)
    by_name = {row.module: row for row in rows}
    assert "layers.1.o_proj" not in SHAPES
    for i in (0, 1):
        for j, projection in enumerate(("q_proj", "up_proj", "o_proj")):
            row = by_name.get(f"layers.{i}.{projection}")
            assert grid(figure, 0)[i, j] == pytest.approx(100 * row.density if row else np.nan, nan_ok=True)
            assert grid(figure, 1)[i, j] == pytest.approx(row.norm_delta if row else np.nan, nan_ok=True)
    assert len(numbers(figure, 0)) == len(numbers(figure, 1)) == len(rows)
    assert f"{100 * rows[0].density:.1f}" in numbers(figure, 0)


def test_experts_of_a_layer_share_a_cell() -> None:
    rows = of_modules("layers.0.experts.0.up_proj", "layers.0.experts.1.up_proj", "layers.1.experts.0.up_proj")
    figure = plot_statistics("experts", rows)
    assert labels(figure) == (["up_proj"], ["0", "1"])
    assert grid(figure, 0)[0, 0] == pytest.approx(100 * total(rows[:2]).density)
    assert grid(figure, 1)[0, 0] == pytest.approx(np.hypot(rows[0].norm_delta, rows[1].norm_delta))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "columns", "rows"),
    [
        (["layers.3.q_proj"], ["q_proj"], ["3"]),
        (["lm_head"], ["lm_head"], ["–"]),
        (["layers.10.q_proj", "layers.2.q_proj", "lm_head"], ["lm_head", "q_proj"], ["–", "2", "10"]),
        (["encoder.0.q_proj", "decoder.0.q_proj"], ["q_proj"], ["decoder.0", "encoder.0"]),
        (["layers.0.$odd^{name"], ["$odd^{name"], ["0"]),
    ],
    ids=["one module", "no layer", "numbers in order", "two stacks of layers", "what looks like mathematics"],
)
def test_names_of_every_kind_are_drawn(modules: list[str], columns: list[str], rows: list[str], tmp_path: Path) -> None:
    figure = plot_statistics("a_$name^{", of_modules(*modules))
    assert labels(figure) == (columns, rows)
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


def test_an_empty_adapter_is_drawn(tmp_path: Path) -> None:
    empty = ModuleStatistics("layers.0.q_proj", 8, 24, 0, 8, 0.0, 0.0, 0.0)
    save_figure(figure := plot_statistics("empty", [empty]), tmp_path / "a.png")
    assert numbers(figure, 0) == ["0.0"]


def test_the_matrix_is_labelled_and_centred_on_zero() -> None:
    figure = a_matrix_figure()
    assert labels(figure) == (NAMES, NAMES)
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0)
    assert numbers(figure, 0) == ["1.00", "0.00", "0.00", "1.00", "-1.00", "-1.00", "1.00"]
    np.testing.assert_array_equal(grid(figure, 0), MATRIX)


@pytest.mark.parametrize("make", FIGURES)
def test_numbers_contrast_with_their_background(make: Callable[[], Figure]) -> None:
    """WCAG 2 requires a contrast of at least 3, except for running text."""
    figure = make()
    for axes in figure.axes:
        for text in axes.texts:
            (image,) = axes.images
            column, row = map(int, text.get_position())
            back = luminance(image.to_rgba(np.asarray(image.get_array()))[row, column])
            front = luminance(np.array(to_rgba(text.get_color())))
            assert (max(back, front) + 0.05) / (min(back, front) + 0.05) > 3


def luminance(colour: NDArray[np.float64]) -> float:
    """Return the relative luminance of a colour (4,) by WCAG 2, 0 to 1."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear[:3] @ (0.2126, 0.7152, 0.0722))


@pytest.mark.slow
@pytest.mark.parametrize("make", FIGURES)
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_a_figure_is_saved_in_the_format_of_its_suffix(make: Callable[[], Figure], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"figure{suffix}"
    save_figure(make(), path)
    content = path.read_bytes()
    if suffix == ".svg":
        assert b"<svg" in content
        assert content.rstrip().endswith(b"</svg>")
    elif suffix == ".pdf":
        assert content.startswith(b"%PDF-")
        assert content.rstrip().endswith(b"%%EOF")
    else:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert np.ptp(np.asarray(image.convert("L"), int)) > 200


@pytest.mark.parametrize("name", ["figure.jpg", "figure", "figure.png.gz", ".png"])
def test_an_unknown_suffix_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"expected \.png or \.svg or \.pdf"):
        save_figure(a_matrix_figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert FORMATS == ("png", "svg", "pdf")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"missing/figure.png cannot be written: No such file"):
        save_figure(a_matrix_figure(), tmp_path / "missing" / "figure.png")
