"""Figures of the documentation, made from what ``dyexport demo`` wrote: ``python docs/figures.py out/demo``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

import dyexport
from dyexport.bench.pictures import save_png
from dyexport.bundle.plan import Segment
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.engines.onnx_file import graph_weights, read_graph
from dyexport.flops import FlopsModel
from dyexport.models.inputs import Chosen, NoisedInputs
from dyexport.presets import get_preset
from dyexport.report.width_map import WidthMap
from dyexport.report.width_map_image import render_image
from dyexport.training.data import digits

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).parent / "figures"
POINTS = 400  # timesteps of a curve
CELLS = 56  # of the heat map: fewer than `dyexport inspect --png` has, for phones
TEAL, GRAY, ORANGE = "#009485", "#888888", "#e6550d"


def main(demo: Path) -> None:
    """Write every figure. ``demo`` is the directory that ``dyexport demo -o`` was given."""
    bundle = dyexport.Bundle.open(demo / "bundle")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})
    shutil.copyfile(demo / "digits.png", OUT / "digits.png")
    save_png(render_image(WidthMap.of(bundle, CELLS)), OUT / "widths.png")
    plot_budget(bundle)
    plot_segments(bundle)
    plot_store(bundle)
    plot_tokens(demo / "work" / "calibrated")
    plot_errors(bundle)
    plot_td_lora()


def save(name: str) -> None:
    plt.tight_layout()
    plt.savefig(OUT / f"{name}.png", metadata={"Software": None})
    plt.close()


def label_axis(axes: Axes, bundle: dyexport.Bundle) -> None:
    noise, data = bundle.manifest.model.noise_to_data
    axes.set_xlim(noise, data)
    axes.set_xlabel(f"t, from noise ({noise:g}) to data ({data:g})")


def grid_of(bundle: dyexport.Bundle) -> np.ndarray:
    start, end = bundle.manifest.plan.span
    return start + (np.arange(POINTS) + 0.5) * (end - start) / POINTS


def shares(bundle: dyexport.Bundle, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the shares of heads, groups and tokens that are on: 3 x (T, L)."""
    rows = [bundle.widths.row(float(t)) for t in timesteps]
    heads, groups = bundle.widths.heads[rows].mean(-1), bundle.widths.groups[rows].mean(-1)
    stats = bundle.token_stats
    tokens = np.ones_like(heads) if stats is None else stats.mean_fraction([float(t) for t in timesteps])
    return heads, groups, tokens


def plot_budget(bundle: dyexport.Bundle) -> None:
    """Plot the FLOPs of attention and MLP at each t, and their mean, which is lambda."""
    timesteps, flops = grid_of(bundle), FlopsModel.of_preset(get_preset(bundle.manifest.model.name))
    ratio = flops.flops_ratio(*shares(bundle, timesteps))
    mean = bundle.manifest.plan.flops_ratio
    _, axes = plt.subplots(figsize=(7, 3))
    axes.plot(timesteps, ratio, color=TEAL, label="attention and MLP at t")
    axes.axhline(mean, color=ORANGE, linestyle="--", label=f"mean over t: lambda = {mean:.3f}")
    axes.set(ylim=(0, 1), ylabel="FLOPs, dense = 1")
    label_axis(axes, bundle)
    axes.legend(frameon=False)
    save("budget")


def executed(segments: tuple[Segment, ...], bundle: dyexport.Bundle, timesteps: np.ndarray) -> np.ndarray:
    """Return the FLOPs of attention and MLP that the engine of each t executes, dense being 1: (T,)."""
    flops = FlopsModel.of_preset(get_preset(bundle.manifest.model.name))
    _, _, tokens = shares(bundle, timesteps)  # (T, L)
    serving = [next(s for s in segments if t < s.end or s is segments[-1]) for t in timesteps]
    all_heads, all_groups = bundle.widths.heads.shape[-1], bundle.widths.groups.shape[-1]
    heads = np.array([[len(units) / all_heads for units in segment.heads] for segment in serving])  # (T, L)
    groups = np.array([[len(units) / all_groups for units in segment.groups] for segment in serving])  # (T, L)
    return flops.flops_ratio(heads, groups, tokens)


def plot_segments(bundle: dyexport.Bundle) -> None:
    """Plot what K = 1, 2, 4 and 8 engines execute over t, above what the routers ask for."""
    timesteps, flops = grid_of(bundle), FlopsModel.of_preset(get_preset(bundle.manifest.model.name))
    asked = flops.flops_ratio(*shares(bundle, timesteps))
    figure, grid = plt.subplots(2, 2, figsize=(7.5, 4.6), sharex=True, sharey=True)
    for axes, count in zip(grid.flat, (1, 2, 4, 8), strict=True):
        segments = make_segments(bundle.widths, bundle.token_stats, flops, PlanSettings(engines=count))
        run = executed(segments, bundle, timesteps)
        axes.fill_between(timesteps, run, color=ORANGE, alpha=0.35, linewidth=0, label="executed by the engine")
        axes.fill_between(timesteps, asked, color=TEAL, linewidth=0, label="on at t")
        axes.set(ylim=(0, 1), title=f"K = {count}: mean {run.mean():.2f} executed, {asked.mean():.2f} on")
        label_axis(axes, bundle)
        axes.label_outer()
    figure.supylabel("FLOPs of attention and MLP, dense = 1", fontsize=10)
    grid[1, 1].legend(frameon=False, fontsize=8, loc="upper left")
    save("segments")


