"""Curves as SVG files that are the same for the same numbers."""

from __future__ import annotations

from pathlib import Path

from bench.figures import Curve


def draw(curve: Curve, folder: Path) -> Path:
    """Draws a curve into `folder`, and returns the file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "portward", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, points in curve.series.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    if not curve.linear:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y)
    axes.grid(visible=True, which="both", alpha=0.25)
    if len(curve.series) > 1:
        axes.legend()
    path = folder / f"{curve.name}.svg"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
