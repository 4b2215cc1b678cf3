"""The two pictures a run leaves behind: its loss and its experts' load."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv3_jax.training.metrics import MetricsError, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_BLUE, _ORANGE, _GREEN, _BLACK, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#222222", "#CC79A7"


def _new_figure(width: float, height: float) -> "Figure":
    """An Agg figure outside pyplot's global state: safe in any thread, needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path | str) -> None:
    """Writes the PNG whole or not at all."""
    path = Path(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise MetricsError(f"cannot write {path}: {error.strerror}") from error


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one key."""
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = zip(*known, strict=True) if known else ((), ())
    return np.array(steps, float), np.array(values, float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the run, centred, but for the end, where it trails.

    The window is shorter at the start, in proportion to the step, so that the steep first steps
    are not flattened.
    """
    index = np.arange(len(values))
    left = np.minimum(len(values) // 100, index // 5)
    right = np.minimum(left, len(values) - 1 - index)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + right + 1] - total[index - left]) / (left + right + 1)


def _draw_curve(axes: "Axes", rows: list[dict[str, Any]], key: str, label: str, colour: str) -> Any:
    """Draws every step pale and the running mean strong; returns the mean's values."""
    steps, values = _series(rows, key)
    if not len(steps):
        return values
    smooth = _smooth(values)
    if len(values) >= 100:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, smooth, color=colour, linewidth=1.8, label=label, marker=marker)
    return smooth


def _loss_limits(shown: list[float]) -> tuple[float, float]:
    """Limits that keep the end of training legible: room around it, the start on top."""
    low, high = min(shown), max(shown)
    margin = 0.05 * max(high - low, 0.1)
    return low - margin, high + margin


def _scale_steps(axes: "Axes", last: int) -> None:
    """A linear axis of whole steps, or from 300 steps on the last three to four decades."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_xlabel("optimizer step")
    if last < 300:
        axes.set_xlim(0, last + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_xscale("log")
    axes.set_xlim(max(10.0 ** math.floor(math.log10(last / 1000)), 1.0), last * 1.05)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def plot_loss(
    metrics_jsonl: Path | str,
    path: Path | str,
    *,
    baselines: dict[str, float] | None = None,
    held_out: Sequence[tuple[int, float]] | None = None,
) -> None:
    """Draws the training losses over the steps into a PNG.

    Main and MTP loss as a running mean over the single steps, held-out loss as points, baselines
    as dashed horizontal lines with their values. From 300 steps on the steps are logarithmic, so
    that neither the fall at the start nor the slow end is lost; the losses stay linear.

    Args:
      metrics_jsonl: the run's `metrics.jsonl`.
      path: the PNG to write.
      baselines: name and loss in nats a token, such as {"bigram": 4.1}.
      held_out: (step, loss in nats a token) of the held-out evaluations.

    Raises:
      MetricsError: no finite loss to draw, or a file that cannot be read or written.
    """
    rows = read_jsonl(metrics_jsonl)
    if not len(_series(rows, "main_loss")[0]):
        raise MetricsError(f"{metrics_jsonl} has no finite main_loss to plot")
    figure = _new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    shown = list(_draw_curve(axes, rows, "main_loss", "main loss", _BLUE))
    shown += list(_draw_curve(axes, rows, "mtp_loss", "MTP loss", _ORANGE))
    points = [(step, loss) for step, loss in held_out or () if math.isfinite(loss)]
    if points:
        steps, losses = zip(*points, strict=True)
        label = f"held-out loss (last {losses[-1]:.3f})"
        axes.plot(steps, losses, color=_BLACK, marker="o", markersize=5, linewidth=1.0, label=label)
        shown += losses
    for index, (name, value) in enumerate((baselines or {}).items()):
        colour = (_GREEN, _PURPLE)[index % 2]
        label = f"{name} ({value:.3f})"
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.6, label=label)
        shown.append(value)
    _scale_steps(axes, max([row["step"] for row in rows] + [step for step, _ in points]))
    axes.set_ylim(*_loss_limits(shown))
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Training loss")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_expert_load(
    load: np.ndarray, path: Path | str, *, layer_names: Sequence[str | int] | None = None
) -> None:
    """Draws each expert's share of the tokens as a heatmap of layers by experts into a PNG.

    The colours run from blue (0, idle) through white (1, its fair share) to red (2 and more) and
    mean the same in every picture. Small maps carry their values; the right margin shows each
    layer's maximum, which is its MaxVio plus 1.

    Args:
      load: [layers, experts], tokens of an expert over the layer's mean: 1.0 is balanced.
      path: the PNG to write.
      layer_names: one for each row, by default 0, 1, ...

    Raises:
      ValueError: `load` is not a non-empty matrix, or the names do not fit it.
      MetricsError: the file cannot be written.
    """
    from matplotlib.colors import Normalize

    load = np.asarray(load, np.float64)
    if load.ndim != 2 or not load.size:
        raise ValueError(f"load of shape {load.shape} must be [layers, experts] (plot_expert_load)")
    layers, experts = load.shape
    names = [str(name) for name in (range(layers) if layer_names is None else layer_names)]
    if len(names) != layers:
        raise ValueError(f"{len(names)} layer_names must be {layers} (plot_expert_load)")
    height = min(max(1.6 + 0.32 * layers, 2.6), 9.0)
    figure = _new_figure(min(max(3.5 + 0.34 * experts, 7.0), 12.0), height)
    axes = figure.add_subplot()
    image = axes.imshow(
        load, cmap="RdBu_r", norm=Normalize(0.0, 2.0), aspect="auto", interpolation="nearest"
    )
    _label_cells(axes, load)
    _label_heatmap(axes, load, names)
    extend = "max" if load.max() > 2.0 else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=4 * height, extend=extend)
    bar.set_label("tokens / mean of the layer")
    axes.set_title("Expert load (1.0 = balanced)")
    _save(figure, path)


def _label_cells(axes: "Axes", load: np.ndarray) -> None:
    """Writes the value into each cell where there is room for it."""
    layers, experts = load.shape
    if experts > 16 or layers > 16:
        return
    for layer in range(layers):
        for expert in range(experts):
            value = load[layer, expert]
            colour = "white" if abs(value - 1.0) > 0.65 else _BLACK
            axes.text(
                expert, layer, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8
            )


def _label_heatmap(axes: "Axes", load: np.ndarray, names: list[str]) -> None:
    """Ticks at whole layers and experts, thinned to what fits, and each layer's maximum."""
    layers, experts = load.shape
    every_layer = max(1, math.ceil(layers / 30))
    every_expert = max(1, 2 ** math.ceil(math.log2(max(experts / 16, 1))))
    rows = np.arange(0, layers, every_layer)
    axes.set_yticks(rows, [names[row] for row in rows])
    axes.set_xticks(np.arange(0, experts, every_expert))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.tick_params(length=2)
    maxima = axes.secondary_yaxis("right")
    maxima.set_yticks(rows, [f"{load[row].max():.2f}" for row in rows])
    maxima.tick_params(length=0, labelsize=8)
    maxima.set_ylabel("largest in the layer", fontsize=8, labelpad=8)