def plot_store(bundle: dyexport.Bundle) -> None:
    """Plot which bytes of the weight store each network reads."""
    paths = bundle.engine_paths("onnx")
    _, axes = plt.subplots(figsize=(7.5, 2.8))
    networks = sorted(paths, key=lambda name: (not name.startswith("segment"), name))
    for row, network in enumerate(networks):
        path = paths[network]
        spans = [(span.offset / 1e6, span.length / 1e6) for span in graph_weights(read_graph(path), path)]
        color = GRAY if network.startswith("dense") else TEAL
        axes.broken_barh(spans, (row - 0.4, 0.8), color=color, linewidth=0)
    axes.set_yticks(range(len(networks)), networks)
    axes.invert_yaxis()
    axes.set_xlabel("bytes of graphs/weights.bin, in MB")
    axes.margins(x=0)
    save("store")


def plot_tokens(checkpoint: Path) -> None:
    """Plot noised digits, and the tokens that the MLP of the block that skips most keeps, at several t."""
    model, preset = load_dynamic(checkpoint)
    model.eval()
    data = digits("held-out")
    inputs = NoisedInputs(preset=preset, batch_size=8, seed=1, clean=Chosen(source=data, rows=torch.arange(64)))
    timesteps = (0.1, 0.3, 0.5, 0.9)
    with torch.no_grad():
        kept = [model(inputs.at(t)).tokens for t in timesteps]  # each (B, L, N)
    side = int(kept[0].shape[-1] ** 0.5)  # tokens along an edge of a digit of 8 x 8 pixels
    block = int(torch.stack(kept).mean(dim=(0, 1, 3)).argmin())
    figure, grid = plt.subplots(len(timesteps), 8, figsize=(7.5, 4.1))
    for row, t in enumerate(timesteps):
        pictures, tokens = inputs.at(t)["hidden_states"][:, 0], kept[row][:, block]  # (B, 8, 8), (B, N)
        for column, axes in enumerate(grid[row]):
            axes.imshow(pictures[column].numpy(), cmap="gray", vmin=-1.5, vmax=1.5)
            skipped = tokens[column].numpy().reshape(side, side) == 0
            red = np.kron(skipped, np.ones((8 // side, 8 // side)))  # (8, 8), as the picture
            axes.imshow(np.ma.masked_equal(red, 0), cmap="autumn_r", alpha=0.55, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(f"t = {t:g}\n{float(tokens.mean()):.0%} kept", fontsize=8)
    figure.suptitle(f"Tokens that skip the MLP of block {block} (red) in noised digits", fontsize=10)
    save("tokens")


def plot_errors(bundle: dyexport.Bundle) -> None:
    """Plot the largest error of each segment against the tolerance."""
    report = dyexport.verify(bundle)
    _, axes = plt.subplots(figsize=(7, 2.6))
    for segment in report.segments:
        axes.hlines(segment.max_abs_error, segment.start, segment.end, color=TEAL, linewidth=3)
    axes.axhline(report.tolerance, color=ORANGE, linestyle="--", label=f"tolerance {report.tolerance:g}")
    axes.set(yscale="log", ylim=(1e-7, 3e-4), ylabel="largest error")
    axes.set_title(f"{report.timesteps} timesteps, a line for each segment", fontsize=10)
    label_axis(axes, bundle)
    axes.legend(frameon=False)
    save("errors")


def plot_td_lora() -> None:
    """Plot a diagram of a linear layer with TD-LoRA."""
    _, axes = plt.subplots(figsize=(7.5, 3.1))
    axes.set(xlim=(0, 10), ylim=(0, 4.2))
    axes.axis("off")
    boxes = {
        "x": (0.2, 1.6, 0.8, GRAY),
        "W (frozen)": (3.0, 3.0, 2.2, GRAY),
        "A": (2.2, 1.2, 0.9, TEAL),
        "B1 · g1(t)": (4.4, 2.0, 1.7, TEAL),
        "B2 · g2(t)": (4.4, 1.2, 1.7, TEAL),
        "B3 · g3(t)": (4.4, 0.4, 1.7, TEAL),
        "+": (7.6, 1.6, 0.6, GRAY),
        "output": (8.9, 1.6, 1.0, GRAY),
    }
    for text, (left, bottom, width, color) in boxes.items():
        axes.add_patch(FancyBboxPatch((left, bottom), width, 0.55, boxstyle="round,pad=0.06", fc="white", ec=color))
        axes.text(left + width / 2, bottom + 0.27, text, ha="center", va="center")
    experts = [name for name in boxes if name.startswith("B")]
    arrows = [("x", "W (frozen)"), ("x", "A"), *(("A", name) for name in experts), *((name, "+") for name in experts)]
    for source, target in [*arrows, ("W (frozen)", "+"), ("+", "output")]:
        begin = (boxes[source][0] + boxes[source][2] + 0.08, boxes[source][1] + 0.27)
        end = (boxes[target][0] - 0.08, boxes[target][1] + 0.27)
        axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="->", mutation_scale=10, color=GRAY))
    axes.text(5.2, 0.02, "g = softmax(router(timestep embedding))", ha="center", fontsize=9, color=TEAL)
    save("td-lora")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
