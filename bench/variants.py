"""`python -m bench.variants`: what options and sizes cost, ours alone.

    dtype, size    float16 beside bfloat16, K = V = 64 beside 128, at B4 T4096 H16
    fused          L2 norm, decay gate and gate sigmoids inside the call, raw g in float32 and in 16 bits as a
                   layer's projection is, against the plain call on activated tensors, and against the same
                   made outside in PyTorch
    keep           disable_recompute, at B4 T4096 H16
    groups         4 value heads a key head (H4, HV16), against q, k, g and b repeated
    linear         nanoseconds and memory a token and head at T = 262144 beside T = 16384
    small          T = 64, B1, H4, forward, eager under no_grad and as a CUDA graph: the host's time, beside
                   that of a call of PyTorch's own; and without the events, whose recording takes the host as
                   long as a launch: calls in a row

The calls of a topic take turns in one process: medians of eager calls, and of CUDA graphs; and the most
memory that a call allocates beyond its inputs. The table goes to the screen, and with versions, GPU and a
digest of the sources to bench/results/GPU/variants.csv and .json, where the topics of several runs of the
same sources add up. small comes last, since a host may take a minute of work to be as quick as it gets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

import gdn2_ext

from . import records, timing
from .records import number

EVERYTHING = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_gate_sigmoid_in_kernel": True,
}


def raw_tensors(batch: int, seqlen: int, heads: int, value_heads: int, dim: int, dtype: torch.dtype) -> dict:
    """Projections as a layer has them, and A_log and dt_bias."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    key, value = (batch, seqlen, heads, dim), (batch, seqlen, value_heads, dim)
    tensors = {
        "q": normal(*key),
        "k": normal(*key),
        "v": normal(*value),
        "g": normal(*key, dtype=torch.float32),
    }
    tensors |= {"b": normal(*key), "w": normal(*value)}
    A_log = torch.rand(heads, generator=generator, device="cuda").mul_(2.7)
    return tensors | {"A_log": A_log, "dt_bias": normal(heads * dim, dtype=torch.float32) - 4}


def activated(raw: dict) -> dict:
    """What the call makes of raw tensors inside, in PyTorch."""
    heads, dim = raw["q"].shape[2:]
    q, k = (functional.normalize(raw[name].float(), dim=-1).to(raw[name].dtype) for name in "qk")
    rate = raw["A_log"].exp().unsqueeze(-1)
    g = -rate * functional.softplus(raw["g"] + raw["dt_bias"].view(heads, dim))
    return {"q": q, "k": k, "v": raw["v"], "g": g, "b": raw["b"].sigmoid(), "w": raw["w"].sigmoid()}


def forward(tensors: dict, **options) -> Callable:
    return lambda: gdn2_ext.chunk_gdn2(**tensors, backend="cuda", **options)


def training(make: Callable[[], dict], leaves: list[torch.Tensor], do: torch.Tensor, **options) -> Callable:
    def call():
        with torch.enable_grad():
            o, _ = gdn2_ext.chunk_gdn2(**make(), backend="cuda", **options)
            return torch.autograd.grad(o, leaves, do)

    return call


