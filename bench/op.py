"""`python -m bench.op`: chunk_gdn2 against flash-linear-attention's Triton kernels and the byte floor.

Correctness first: o and every gradient of one head of every shape, against float64. Then both
implementations take turns in one process on the same inputs: medians with spread, eagerly and as CUDA graphs,
and peak memory. The table goes to the screen, and with versions, GPU and a digest of the sources to
bench/results/GPU/op.csv and op.json, where several runs of the same sources add up.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import cases
import compare
import torch

import gdn2_ext

from . import fla_tuning, records, roofline, timing
from .records import number
from .shapes import OP_SHAPES, Shape


def make_inputs(shape: Shape, seed: int) -> cases.Inputs:
    sizes = {"batch": shape.batch, "seqlen": shape.seqlen, "heads": shape.heads}
    sizes |= {"dim_k": shape.dim_k, "dim_v": shape.dim_v}
    return cases.make_inputs("layer_init", **sizes, dtype=torch.bfloat16, device="cuda", seed=seed)


GRADIENTS = ("dq", "dk", "dv", "dg", "db", "dw")


def one_head(tensors) -> list[torch.Tensor]:
    """The last head of the last batch element."""
    return [x[-1:, :, -1:].detach() for x in tensors]


def exact_head(inputs: cases.Inputs, options: dict) -> list[torch.Tensor]:
    """o and the gradients of `one_head` in float64, by the torch backend."""
    leaves = [x.double().requires_grad_() for x in one_head(inputs.tensors)]
    with torch.enable_grad():
        o, _ = gdn2_ext.chunk_gdn2(*leaves, backend="torch", **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, one_head([inputs.do])[0].double())]


def errors_of_one_head(call: Callable, exact: list[torch.Tensor]) -> dict[str, float]:
    """Relative L2 errors of o and the gradients by name, of a call that gives them."""
    results = one_head(call())
    return {
        name: compare.relative_error(x, y)
        for name, x, y in zip(("o", *GRADIENTS), results, exact, strict=True)
    }


def forward_calls(inputs: cases.Inputs, options: dict, fla: Callable | None) -> dict[str, Callable]:
    def ours():
        return gdn2_ext.chunk_gdn2(*inputs.tensors, backend="cuda", **options)

    calls = {"gdn2_ext": ours}
    if fla is not None:
        calls["fla"] = lambda: fla(*inputs.tensors, **options)
    return calls


def training_call(inputs: cases.Inputs, forward: Callable) -> Callable:
    """o and the gradients, given the gradient of o."""

    def call():
        with torch.enable_grad():
            o, _ = forward()
            return (o.detach(), *torch.autograd.grad(o, inputs.tensors, inputs.do))

    return call


def measure(
    shape: Shape, passes: list[str], l2norm: bool, repeats: int, fla: Callable | None, seed: int
) -> list[dict]:
    inputs = make_inputs(shape, seed)
    options: dict = {"use_qk_l2norm_in_kernel": True} if l2norm else {}
    if shape.lengths is not None:
        options["cu_seqlens"] = cases.packed_offsets(shape.lengths, dtype=torch.int64, device="cuda")
    forward = forward_calls(inputs, options, fla)
    for x in inputs.tensors:
        x.requires_grad_()
    training = {name: training_call(inputs, call) for name, call in forward.items()}
    print(f"... {shape.label}: errors, and whatever has to be tuned", file=sys.stderr)
    exact = exact_head(inputs, options)
    errors = {name: errors_of_one_head(call, exact) for name, call in training.items()}
    del exact
    rows = []
    for which in passes:
        calls = forward if which == "forward" else training
        floor = roofline.forward_bytes(shape)
        if which != "forward":
            floor += roofline.backward_bytes(shape)
        with torch.no_grad():
            eager, graph = timing.eager_and_graphs(calls, repeats)
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
                    **{f"{tensor}_error": error for tensor, error in errors[name].items()},
                    "floor_bytes": floor,
                    "times_faster_than_fla": ratio(eager, name),
                    "graph_times_faster_than_fla": ratio(graph, name),
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def ratio(times: dict[str, timing.Time], name: str) -> float | None:
    return times["fla"].median / times[name].median if "fla" in times and name in times else None


HEADER = (
    f"{'shape':14} {'pass':16} {'l2':2} {'who':8} {'ms':>7} {'p10-p90':>13} {'graph':>7} {'MiB':>6} "
    f"{'o':>7} {'worst d':>7} {'x FLA':>6} {'graph':>6}"
)


def line(row: dict) -> str:
    spread = f"{row['ms_p10']:.3f}-{row['ms_p90']:.3f}"
    gradients = max(row[f"{name}_error"] for name in GRADIENTS)
    return (
        f"{row['shape']:14} {row['pass']:16} {'y' if row['l2norm'] else 'n':2} {row['implementation']:8} "
        f"{row['ms']:7.3f} {spread:>13} {number(row['graph_ms'], '.3f'):>7} {row['peak_mib']:6.0f} "
        f"{row['o_error']:7.1e} {gradients:7.1e} {number(row['times_faster_than_fla'], '.2f'):>6} "
        f"{number(row['graph_times_faster_than_fla'], '.2f'):>6}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.op", description=__doc__)
    passes = ("forward", "forward+backward")
    parser.add_argument("--passes", nargs="+", choices=passes, default=passes)
    parser.add_argument(
        "--shapes", nargs="+", type=int, default=range(len(OP_SHAPES)), help="indices (default: all)"
    )
    parser.add_argument("--l2norm", action="store_true", help="also with the L2 norm in the call")
    parser.add_argument("--no-fla", action="store_true", help="without the baseline")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    records.add_arguments(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.op needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    budget = records.Budget(options.budget)
    fla = None if options.no_fla else fla_tuning.load_fla("chunk_gdn2", options.out)
    who = ["gdn2_ext"] if fla is None else ["gdn2_ext", "fla"]
    copy = timing.copy_terabytes_per_second()
    print(f"{torch.cuda.get_device_name()}, copy {copy:.2f} TB/s\n{HEADER}")
    rows = records.Rows(options.out, "op", ("shape", "l2norm", "pass", "implementation"), options.again)
    for shape, l2norm in itertools.product(
        (OP_SHAPES[index] for index in options.shapes), (False, True) if options.l2norm else (False,)
    ):
        about = itertools.product((shape.label,), (l2norm,), options.passes, who)
        if all(rows.has(*x) for x in about) or budget.spent():
            continue
        measured = measure(shape, options.passes, l2norm, options.repeats, fla, options.seed)
        for row in measured:
            row["floor_ms"] = row["floor_bytes"] / (copy * 1e9)
        torch.cuda.empty_cache()
        rows.add(measured, copy_tb_per_s=copy)
        if fla is not None:
            fla_tuning.collect(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
