"""`python -m bench.model`: training steps of the layer and of whole models, with our op and with FLA's.

    layer    gdn2_ext.GatedDeltaNet2 against flash-linear-attention's layer of the same weights, bfloat16,
             B4 T4096, hidden size 2048, 16 heads: forward and backward
    models   the paper's 1.3B models, recurrent and hybrid, at 2K x 8, 4K x 4, 8K x 2 and 16K x 1 tokens:
             forward, backward and AdamW under bfloat16 autocast, tokens per second; with our op and with
             FLA's in the same model

Both take turns in one process. The table goes to the screen, and with versions, GPU and a digest of the
sources to bench/results/GPU/model.csv and model.json, where several runs of the same sources add up.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator

import compare
import torch

import gdn2_ext
from gdn2_ext import layers

from . import fla_tuning, records, timing
from .records import number

LAYER = {"hidden_size": 2048, "num_heads": 16, "head_dim": 128}
LAYER_SHAPE = (4, 4096)
MODELS = ("1.3b", "1.3b-hybrid")
MODEL_SHAPES = ((8, 2048), (4, 4096), (2, 8192), (1, 16384))


def label(batch: int, seqlen: int) -> str:
    return f"B{batch}xT{seqlen}"


@contextlib.contextmanager
def op_replaced(op: Callable) -> Iterator[None]:
    """Layers call `op` for chunk_gdn2."""
    ours, layers.chunk_gdn2 = layers.chunk_gdn2, op
    try:
        yield
    finally:
        layers.chunk_gdn2 = ours


def with_op(op: Callable, step: Callable) -> Callable:
    def run():
        with op_replaced(op):
            return step()

    return run


def fla_op(chunk_gdn2: Callable) -> Callable:
    """FLA's op, called as our layer calls ours: it takes gates that are sigmoids already."""

    def op(
        q,
        k,
        v,
        g,
        b,
        w,
        use_gate_sigmoid_in_kernel=False,
        erase_scale=1.0,
        backend="auto",
        cu_seqlens_cpu=None,
        **rest,
    ):
        if use_gate_sigmoid_in_kernel:
            b, w = erase_scale * b.sigmoid(), w.sigmoid()
        return chunk_gdn2(q, k, v, g, b, w, **rest)

    return op


# -- layer ---------------------------------------------------------------------------------------------------


def layer_step(layer: torch.nn.Module, x: torch.Tensor, do: torch.Tensor) -> Callable[[], list]:
    parameters = list(layer.parameters())

    def step() -> list:
        with torch.enable_grad():
            o = layer(x)[0]
            return [o.detach(), *torch.autograd.grad(o, [x, *parameters], do)]

    return step


def measure_layer(repeats: int, fla: bool, seed: int) -> list[dict]:
    torch.manual_seed(seed)
    ours = gdn2_ext.GatedDeltaNet2(**LAYER, backend="cuda").to("cuda", torch.bfloat16)
    contestants = {"gdn2_ext": ours}
    if fla:
        from fla.layers import GatedDeltaNet2

        contestants["fla"] = GatedDeltaNet2(**LAYER).to("cuda", torch.bfloat16)
        contestants["fla"].load_state_dict(ours.state_dict())
    shape = (*LAYER_SHAPE, LAYER["hidden_size"])
    x, do = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16).unbind()
    x = x.clone().requires_grad_()
    steps = {name: layer_step(layer, x, do) for name, layer in contestants.items()}
    results = {name: step() for name, step in steps.items()}
    times, graph_times = timing.eager_and_graphs(steps, repeats)
    rows = []
    for name, time in times.items():
        error = compare.relative_error(results[name][0].float(), results["gdn2_ext"][0].float())
        rows.append(
            {"what": "layer", "shape": label(*LAYER_SHAPE), "implementation": name,
             "ms": time.median, "ms_p10": time.low, "ms_p90": time.high,
             "graph_ms": graph_times[name].median if name in graph_times else None,
             "tokens_per_second": LAYER_SHAPE[0] * LAYER_SHAPE[1] / time.median * 1e3,
             "peak_mib": timing.peak_bytes(steps[name]) / 2**20, "difference_of_o": error}
        )  # fmt: skip
    return rows


