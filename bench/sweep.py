"""`python -m bench.sweep`: how times grow, beside what people use today.

Over sequence lengths from 1K to 256K (16 heads) and over 1 to 128 heads (T = 8192), with K = V = 64 and 128,
groups of value heads, and packed sequences: ours, flash-linear-attention's chunk_gdn2 and its Kimi Delta
Attention, and PyTorch's causal attention (scaled_dot_product_attention), forward and forward with backward,
bfloat16, as medians of eager calls. First ours alone, then the others, ours taking turns with them in one
process. What would take more memory than there is, or longer than --longest, is left out.

Everything goes to bench/results/GPU/sweep.csv and .json, with versions, GPU and a digest of the sources, and
to the plot sweep.png beside them: time a token, the share of the byte floor, times faster than Triton. Runs
of the same sources add up: with --budget a run begins nothing new after so many seconds, and the next one
goes on with what is not recorded. `--plot` draws anew what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cases
import torch
from torch.nn import functional

import gdn2_ext

from . import fla_tuning, records, roofline, timing
from .shapes import Shape

PASSES = ("forward", "forward+backward")
LENGTHS = tuple(1024 * 2**n for n in range(9))
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


class Point(NamedTuple):
    what: str  # varies
    shape: Shape
    group: int = 1  # value heads a key head

    def contestants(self, fla: dict[str, Callable]) -> list[str]:
        """The baselines: for groups FLA's op alone, for packed sequences no attention."""
        names = ["fla"] if self.group > 1 else ["fla", "kda"]
        attention = self.group == 1 and self.shape.lengths is None
        return [name for name in names if name in fla] + ["attention"] * attention


def points() -> Iterator[Point]:
    """In the order of the baselines: Triton tunes at the first length that it meets, no short one."""
    for seqlen in sorted(LENGTHS, key=lambda n: n < 8192):
        yield Point("length", Shape(1, seqlen, 16))
    for seqlen in LENGTHS[2:7]:
        # Pairs that add up to 2048, from 1024 + 1024 to 2011 + 37.
        pairs = [1024 + n * 987 // (seqlen // 2048 - 1) for n in range(seqlen // 2048)]
        lengths = tuple(length for longer in pairs for length in (longer, 2048 - longer))
        yield Point("length, packed", Shape(1, seqlen, 16, lengths=lengths))
        yield Point("length, groups of 4", Shape(1, seqlen, 16), 4)
    for heads in HEADS:
        yield Point("heads", Shape(1, 8192, heads))
    for seqlen in LENGTHS[2:7]:
        yield Point("length, D64", Shape(1, seqlen, 16, 64, 64))


def tuned_first(chosen: list[Point], tuned: set[tuple[int, int]]) -> list[Point]:
    """tuned: heads and head sizes for which Triton need not be waited for."""
    return sorted(chosen, key=lambda point: (point.shape.heads, point.shape.dim_k) not in tuned)


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
    point: Point, which: str, names: list[str], fla: dict[str, Callable], repeats: int, longest: float
) -> list[dict]:
    """Rows of ours, and of the baselines among `names`; none where none of the names can be measured."""
    shape = point.shape
    inputs = Inputs(shape, point.group)
    contestants = calls_of(inputs, fla)
    calls = {}
    for name in names:
        forward, leaves = contestants[name]
        for leaf in leaves:
            leaf.requires_grad_(which != "forward")
        call = forward if which == "forward" else with_backward(forward, leaves, inputs.do)
        with torch.no_grad():
            if quick_enough(call, longest):
                calls[name] = call
    if set(calls) <= {"gdn2_ext"} < set(names):
        return []
    with torch.no_grad():
        times = timing.alternate(calls, repeats, warmup=2) if calls else {}
    floor = roofline.forward_bytes(shape) + (roofline.backward_bytes(shape) if which != "forward" else 0)
    return [
        {
            "what": point.what, "shape": shape.label, "seqlen": shape.seqlen, "heads": shape.heads,
            "dim": shape.dim_k, "group": point.group, "pass": which, "implementation": name,
            "ms": time.median, "ms_p10": time.low, "ms_p90": time.high,
            "ns_a_token": 1e6 * time.median / (shape.batch * shape.seqlen),
            "floor_bytes": floor if point.group == 1 else None,
        }
        for name, time in times.items()
    ]  # fmt: skip


# -- plots ---------------------------------------------------------------------------------------------------


