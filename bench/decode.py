"""`python -m bench.decode`: fused_recurrent_gdn2, one token, against flash-linear-attention's Triton kernel.

Correctness first: outputs and states against float64. Then everybody takes turns in one process on the same
inputs, 16 heads, K = V = 128, without gradients:

    graph      a CUDA graph of 100 calls on 100 different sets of states, divided by 100
    replay     a CUDA graph of one call, replayed 100 times in a row, divided by 100
    eager      100 calls in a row on the 100 sets, divided by 100: the host's time where that is longer

and the bandwidth of a large copy is read in the same run. `gdn2_ext` and `fla` read initial states and write
final ones elsewhere; `gdn2_ext pool` updates slots of a pool in place, in float32 or bfloat16. The share is
the time of moving the states alone (read and written once) at the copy's bandwidth, over the graph's time;
"all" counts the token's inputs and outputs too. The table goes to the screen, and with versions, GPU and a
digest of the sources to bench/results/GPU/decode.csv and decode.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import cases
import compare
import torch

import gdn2_ext

from . import fla_tuning, records, roofline, timing
from .records import number
from .shapes import DECODE_BATCHES, Shape

SETS = 100  # of states, and calls in a graph
CHECKED = 2  # sequences that are compared with float64


def make_inputs(shape: Shape, seed: int) -> cases.Inputs:
    sizes = {"batch": shape.batch, "seqlen": 1, "heads": shape.heads}
    sizes |= {"dim_k": shape.dim_k, "dim_v": shape.dim_v}
    return cases.make_inputs("layer_init", **sizes, dtype=torch.bfloat16, device="cuda", seed=seed)


class Contestant:
    """Somebody's decoding step on each set of states."""

    def __init__(self, name: str, inputs: cases.Inputs, pool: torch.Tensor, fla: Callable | None):
        self.name, self.inputs, self.pool = name, inputs, pool
        batch = inputs.q.shape[0]
        self.in_place = name.startswith("gdn2_ext pool")
        self.calls = [
            self._call(pool[n : n + batch], torch.arange(n, n + batch, device="cuda"), fla)
            for n in range(0, pool.shape[0], batch)
        ]

    def _call(self, states: torch.Tensor, slots: torch.Tensor, fla: Callable | None) -> Callable:
        tensors = self.inputs.tensors
        if self.in_place:
            return lambda: gdn2_ext.fused_recurrent_gdn2(
                *tensors,
                initial_state=self.pool,
                state_indices=slots,
                inplace_final_state=True,
                backend="cuda",
            )
        if self.name == "fla":
            return lambda: fla(*tensors, initial_state=states, output_final_state=True)
        return lambda: gdn2_ext.fused_recurrent_gdn2(
            *tensors, initial_state=states, output_final_state=True, backend="cuda"
        )

    def errors(self) -> tuple[float, float]:
        """Relative L2 errors of o and of the new states, of the first sequences of the first set."""
        rows = slice(0, min(CHECKED, self.inputs.q.shape[0]))
        start = self.pool[rows].double()
        exact = gdn2_ext.fused_recurrent_gdn2(
            *(x[rows].double() for x in self.inputs.tensors),
            initial_state=start,
            output_final_state=True,
            backend="torch",
        )
        o, S = self.calls[0]()
        S = self.pool if self.in_place else S
        return compare.relative_error(o[rows], exact[0]), compare.relative_error(S[rows], exact[1])

    def all_sets(self) -> list:
        """The results of every set, all of them alive until the last call is made."""
        return [call() for call in self.calls]

    def graph_of(self, run: Callable) -> Callable[[], None] | None:
        """A replay of what `run` does; None where it cannot be captured."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except Exception as error:  # whatever a foreign op raises while it is captured
            print(f"    {self.name} not captured: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        return graph.replay


def repeated(replay: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(SETS):
            replay()

    return run


def measure(
    shape: Shape, names: list[str], dtype: torch.dtype, repeats: int, fla: Callable | None, seed: int
) -> list[dict]:
    inputs = make_inputs(shape, seed)
    slots = (SETS * shape.batch, shape.heads, shape.dim_k, shape.dim_v)
    pool = torch.empty(slots, dtype=dtype, device="cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    for part in pool.split(shape.batch):
        part.normal_(generator=generator)
    contestants = [Contestant(name, inputs, pool, fla) for name in names]
    errors = {x.name: x.errors() for x in contestants}
    eager = timing.alternate({x.name: x.all_sets for x in contestants}, repeats, warmup=20)
    torch.cuda.empty_cache()
    graphs = {x.name: x.graph_of(x.all_sets) for x in contestants}
    graph = timing.alternate({name: replay for name, replay in graphs.items() if replay}, repeats, warmup=2)
    del graphs
    singles = {x.name: x.graph_of(x.calls[0]) for x in contestants}
    single = timing.alternate(
        {name: repeated(replay) for name, replay in singles.items() if replay}, repeats, warmup=2
    )
    rows = []
    for name in names:
        row = {"shape": f"B{shape.batch} H{shape.heads}", "states": str(dtype).removeprefix("torch.")}
        row |= {"implementation": name, "o_error": errors[name][0], "state_error": errors[name][1]}
        for way, times in (("graph", graph), ("replay", single), ("eager", eager)):
            time = times.get(name)
            row[f"{way}_us"] = time and 1e3 * time.median / SETS
            row[f"{way}_us_p10"] = time and 1e3 * time.low / SETS
            row[f"{way}_us_p90"] = time and 1e3 * time.high / SETS
        row["state_bytes"] = roofline.decode_state_bytes(shape, dtype.itemsize)
        row["all_bytes"] = roofline.decode_bytes(shape, dtype.itemsize)
        rows.append(row)
    return rows


HEADER = (
    f"{'shape':9} {'states':9} {'who':14} {'graph us':>9} {'p10-p90':>15} {'share':>6} {'all':>6} "
    f"{'replay':>8} {'eager':>8} {'o error':>8} {'S error':>8}"
)


def line(row: dict) -> str:
    spread = f"{number(row['graph_us_p10'], '.2f')}-{number(row['graph_us_p90'], '.2f')}"
    return (
        f"{row['shape']:9} {row['states']:9} {row['implementation']:14} {number(row['graph_us'], '.2f'):>9} "
        f"{spread:>15} {number(row['share_of_copy'], '.1%'):>6} {number(row['share_of_copy_all'], '.1%'):>6} "
        f"{number(row['replay_us'], '.2f'):>8} {number(row['eager_us'], '.2f'):>8} {row['o_error']:8.1e} "
        f"{row['state_error']:8.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=DECODE_BATCHES)
    parser.add_argument("--no-fla", action="store_true", help="without the baseline")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    records.add_out(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.decode needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    fla = None if options.no_fla else fla_tuning.load_fla("fused_recurrent_gdn2", options.out)
    copy = timing.copy_terabytes_per_second()
    print(f"{torch.cuda.get_device_name()}, copy {copy:.2f} TB/s\n{HEADER}")
    rows = []
    for batch in options.batches:
        shape = Shape(batch, 1, 16)
        float32_names = ["gdn2_ext", "gdn2_ext pool", *(["fla"] if fla else [])]
        for dtype, names in ((torch.float32, float32_names), (torch.bfloat16, ["gdn2_ext pool"])):
            with torch.no_grad():
                measured = measure(shape, names, dtype, options.repeats, fla, options.seed)
            torch.cuda.empty_cache()
            for row in measured:
                for column, num_bytes in (
                    ("share_of_copy", "state_bytes"),
                    ("share_of_copy_all", "all_bytes"),
                ):
                    time = row["graph_us"]
                    row[column] = time and row[num_bytes] / (copy * 1e6) / time
                print(line(row), flush=True)
            rows += measured
            records.save(options.out, "decode", rows, copy_tb_per_s=copy)
        if fla is not None:
            fla_tuning.collect(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