# -- models --------------------------------------------------------------------------------------------------


def model_step(model: torch.nn.Module, tokens: torch.Tensor, optimizer) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def config_of(name: str, num_layers: int | None):
    from gdn2_ext.models import GatedDeltaNet2Config

    changes = {} if num_layers is None else {"num_hidden_layers": num_layers}
    return GatedDeltaNet2Config.named(name, **changes)


def measure_model(
    what: str, config, shapes: list[tuple[int, int]], repeats: int, fla: Callable | None, seed: int
) -> Iterator[list[dict]]:
    """The rows of each shape."""
    from gdn2_ext.models import GatedDeltaNet2ForCausalLM

    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = GatedDeltaNet2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ops = {"gdn2_ext": layers.chunk_gdn2, **({"fla": fla_op(fla)} if fla else {})}
    for batch, seqlen in shapes:
        tokens = torch.randint(config.vocab_size, (batch, seqlen), device="cuda")
        step = model_step(model, tokens, optimizer)

        steps = {who: with_op(op, step) for who, op in ops.items()}
        losses = {who: run().item() for who, run in steps.items()}
        times = timing.alternate(steps, repeats, warmup=2)
        yield [
            {
                "what": what, "shape": label(batch, seqlen),
                "implementation": who, "ms": time.median, "ms_p10": time.low, "ms_p90": time.high,
                "graph_ms": None, "tokens_per_second": batch * seqlen / time.median * 1e3,
                "peak_mib": timing.peak_bytes(steps[who]) / 2**20,
                "difference_of_o": abs(losses[who] / losses["gdn2_ext"] - 1),
            }
            for who, time in times.items()
        ]  # fmt: skip


HEADER = (
    f"{'what':24} {'shape':10} {'who':9} {'ms':>8} {'p10-p90':>15} {'graph':>7} {'tokens/s':>9} {'MiB':>7} "
    f"{'diff':>8}"
)


def line(row: dict) -> str:
    spread = f"{row['ms_p10']:.2f}-{row['ms_p90']:.2f}"
    return (
        f"{row['what']:24} {row['shape']:10} {row['implementation']:9} {row['ms']:8.2f} {spread:>15} "
        f"{number(row['graph_ms'], '.2f'):>7} {row['tokens_per_second']:9.0f} {row['peak_mib']:7.0f} "
        f"{row['difference_of_o']:8.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--layers", type=int, help="of the models; default: all of them")
    parser.add_argument("--no-fla", action="store_true", help="without the baseline")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    records.add_arguments(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.model needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    budget = records.Budget(options.budget)
    fla = None if options.no_fla else fla_tuning.load_fla("chunk_gdn2", options.out)
    who = ["gdn2_ext"] if fla is None else ["gdn2_ext", "fla"]
    print(f"{torch.cuda.get_device_name()}\n{HEADER}")
    rows = records.Rows(options.out, "model", ("what", "shape", "implementation"), options.again)

    def missing(what: str, shape: tuple[int, int]) -> bool:
        return not all(rows.has(what, label(*shape), name) for name in who)

    def add(measured: list[dict]) -> None:
        for row in measured:
            print(line(row), flush=True)
        rows.add(measured)
        if fla is not None:
            fla_tuning.collect(options.out)

    if missing("layer", LAYER_SHAPE) and not budget.spent():
        add(measure_layer(options.repeats, fla is not None, options.seed))
    for name in options.models:
        config = config_of(name, options.layers)
        what = f"{name}, {config.num_hidden_layers} layers"
        shapes = [shape for shape in MODEL_SHAPES if missing(what, shape)]
        if not shapes or budget.spent():
            continue
        for measured in measure_model(what, config, shapes, options.repeats, fla, options.seed):
            add(measured)
            if budget.spent():
                break
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