def both(tensors: dict, **options) -> dict[str, Callable]:
    """Forward, and forward and backward."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    do = torch.randn_like(tensors["v"])
    return {
        "forward": forward(tensors, **options),
        "forward+backward": training(lambda: leaves, list(leaves.values()), do, **options),
    }


PASSES = ("forward", "forward+backward")

# Pass, calls by name, and what the time of each is divided by (token heads), or nothing.
Lines = Iterator[tuple[str, dict[str, Callable], dict[str, int]]]


def small() -> Lines:
    call = forward(activated(raw_tensors(1, 64, 4, 4, 128, torch.bfloat16)))
    one = torch.zeros(1, device="cuda")
    yield "forward", {"B1 T64 H4": call, "x.add_(1)": lambda: one.add_(1)}, {}


def dtypes_and_sizes() -> Lines:
    sizes = {
        "bfloat16": (128, torch.bfloat16),
        "float16": (128, torch.float16),
        "K = V = 64": (64, torch.bfloat16),
    }
    calls = {name: both(activated(raw_tensors(4, 4096, 16, 16, *size))) for name, size in sizes.items()}
    for which in PASSES:
        yield which, {name: call[which] for name, call in calls.items()}, {}


def fused() -> Lines:
    raw = raw_tensors(4, 4096, 16, 16, 128, torch.bfloat16)
    plain, inside = both(activated(raw)), both(raw, **EVERYTHING)
    narrow = both(raw | {"g": raw["g"].to(raw["q"].dtype)}, **EVERYTHING)
    leaves = {name: x.detach().requires_grad_() for name, x in raw.items()}
    do = torch.randn_like(raw["v"])
    outside = {
        "forward": lambda: gdn2_ext.chunk_gdn2(**activated(raw), backend="cuda"),
        "forward+backward": training(lambda: activated(leaves), list(leaves.values()), do),
    }
    for which in PASSES:
        calls = {"plain": plain, "inside": inside, "inside, 16-bit g": narrow, "outside": outside}
        yield which, {name: call[which] for name, call in calls.items()}, {}


def keep() -> Lines:
    tensors = activated(raw_tensors(4, 4096, 16, 16, 128, torch.bfloat16))
    options = {"made again": False, "kept": True}
    calls = {name: both(tensors, disable_recompute=x)[PASSES[1]] for name, x in options.items()}
    yield PASSES[1], calls, {}


def groups() -> Lines:
    def repeated(tensors: dict) -> dict:
        return {name: x if name in "vw" else x.repeat_interleave(4, 2) for name, x in tensors.items()}

    tensors = activated(raw_tensors(4, 4096, 4, 16, 128, torch.bfloat16))
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    do = torch.randn_like(tensors["v"])
    grouped = both(tensors)
    by_hand = {
        "forward": lambda: gdn2_ext.chunk_gdn2(**repeated(tensors), backend="cuda"),
        "forward+backward": training(lambda: repeated(leaves), list(leaves.values()), do),
    }
    for which in PASSES:
        yield which, {"grouped": grouped[which], "repeated": by_hand[which]}, {}


def linear() -> Lines:
    for which, heads in zip(PASSES, (64, 32), strict=True):
        lengths = {f"H{heads} T{seqlen}": seqlen for seqlen in (16384, 262144)}
        calls = {
            name: both(activated(raw_tensors(1, seqlen, heads, heads, 128, torch.bfloat16)))[which]
            for name, seqlen in lengths.items()
        }
        yield which, calls, {name: seqlen * heads for name, seqlen in lengths.items()}


TOPICS = {
    "dtype, size": dtypes_and_sizes,
    "fused": fused,
    "keep": keep,
    "groups": groups,
    "linear": linear,
    "small": small,
}


def measure(topic: str, repeats: int) -> Iterator[dict]:
    # A short call's time is the host's, whose caches and clock take hundreds of calls to settle.
    repeats, warmup = (20 * repeats, 500) if topic == "small" else (repeats, 5)
    for which, calls, token_heads in TOPICS[topic]():
        with torch.no_grad():
            eager, graph = timing.eager_and_graphs(calls, repeats, warmup)
            if topic == "small":
                eager |= {f"{name}, row": timing.in_a_row(call, 200, 20) for name, call in calls.items()}
            peaks = {name: timing.peak_bytes(call) / 2**20 for name, call in calls.items()}
        first = next(iter(calls))
        for name in eager:
            best = graph if name in graph else eager
            yield {
                "topic": topic,
                "pass": which,
                "call": name,
                "ms": eager[name].median,
                "ms_p10": eager[name].low,
                "ms_p90": eager[name].high,
                "graph_ms": graph[name].median if name in graph else None,
                "relative_to_first": best[name].median / best[first].median,
                "ns_a_token_and_head": 1e6 * best[name].median / token_heads[name] if token_heads else None,
                "peak_mib": peaks.get(name),
            }
        torch.cuda.empty_cache()


def line(row: dict) -> str:
    return (
        f"{row['topic']:12} {row['pass']:16} {row['call']:15} {row['ms']:8.4f} "
        f"{row['ms_p10']:8.4f}-{row['ms_p90']:.4f} {number(row['graph_ms'], '.4f'):>8} "
        f"{row['relative_to_first']:6.3f} {number(row['ns_a_token_and_head'], '.4f'):>8} "
        f"{number(row['peak_mib'], '.1f'):>8}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS))
    parser.add_argument("--repeats", type=int, default=30)
    records.add_arguments(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.variants needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    budget = records.Budget(options.budget)
    print(torch.cuda.get_device_name())
    print(
        f"{'topic':12} {'pass':16} {'call':15} {'ms':>8} {'p10-p90':>15} {'graph':>8} {'ratio':>6} {'ns':>8} "
        f"{'MiB':>8}"
    )
    rows = records.Rows(options.out, "variants", ("topic", "pass", "call"), options.again)
    for topic in options.topics:
        if rows.has(topic) or budget.spent():
            continue
        measured = []
        for row in measure(topic, options.repeats):
            measured.append(row)
            print(line(row), flush=True)
        rows.add(measured)  # a topic is recorded as a whole
    return 0


if __name__ == "__main__":
    sys.exit(main())
