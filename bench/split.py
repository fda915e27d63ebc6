"""`python -m bench.split`: whether cutting sequences into segments ever costs time.

Where few heads leave most of the GPU without work, chunk_gdn2 walks segments of a sequence side by side
(docs/kernels.md, csrc/api/sequence_split.cpp). Over batches, lengths and heads, K = V = 128, bfloat16: every
shape that is cut, as it is chosen and whole (`sequence_split=1`), in turn in one process, forward and forward
with backward, medians of eager calls and of CUDA graphs. The whole call has a second turn, which says how far
one and the same call is from itself. Shapes that are not cut make one and the same call.

The table goes to the screen, and with versions, GPU and a digest of the sources to
bench/results/GPU/split.csv and split.json, where several runs of the same sources add up, and to the plot
split.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import gdn2_ext
from gdn2_ext.sequence_split import Gpu, gpu, num_segments

from . import records, sweep, timing
from .records import number
from .shapes import Shape

BATCHES = (1, 2, 4)
HEADS = (1, 2, 4, 8, 16, 32)


def segments(shape: Shape, card: Gpu) -> int:
    """1 where it is not cut."""
    heads, dims = (shape.heads, shape.heads), (shape.dim_k, shape.dim_v)
    return num_segments(0, shape.seqlen, shape.batch, *heads, *dims, False, card)


def cut_shapes(card: Gpu) -> list[Shape]:
    shapes = [Shape(batch, seqlen, heads) for heads in HEADS for batch in BATCHES for seqlen in sweep.LENGTHS]
    return [shape for shape in shapes if segments(shape, card) > 1]


def measure(shape: Shape, which: str, card: Gpu, repeats: int) -> dict:
    inputs = sweep.Inputs(shape, group=1)
    tensors = [inputs.q, inputs.k, inputs.v, inputs.g, inputs.b, inputs.w]
    for x in tensors:
        x.requires_grad_(which != "forward")

    def call(sequence_split: int | None):
        def forward():
            return gdn2_ext.chunk_gdn2(*tensors, backend="cuda", sequence_split=sequence_split)[0]

        return forward if which == "forward" else sweep.with_backward(forward, tensors, inputs.do)

    calls = {"whole": call(1), "chosen": call(None), "again": call(1)}
    with torch.no_grad():
        # Short calls wait for the host, whose times scatter: more of them.
        short = timing.alternate({"whole": calls["whole"]}, repeats=3)["whole"].median
        eager, graph = timing.eager_and_graphs(calls, max(repeats, min(200, round(60 / short))))
    best = graph if len(graph) == len(calls) else eager
    return {
        "shape": shape.label, "batch": shape.batch, "seqlen": shape.seqlen, "heads": shape.heads,
        "segments": segments(shape, card), "pass": which,
        "whole_ms": eager["whole"].median, "chosen_ms": eager["chosen"].median,
        "again_ms": eager["again"].median,
        "whole_graph_ms": graph["whole"].median if "whole" in graph else None,
        "chosen_graph_ms": graph["chosen"].median if "chosen" in graph else None,
        "times_faster": best["whole"].median / best["chosen"].median,
    }  # fmt: skip


COLUMNS = ("whole ms", "chosen", "graph", "chosen")
HEADER = f"{'shape':16} {'segments':>8} {'pass':16} {' '.join(f'{x:>8}' for x in COLUMNS)} {'x':>6}"


def line(row: dict) -> str:
    return (
        f"{row['shape']:16} {row['segments']:8} {row['pass']:16} "
        f"{row['whole_ms']:8.3f} {row['chosen_ms']:8.3f} "
        f"{number(row['whole_graph_ms'], '.3f'):>8} {number(row['chosen_graph_ms'], '.3f'):>8} "
        f"{row['times_faster']:6.2f}"
    )


def plot(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, which in zip(figure.subplots(1, 2), sweep.PASSES, strict=True):
        for n, heads in enumerate(HEADS):
            for batch, marker in zip(BATCHES, "o^s", strict=True):
                rows = [
                    row
                    for row in record["rows"]
                    if (row["pass"], row["heads"], row["batch"]) == (which, heads, batch)
                ]
                rows.sort(key=lambda row: row["seqlen"])
                if rows:
                    times = [row["times_faster"] for row in rows]
                    style = {"marker": marker, "markersize": 4, "color": f"C{n}", "linewidth": 1}
                    seqlens = [row["seqlen"] for row in rows]
                    axes.plot(seqlens, times, label=f"B{batch} H{heads}", **style)
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(title=which, xlabel="T", ylabel="times faster than whole")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.split", description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    records.add_arguments(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.split needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    budget = records.Budget(options.budget)
    print(f"{torch.cuda.get_device_name()}\n{HEADER}")
    card = gpu(torch.cuda.current_device())
    rows = records.Rows(options.out, "split", ("shape", "pass"), options.again)
    for shape in cut_shapes(card):
        for which in sweep.PASSES:
            if rows.has(shape.label, which) or budget.spent():
                continue
            row = measure(shape, which, card, options.repeats)
            print(line(row), flush=True)
            rows.add([row])
        torch.cuda.empty_cache()
    if record := records.load(options.out, "split"):
        plot(record, options.out / "split.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
