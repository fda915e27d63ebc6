"""`python -m bench.accuracy`: errors of outputs and gradients beside flash-linear-attention's Triton kernels.

Relative L2 errors against float64 on the same rounded inputs, B1 T1024 H4, K = V = 128, float32 g, the worst
of three seeds, for every regime of the tests and both dtypes: o, the final state S, and the gradients of the
inputs and of an initial state that is zero, given that of o. The table goes to the screen, and with versions,
GPU and a digest of the sources to bench/results/GPU/accuracy.csv and accuracy.json. Runs of the same sources
add up there, of one dtype each, say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import cases
import compare
import torch

import gdn2_ext

from . import fla_tuning, records

SEEDS = (1, 2, 3)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS_OF = (*cases.TENSORS, "dS0")


def outcome(call: Callable, leaves: list[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
    """o, the final state and the gradients of the leaves: the op's tensors and the initial state."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    o, S = call(*leaves[:-1], initial_state=leaves[-1], output_final_state=True)
    gradients = torch.autograd.grad(o, leaves, do.to(o.dtype))
    return [o.detach(), S.detach(), *gradients]


def errors(calls: dict[str, Callable], regime: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """The worst relative error of every result over SEEDS, which are the sequences of one batch."""
    inputs = [cases.make_inputs(regime, dtype=dtype, device="cuda", seed=seed) for seed in SEEDS]
    given = [torch.cat(x) for x in zip(*(x.tensors for x in inputs), strict=True)]
    given.append(torch.zeros(len(SEEDS), 4, 128, 128, device="cuda"))
    do = torch.cat([x.do for x in inputs])
    exact = outcome(torch_backend, [x.double() for x in given], do)

    def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
        return max(map(compare.relative_error, found, expected))

    return {name: list(map(worst, outcome(call, given, do), exact)) for name, call in calls.items()}


def torch_backend(*tensors, **options):
    return gdn2_ext.chunk_gdn2(*tensors, backend="torch", **options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--no-fla", action="store_true", help="without the baseline")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    records.add_arguments(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.accuracy needs a GPU, and PyTorch sees none", file=sys.stderr)
        return 1
    budget = records.Budget(options.budget)
    calls = {"gdn2_ext": lambda *tensors, **rest: gdn2_ext.chunk_gdn2(*tensors, backend="cuda", **rest)}
    fla = None if options.no_fla else fla_tuning.load_fla("chunk_gdn2", options.out)
    if fla is not None:
        calls["fla"] = fla
    print(" ".join(f"{x:10}" for x in ("regime", "dtype", "who")), *(f"{x:>8}" for x in RESULTS_OF))
    rows = records.Rows(options.out, "accuracy", ("dtype", "regime", "implementation"), options.again)
    for dtype in options.dtypes:
        for regime in cases.REGIMES:
            if all(rows.has(dtype, regime, name) for name in calls) or budget.spent():
                continue
            found = errors(calls, regime, DTYPES[dtype])
            rows.add(
                {"regime": regime, "dtype": dtype, "implementation": name}
                | dict(zip(RESULTS_OF, values, strict=True))
                for name, values in found.items()
            )
            for name, values in found.items():
                print(f"{regime:10} {dtype:10} {name:10}", *(f"{x:8.1e}" for x in values), flush=True)
            if fla is not None:
                fla_tuning.collect(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
