"""`python -m bench.op`: chunk_gdn2 against flash-linear-attention's Triton kernels and the byte floor.

Correctness first: one head of every shape against the float64 reference. Then both implementations take turns
in one process on the same inputs: medians with spread, eagerly and as CUDA graphs, and peak memory. The table
goes to the screen, and with versions, GPU and a digest of the sources to bench/results/op.csv and op.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import compare
import provenance
import torch

import gdn2_ext
from gdn2_ext import reference

from . import roofline, timing
from .shapes import OP_SHAPES, Shape

RESULTS = Path(__file__).resolve().parent / "results"


def load_fla() -> Callable | None:
    try:
        from fla.ops.gdn2 import chunk_gdn2
    except ImportError:
        return None
    return chunk_gdn2


def make_inputs(shape: Shape, seed: int) -> cases.Inputs:
    sizes = {"batch": shape.batch, "seqlen": shape.seqlen, "heads": shape.heads}
    sizes |= {"dim_k": shape.dim_k, "dim_v": shape.dim_v}
    return cases.make_inputs("layer_init", **sizes, dtype=torch.bfloat16, device="cuda", seed=seed)


def error_of_one_head(o: torch.Tensor, inputs: cases.Inputs) -> float:
    """Relative L2 error of o in the last head of the last batch element."""
    head = [x[-1:, :, -1:].detach().double().cpu().numpy() for x in inputs.tensors]
    expected, _, _ = reference.chunk_forward(*head)
    return compare.relative_error(o[-1:, :, -1:].detach(), expected)


def forward_calls(inputs: cases.Inputs, options: dict, fla: Callable | None) -> dict[str, Callable]:
    def ours():
        return gdn2_ext.chunk_gdn2(*inputs.tensors, backend="cuda", **options)

    calls = {"gdn2_ext": ours}
    if fla is not None:
        calls["fla"] = lambda: fla(*inputs.tensors, **options)
    return calls


def training_call(inputs: cases.Inputs, forward: Callable) -> Callable:
    def call():
        with torch.enable_grad():
            o, _ = forward()
            return torch.autograd.grad(o, inputs.tensors, inputs.do)

    return call


def measure(
    shape: Shape, passes: list[str], l2norm: bool, repeats: int, fla: Callable | None, seed: int
) -> list[dict]:
    inputs = make_inputs(shape, seed)
    options = {"use_qk_l2norm_in_kernel": True} if l2norm else {}
    rows = []
    with torch.no_grad():
        calls = forward_calls(inputs, options, fla)
        errors = (
            {name: error_of_one_head(call()[0], inputs) for name, call in calls.items()} if not l2norm else {}
        )
    for which in passes:
        if which == "forward":
            floor = roofline.forward_bytes(shape)
        else:
            floor = roofline.forward_bytes(shape) + roofline.backward_bytes(shape)
            for x in inputs.tensors:
                x.requires_grad_()
            calls = {name: training_call(inputs, call) for name, call in calls.items()}
        with torch.no_grad():
            eager = timing.alternate(calls, repeats)
            graphs = {}
            if which == "forward":
                graphs = {name: replay for name, call in calls.items() if (replay := timing.captured(call))}
            graph = timing.alternate(graphs, repeats) if graphs else {}
            del graphs
            memory = {name: timing.peak_bytes(call) for name, call in calls.items()}
        for name in calls:
            rows.append(
                {
                    "shape": shape.label,
                    "pass": which,
                    "l2norm": l2norm,
                    "implementation": name,
                    "ms": eager[name].median,
                    "ms_p10": eager[name].low,
                    "ms_p90": eager[name].high,
                    "graph_ms": graph[name].median if name in graph else None,
                    "peak_mib": memory[name] / 2**20,
                    "o_error": errors.get(name),
                    "floor_bytes": floor,
                    "times_faster_than_fla": eager["fla"].median / eager[name].median
                    if "fla" in eager
                    else None,
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


HEADER = (
    f"{'shape':18} {'pass':17} {'l2':2} {'who':9} {'ms':>8} {'p10-p90':>15} {'graph':>8} {'MiB':>7} "
    f"{'o error':>8} {'x FLA':>6}"
)


def line(row: dict) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    spread = f"{row['ms_p10']:.3f}-{row['ms_p90']:.3f}"
    return (
        f"{row['shape']:18} {row['pass']:17} {'y' if row['l2norm'] else 'n':2} {row['implementation']:9} "
        f"{row['ms']:8.3f} {spread:>15} {number(row['graph_ms'], '.3f'):>8} {row['peak_mib']:7.0f} "
        f"{number(row['o_error'], '.1e'):>8} {number(row['times_faster_than_fla'], '.2f'):>6}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.op", description=__doc__)
    parser.add_argument("--passes", nargs="+", choices=("forward", "forward+backward"), default=["forward"])
    parser.add_argument(
        "--shapes", nargs="+", type=int, default=range(len(OP_SHAPES)), help="indices (default: all)"
    )
    parser.add_argument("--l2norm", action="store_true", help="also with the L2 norm in the call")
    parser.add_argument("--no-fla", action="store_true", help="without the baseline")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of op.csv and op.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.op needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    fla = None if options.no_fla else load_fla()
    if fla is None and not options.no_fla:
        print("flash-linear-attention is not installed: timing gdn2_ext alone", file=sys.stderr)
    copy = timing.copy_terabytes_per_second()
    print(f"{torch.cuda.get_device_name()}, copy {copy:.2f} TB/s\n{HEADER}")
    rows = []
    for index in options.shapes:
        for l2norm in (False, True) if options.l2norm else (False,):
            rows += measure(OP_SHAPES[index], options.passes, l2norm, options.repeats, fla, options.seed)
            torch.cuda.empty_cache()
    for row in rows:
        row["floor_ms"] = row["floor_bytes"] / (copy * 1e9)
    record = {"digest": provenance.digest(), **provenance.environment(), "copy_tb_per_s": copy, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "op.json").write_text(json.dumps(record, indent=2) + "\n")
    with open(options.out / "op.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
