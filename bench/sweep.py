"""`python -m bench.sweep`: how times grow, beside what people use today.

Over sequence lengths from 1K to 256K (16 heads) and over 1 to 128 heads (T = 8192), with K = V = 64 and 128,
groups of value heads, and packed sequences: ours, flash-linear-attention's chunk_gdn2 and its Kimi Delta
Attention, and PyTorch's causal attention (scaled_dot_product_attention), forward and forward with backward,
bfloat16, as medians of eager calls that take turns in one process. What would take more memory than there is,
or longer than --longest, is left out. Everything goes to bench/results/sweep.csv and .json, with versions,
GPU and a digest of the sources, and to plots in docs/: time a token against T, times faster than Triton, and
the share of the byte floor. `--plot` draws them anew from sweep.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import torch
from torch.nn import functional

import gdn2_ext

from . import records, roofline, timing
from .shapes import Shape

DOCS = Path(__file__).resolve().parents[1] / "docs"
PASSES = ("forward", "forward+backward")
LENGTHS = tuple(1024 * 2**n for n in range(9))
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
WHO = {
    "gdn2_ext": "gdn2_ext",
    "fla": "chunk_gdn2, Triton",
    "kda": "chunk_kda, Triton",
    "attention": "causal attention, PyTorch",
}


def shapes() -> Iterator[tuple[str, Shape, int]]:
    """What varies, the shape, and value heads a key head."""
    for seqlen in LENGTHS:
        yield "length", Shape(1, seqlen, 16), 1
    for heads in HEADS:
        yield "heads", Shape(1, 8192, heads), 1
    for seqlen in LENGTHS[2:7]:
        yield "length, D64", Shape(1, seqlen, 16, 64, 64), 1
        yield "length, groups of 4", Shape(1, seqlen, 16), 4
        # Pairs that add up to 2048, from 1024 + 1024 to 2011 + 37.
        pairs = [1024 + n * 987 // (seqlen // 2048 - 1) for n in range(seqlen // 2048)]
        lengths = tuple(length for longer in pairs for length in (longer, 2048 - longer))
        yield "length, packed", Shape(1, seqlen, 16, lengths=lengths), 1


class Inputs:
    """Activated inputs of a shape, on the GPU, and the gradient of o."""

    def __init__(self, shape: Shape, group: int):
        generator = torch.Generator("cuda").manual_seed(1)
        self.group, self.heads = group, shape.heads // group

        def draw(
            heads: int, dim: int, dtype: torch.dtype = torch.bfloat16, uniform: bool = False
        ) -> torch.Tensor:
            function = torch.rand if uniform else torch.randn
            size = (shape.batch, shape.seqlen, heads, dim)
            return function(size, generator=generator, device="cuda", dtype=dtype)

        K, V = shape.dim_k, shape.dim_v
        self.q, self.k = (functional.normalize(draw(self.heads, K), dim=-1) for _ in range(2))
        self.v, self.do = draw(shape.heads, V), draw(shape.heads, V)
        self.g = -0.05 * draw(self.heads, K, torch.float32, uniform=True)
        self.b, self.w = draw(self.heads, K, uniform=True), draw(shape.heads, V, uniform=True)
        self.cu_seqlens = None
        if shape.lengths is not None:
            self.cu_seqlens = cases.packed_offsets(shape.lengths, dtype=torch.int64, device="cuda")


def calls_of(inputs: Inputs, fla: dict[str, Callable]) -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """By contestant: the forward, and the tensors that gradients are for."""
    x = inputs
    tensors = [x.q, x.k, x.v, x.g, x.b, x.w]
    packed = {} if x.cu_seqlens is None else {"cu_seqlens": x.cu_seqlens}
    calls = {"gdn2_ext": (lambda: gdn2_ext.chunk_gdn2(*tensors, backend="cuda", **packed)[0], tensors)}
    if x.group > 1:  # the others take as many key heads as value heads: repeating them is part of their time
        if "fla" in fla:

            def grouped():
                q, k, g, b = (t.repeat_interleave(x.group, 2) for t in (x.q, x.k, x.g, x.b))
                return fla["fla"](q, k, x.v, g, b, x.w, **packed)[0]

            calls["fla"] = (grouped, tensors)
        return calls
    if "fla" in fla:
        calls["fla"] = (lambda: fla["fla"](*tensors, **packed)[0], tensors)
    if "kda" in fla:
        beta = x.b[..., 0].contiguous()
        own = [x.q, x.k, x.v, x.g, beta]
        calls["kda"] = (lambda: fla["kda"](*own, **packed)[0], own)
    if x.cu_seqlens is None:
        leaves = [x.q, x.k, x.v]

        def attention():
            q, k, v = (t.transpose(1, 2) for t in leaves)
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        calls["attention"] = (attention, leaves)
    return calls


def with_backward(forward: Callable, leaves: list[torch.Tensor], do: torch.Tensor) -> Callable:
    def call():
        with torch.enable_grad():
            return torch.autograd.grad(forward(), leaves, do)

    return call


def quick_enough(call: Callable, longest: float) -> bool:
    """Runs it twice, so that what has to be compiled or tuned is; False where memory or time is lacking."""
    try:
        call()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return begin.elapsed_time(end) < longest


def measure(
    what: str, shape: Shape, group: int, fla: dict[str, Callable], repeats: int, longest: float
) -> Iterator[dict]:
    inputs = Inputs(shape, group)
    contestants = calls_of(inputs, fla)
    for which in PASSES:
        calls = {}
        for name, (forward, leaves) in contestants.items():
            for leaf in leaves:
                leaf.requires_grad_(which != "forward")
            call = forward if which == "forward" else with_backward(forward, leaves, inputs.do)
            with torch.no_grad():
                if quick_enough(call, longest):
                    calls[name] = call
        with torch.no_grad():
            times = timing.alternate(calls, repeats, warmup=2)
        floor = roofline.forward_bytes(shape) + (roofline.backward_bytes(shape) if which != "forward" else 0)
        for name, time in times.items():
            yield {
                "what": what, "shape": shape.label, "seqlen": shape.seqlen, "heads": shape.heads,
                "dim": shape.dim_k, "group": group, "pass": which, "implementation": name, "ms": time.median,
                "ms_p10": time.low, "ms_p90": time.high,
                "ns_a_token": 1e6 * time.median / (shape.batch * shape.seqlen),
                "floor_bytes": floor if group == 1 else None,
            }  # fmt: skip


# -- plots ---------------------------------------------------------------------------------------------------


def plot(record: dict, folder: Path) -> None:
    from matplotlib.figure import Figure

    rows = record["rows"]

    def line(what: str, which: str, who: str, x: str, y: str) -> tuple[list, list]:
        chosen = [r for r in rows if (r["what"], r["pass"], r["implementation"]) == (what, which, who)]
        chosen.sort(key=lambda row: row[x])
        return [row[x] for row in chosen], [row[y] for row in chosen]

    times = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, which in zip(times.subplots(1, 2), PASSES, strict=True):
        for who, label in WHO.items():
            axes.plot(*line("length", which, who, "seqlen", "ns_a_token"), marker="o", label=label)
        axes.set(title=which, xlabel="T (B1 H16, K = V = 128)", xscale="log", yscale="log")
        axes.set_ylabel("ns a token")
        axes.grid(alpha=0.3)
    times.axes[0].legend()
    times.suptitle(f"{record['gpu']}, bfloat16")
    times.savefig(folder / "time_per_token.png", dpi=150)

    ratios = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (what, x) in zip(
        ratios.subplots(1, 2), (("length", "seqlen"), ("heads", "heads")), strict=True
    ):
        for which in PASSES:
            ours, theirs = (
                dict(zip(*line(what, which, who, x, "ms"), strict=True)) for who in ("gdn2_ext", "fla")
            )
            common = sorted(set(ours) & set(theirs))
            axes.plot(common, [theirs[n] / ours[n] for n in common], marker="o", label=which)
        axes.axhline(1, color="grey", linewidth=1)
        axes.set(title=f"over {what}", xlabel={"seqlen": "T, H16", "heads": "heads, T8192"}[x], xscale="log")
        axes.set_ylabel("times faster than Triton")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    ratios.savefig(folder / "times_faster.png", dpi=150)

    shares = Figure(figsize=(5, 3.6), layout="constrained")
    axes = shares.subplots()
    for which in PASSES:
        for who in ("gdn2_ext", "fla"):
            seqlens, ms = line("length", which, who, "seqlen", "ms")
            _, floors = line("length", which, who, "seqlen", "floor_bytes")
            share = [f / (record["copy_tb_per_s"] * 1e9) / t for f, t in zip(floors, ms, strict=True)]
            axes.plot(seqlens, share, marker="o", label=f"{WHO[who]}, {which}")
    axes.set(xlabel="T (B1 H16, K = V = 128)", xscale="log", ylabel="byte floor / time")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    shares.savefig(folder / "share_of_floor.png", dpi=150)


def load_contestants() -> dict[str, Callable]:
    found = {"fla": records.load_fla("chunk_gdn2")}
    if found["fla"] is not None:
        from fla.ops.kda import chunk_kda

        found["kda"] = chunk_kda
    return {name: function for name, function in found.items() if function is not None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("--what", nargs="+", default=None, help="of what varies (default: everything)")
    parser.add_argument("--no-fla", action="store_true", help="without the baselines of FLA")
    parser.add_argument(
        "--longest", type=float, default=200.0, help="milliseconds of a call that is measured"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the results")
    parser.add_argument("--plots", type=Path, default=DOCS, help="folder of the plots")
    parser.add_argument("--plot", action="store_true", help="only draw the plots, of what was measured")
    options = parser.parse_args(arguments)
    if options.plot:
        plot(json.loads((options.out / "sweep.json").read_text()), options.plots)
        return 0
    if not torch.cuda.is_available():
        print("bench.sweep needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    fla = {} if options.no_fla else load_contestants()
    copy = timing.copy_terabytes_per_second()
    print(f"{torch.cuda.get_device_name()}, copy {copy:.2f} TB/s")
    rows = []
    for what, shape, group in shapes():
        if options.what is not None and what not in options.what:
            continue
        for row in measure(what, shape, group, fla, options.repeats, options.longest):
            rows.append(row)
            print(
                f"{what:20} {row['shape']:26} {row['pass']:16} {row['implementation']:9} {row['ms']:9.3f} ms "
                f"{row['ns_a_token']:9.1f} ns a token",
                flush=True,
            )
        torch.cuda.empty_cache()
        records.save(options.out, "sweep", rows, copy_tb_per_s=copy)
    plot(json.loads((options.out / "sweep.json").read_text()), options.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
