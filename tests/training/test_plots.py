"""The figures' content, read from the figure object before it is saved, and the PNG itself."""

import json
import struct

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from dsv3_jax.training import plots
from dsv3_jax.training.metrics import MetricsError
from dsv3_jax.training.plots import plot_expert_load, plot_loss


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, still saving them."""
    saved = []
    save = plots._save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def write_metrics(path, steps, mtp=True):
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            loss = 3.0 + 5.0 / step
            values = {"step": step, "main_loss": loss, "mtp_loss": loss + 1 if mtp else None}
            file.write(json.dumps(values) + "\n")
    return path


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def lines_by_label(axes):
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_loss_picture_has_every_curve(tmp_path, figures):
    metrics = write_metrics(tmp_path / "metrics.jsonl", 500)
    path = tmp_path / "loss.png"
    plot_loss(metrics, path, baselines={"bigram": 4.25}, held_out=[(250, 3.5), (400, float("nan"))])
    (axes,) = figures[0].axes
    lines = lines_by_label(axes)
    assert list(lines) == [
        "main loss",
        "MTP loss",
        "held-out loss (last 3.500)",
        "bigram (4.250)",
    ]
    baseline = lines["bigram (4.250)"]
    assert baseline.get_linestyle() == "--" and set(baseline.get_ydata()) == {4.25}
    assert list(lines["held-out loss (last 3.500)"].get_xdata()) == [250]
    low, high = axes.get_ylim()
    assert low < 3.01 and high > 9.0  # the last main loss and the first MTP loss
    assert axes.get_xscale() == "log" and axes.get_legend() is not None
    assert min(png_size(path)) >= 700
    assert not list(tmp_path.glob("*.tmp"))


def test_loss_picture_without_mtp_or_baselines(tmp_path, figures):
    plot_loss(write_metrics(tmp_path / "m.jsonl", 20, mtp=False), tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert list(lines_by_label(axes)) == ["main loss"]
    assert axes.get_xscale() == "linear"
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata()[:2], [8.0, 5.5])
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_loss_picture_skips_nan_steps_and_a_cut_line(tmp_path, figures):
    metrics = write_metrics(tmp_path / "m.jsonl", 4)
    lines = metrics.read_text().splitlines()
    lines[1] = '{"step": 2, "main_loss": null, "mtp_loss": null}'
    metrics.write_text("\n".join(lines) + '\n{"step": 5, "ma')
    plot_loss(metrics, tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert list(axes.get_lines()[0].get_xdata()) == [1, 3, 4]


def test_running_mean_keeps_level_and_first_value():
    rng = np.random.default_rng(0)
    values = 2.0 + rng.standard_normal(5000)
    smooth = plots._smooth(values)
    assert len(smooth) == 5000 and smooth[0] == values[0]
    # Means of 101 values in the middle and of 51 at the very end.
    assert smooth[2500] == pytest.approx(values[2450:2551].mean())
    assert smooth[-1] == pytest.approx(values[-51:].mean())
    np.testing.assert_allclose(plots._smooth(np.full(700, 3.0)), 3.0)


def test_loss_picture_needs_a_loss(tmp_path):
    empty = tmp_path / "metrics.jsonl"
    empty.write_text("")
    with pytest.raises(MetricsError, match="no finite main_loss"):
        plot_loss(empty, tmp_path / "loss.png")
    with pytest.raises(MetricsError, match="cannot read"):
        plot_loss(tmp_path / "absent.jsonl", tmp_path / "loss.png")
    metrics = write_metrics(tmp_path / "m.jsonl", 3)
    with pytest.raises(MetricsError, match="cannot write .*loss.png"):
        plot_loss(metrics, tmp_path / "absent" / "loss.png")


@pytest.mark.parametrize("shape", [(3, 16), (58, 256), (1, 4)])
def test_load_picture_is_centred_at_one_with_whole_ticks(tmp_path, figures, shape):
    layers, experts = shape
    load = np.random.default_rng(1).lognormal(0.0, 0.3, shape)
    load /= load.mean(axis=1, keepdims=True)
    names = list(range(3, 3 + layers))
    path = tmp_path / "expert_load.png"
    plot_expert_load(load, path, layer_names=names)
    axes, bar = figures[0].axes
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), load)
    red, green, blue, _ = image.cmap(image.norm(1.0))
    assert min(red, green, blue) > 0.95  # balanced is white
    assert image.cmap(image.norm(0.2))[2] > image.cmap(image.norm(0.2))[0]  # idle is blue
    assert image.cmap(image.norm(1.8))[0] > image.cmap(image.norm(1.8))[2]  # hot is red
    ticks = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert ticks == [names[int(tick)] for tick in axes.get_yticks()]
    assert len(ticks) <= 30 and ticks[0] == 3
    experts_shown = axes.get_xticks()
    assert len(experts_shown) <= 16 and all(tick == int(tick) for tick in experts_shown)
    assert len(axes.texts) == (layers * experts if experts <= 16 else 0)
    assert axes.get_xlabel() == "expert" and axes.get_ylabel() == "layer"
    assert bar.get_ylabel() == "tokens / mean of the layer"
    assert any(isinstance(artist, QuadMesh) for artist in bar.collections)
    width, height = png_size(path)
    assert 900 <= width <= 1800 and 350 <= height <= 1400


def test_load_picture_marks_what_lies_beyond_the_scale(tmp_path, figures):
    for hottest in (1.5, 3.0):
        load = np.array([[hottest, 2.0 - hottest / 2, 1.0 - hottest / 4]])
        plot_expert_load(load, tmp_path / "load.png")
    extends = [figure.axes[0].get_images()[0].colorbar.extend for figure in figures]
    assert extends == ["neither", "max"]
    (maxima,) = figures[1].axes[0].child_axes
    assert [label.get_text() for label in maxima.get_yticklabels()] == ["3.00"]


def test_load_picture_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"\(4,\) must be \[layers, experts\]"):
        plot_expert_load(np.ones(4), tmp_path / "load.png")
    with pytest.raises(ValueError, match="1 layer_names must be 2"):
        plot_expert_load(np.ones((2, 4)), tmp_path / "load.png", layer_names=["1"])


def test_pyplot_is_never_imported(tmp_path):
    import subprocess
    import sys

    metrics = write_metrics(tmp_path / "m.jsonl", 5)
    code = (
        "import sys; from dsv3_jax.training.plots import plot_loss\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot_loss({str(metrics)!r}, {str(tmp_path / 'loss.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