def plot(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    def line(what: str, which: str, who: str, x: str, y: str) -> dict:
        chosen = [
            row
            for row in record["rows"]
            if (row["what"], row["pass"], row["implementation"]) == (what, which, who)
        ]
        return {row[x]: row[y] for row in sorted(chosen, key=lambda row: row[x]) if row[y] is not None}

    def draw(axes, points: dict, label: str) -> None:
        if points:
            axes.plot(
                list(points), list(points.values()), marker="o", markersize=3, linewidth=1.2, label=label
            )

    def draw_ratio(axes, what: str, which: str, x: str, label: str) -> None:
        ours, theirs = (line(what, which, who, x, "ms") for who in ("gdn2_ext", "fla"))
        draw(axes, {n: theirs[n] / ours[n] for n in ours if n in theirs}, label)

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    (forward, training, shares), (lengths, heads, kinds) = figure.subplots(2, 3)
    for axes, which in zip((forward, training), PASSES, strict=True):
        for who, label in records.IMPLEMENTATIONS.items():
            draw(axes, line("length", which, who, "seqlen", "ns_a_token"), label)
        axes.set(title=f"{which}, B1 H16", xlabel="T", yscale="log", ylabel="ns a token")
    for who in ("gdn2_ext", "fla"):
        for which in PASSES:
            label = f"{records.IMPLEMENTATIONS[who]}, {which}"
            draw(shares, line("length", which, who, "seqlen", "share_of_floor"), label)
    shares.set(title="share of the byte floor, B1 H16", xlabel="T", ylabel="byte floor / time")
    for which in PASSES:
        draw_ratio(lengths, "length", which, "seqlen", which)
        draw_ratio(heads, "heads", which, "heads", which)
    for what, label in {
        "length": "K = V = 128",
        "length, D64": "K = V = 64",
        "length, groups of 4": "4 value heads a key head",
        "length, packed": "packed sequences",
    }.items():
        draw_ratio(kinds, what, PASSES[1], "seqlen", label)
    lengths.set(title="over lengths, B1 H16", xlabel="T")
    heads.set(title="over heads, B1 T8192", xlabel="heads")
    kinds.set(title=f"{PASSES[1]}, B1 H16", xlabel="T")
    for axes in (lengths, heads, kinds):
        axes.axhline(1, color="grey", linewidth=1)
        axes.set_ylabel("times faster than Triton")
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(f"{record['gpu']}, bfloat16, K = V = 128, eager calls")
    figure.savefig(path, dpi=80)


def load_contestants(folder: Path) -> dict[str, Callable]:
    chunk_gdn2 = fla_tuning.load_fla("chunk_gdn2", folder)
    if chunk_gdn2 is None:
        return {}
    from fla.ops.kda import chunk_kda

    return {"fla": chunk_gdn2, "kda": chunk_kda}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    names = list(dict.fromkeys(point.what for point in points()))
    parser.add_argument("--what", nargs="+", choices=names, default=names, help="of what varies")
    parser.add_argument("--no-fla", action="store_true", help="without the baselines of FLA")
    parser.add_argument(
        "--longest", type=float, default=200.0, help="milliseconds of a call that is measured"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--plot", action="store_true", help="only draw the plot, of what was measured")
    records.add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.plot:
        record = records.load(options.out, "sweep")
        if record is None:
            print(f"there is no sweep.json in {options.out}: --out names another folder", file=sys.stderr)
            return 1
        plot(record, options.out / "sweep.png")
        return 0
    if not torch.cuda.is_available():
        print("bench.sweep needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    budget = records.Budget(options.budget)
    fla = {} if options.no_fla else load_contestants(options.out)
    copy = timing.copy_terabytes_per_second()
    print(f"{torch.cuda.get_device_name()}, copy {copy:.2f} TB/s")
    rows = records.Rows(options.out, "sweep", ("what", "shape", "pass", "implementation"), options.again)

    def run(point: Point, baselines: list[str]) -> None:
        """What is missing of one point."""
        for which in PASSES:
            about = (point.what, point.shape.label, which)
            missing = [name for name in baselines or ["gdn2_ext"] if not rows.has(*about, name)]
            if not missing or budget.spent():
                continue
            names = missing if not baselines else ["gdn2_ext", *missing]
            measured = measure(point, which, names, fla, options.repeats, options.longest)
            for row in measured:
                floor = row["floor_bytes"]
                row["share_of_floor"] = floor and floor / (copy * 1e9) / row["ms"]
                print(
                    f"{row['what']:20} {row['shape']:26} {which:16} {row['implementation']:9} "
                    f"{row['ms']:9.3f} ms {row['ns_a_token']:9.1f} ns a token",
                    flush=True,
                )
            torch.cuda.empty_cache()
            rows.add(measured, copy_tb_per_s=copy)
            if fla and baselines:
                fla_tuning.collect(options.out)

    chosen = [point for point in points() if point.what in options.what]
    for point in chosen:
        run(point, [])
    for point in tuned_first(chosen, fla_tuning.tuned(options.out)):
        if baselines := point.contestants(fla):
            run(point, baselines)
    if record := records.load(options.out, "sweep"):
        plot(record, options.out / "sweep.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
