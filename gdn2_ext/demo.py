"""A layer's input through the op, forward and backward: which backend runs, how exact, how fast.

Errors are relative L2 errors against the float64 reference (`gdn2_ext.reference`, analytic backward), times
are medians. The exit status is 1 if an error is above its bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunk_gdn2, reference, supports
from .torch_backend import GateOptions, activate, token_step

# What an error may be: float32 keeps about seven digits; 16-bit operands keep two to three, and the sums over
# all tokens that dA_log and d_dt_bias are lose some of them.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float64: 1e-10}
RECURRENCE_TOKENS = 64  # how many tokens the recurrence is timed on; its cost is linear in them

OPTIONS = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_gate_sigmoid_in_kernel": True}
GRADIENTS = ("dq", "dk", "dv", "dg", "db", "dw", "dA_log", "d_dt_bias", "d_initial_state")


class LayerInput(NamedTuple):
    """The op's differentiable inputs, raw as a layer computes them, and the gradients of its outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    A_log: Tensor
    dt_bias: Tensor
    initial_state: Tensor
    do: Tensor
    d_final_state: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self[:9]

    def call(self, **options: object) -> tuple[Tensor, Tensor]:
        x = dict(zip(self._fields[:9], self.leaves))
        return chunk_gdn2(**x, output_final_state=True, **OPTIONS, **options)


def make_layer_input(
    batch: int, seqlen: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int
) -> LayerInput:
    """Random projections of a random hidden state, and gates as a layer at initialisation makes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    hidden = normal(batch, seqlen, 64)

    def project() -> Tensor:
        weight = normal(64, heads * dim) / 8
        return (hidden @ weight).unflatten(-1, (heads, dim))

    step = torch.exp(uniform(heads * dim) * 4.6 - 6.9)  # softplus(dt_bias), log-uniform in [1e-3, 0.1]
    state = (batch, heads, dim, dim)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    g = project()
    tensors = {
        **{name: project().to(dtype) for name in "qkvbw"},
        "g": g.to(state_dtype),
        "A_log": torch.log(1 + 15 * uniform(heads)).to(state_dtype),
        "dt_bias": torch.log(torch.expm1(step)).to(state_dtype),
        "initial_state": normal(*state).to(state_dtype),
        "do": normal(batch, seqlen, heads, dim).to(dtype),
        "d_final_state": normal(*state).to(state_dtype),
    }
    x = LayerInput(**{name: tensor.to(device) for name, tensor in tensors.items()})
    for leaf in x.leaves:
        leaf.requires_grad_()
    return x


def forward_backward(x: LayerInput, **options: object) -> dict[str, Tensor]:
    o, final_state = x.call(**options)
    gradients = torch.autograd.grad([o, final_state], x.leaves, [x.do, x.d_final_state])
    return {"o": o.detach(), "final_state": final_state.detach(), **dict(zip(GRADIENTS, gradients))}


def reference_results(x: LayerInput) -> dict[str, Tensor]:
    """The same results in float64, on the CPU."""
    arrays = {name: tensor.detach().double().cpu().numpy() for name, tensor in zip(x._fields, x)}
    gradients_of_outputs = [arrays.pop("do"), arrays.pop("d_final_state")]
    q_to_w = [arrays.pop(name) for name in "qkvgbw"]
    o, final_state, _ = reference.chunk_gdn2(*q_to_w, **arrays, **OPTIONS)
    gradients = reference.chunk_gdn2_backward(*q_to_w, *gradients_of_outputs, **arrays, **OPTIONS)
    results = {"o": o, "final_state": final_state, **{name: getattr(gradients, name) for name in GRADIENTS}}
    return {name: torch.from_numpy(array) for name, array in results.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double().cpu() - expected
    return (difference.norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------------------
# Times
# ------------------------------------------------------------------------------------------------------------


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median over repeats, after one run that does not count; on a GPU by events around each run."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin_time = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin_time)
    return statistics.median(times)


def recurrence(x: LayerInput, tokens: int) -> tuple[Tensor, Tensor]:
    """Outputs and final state of the first tokens, one after the other, in PyTorch operations."""
    q, k, v, g, b, w = (tensor[:, :tokens] for tensor in x[:6])
    options = GateOptions(True, True, None, True, 1.0)
    x_activated = activate(q, k, g, b, w, x.A_log, x.dt_bias, options)
    q, k, g, b, w, _, _ = x_activated
    q, v = q * q.shape[-1] ** -0.5, v.to(q.dtype)
    S, outputs = x.initial_state, []
    for t in range(tokens):
        S, o = token_step(S, q[:, t], k[:, t], v[:, t], g[:, t], b[:, t], w[:, t])
        outputs.append(o)
    return torch.stack(outputs, 1), S


def time_recurrence(x: LayerInput, tokens: int) -> tuple[float, float]:
    """Forward, and forward and backward, of the recurrence under autograd, scaled to all tokens."""
    scale = x.q.shape[1] / tokens
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        o, S = recurrence(x, tokens)
        _synchronize(x.q.device)
        middle = time.perf_counter()
        torch.autograd.grad([o, S], x.leaves, [x.do[:, :tokens].to(o.dtype), x.d_final_state])
        _synchronize(x.q.device)
        times.append((middle - begin, time.perf_counter() - begin))
    return tuple(scale * statistics.median(column) for column in zip(*times))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(x: LayerInput, call: Callable[[], tuple[Tensor, Tensor]], repeats: int) -> tuple[float, float]:
    """Forward without gradients, and forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.grad(call(), x.leaves, [x.do, x.d_final_state])

    device = x.q.device
    return median_seconds(forward, device, repeats), median_seconds(both, device, repeats)


def triton_call(x: LayerInput) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """The same call through flash-linear-attention's Triton kernels, where it is installed."""
    try:
        from fla.ops.gdn2 import chunk_gdn2 as fla_chunk_gdn2
    except ImportError:
        return None

    def call() -> tuple[Tensor, Tensor]:
        return fla_chunk_gdn2(
            x.q, x.k, x.v, x.g, torch.sigmoid(x.b), torch.sigmoid(x.w), initial_state=x.initial_state,
            output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=x.A_log,
            dt_bias=x.dt_bias,
        )  # fmt: skip

    return call


# ------------------------------------------------------------------------------------------------------------
# The demo
# ------------------------------------------------------------------------------------------------------------


def measure_times(x: LayerInput, backends: Sequence[str], progress: Callable[[str], None]):
    """(who, forward seconds, forward and backward seconds), the recurrence first."""
    repeats = 20 if x.q.device.type == "cuda" else 3
    tokens = min(RECURRENCE_TOKENS, x.q.shape[1])
    progress(f"timing the token-by-token recurrence on {tokens} tokens")
    rows = [(f"token by token, PyTorch ({tokens} tokens, scaled)", *time_recurrence(x, tokens))]
    for backend in backends:
        progress(f"timing the {backend} backend")
        call = partial(x.call, backend=backend)
        rows.append((f"chunk_gdn2, {backend} backend", *time_call(x, call, repeats)))
    call = triton_call(x) if x.q.device.type == "cuda" else None
    if call is not None:
        progress(
            "timing flash-linear-attention's Triton kernels (the first call tunes them, which takes minutes)"
        )
        rows.append(("flash-linear-attention chunk_gdn2, Triton", *time_call(x, call, repeats)))
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        )
        return "  ".join((first, *rest)).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gdn2_ext", description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128, help="K and V (default: 128)")
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in BOUNDS], default=None,
                        help="default: bfloat16 on a GPU, float32 on the CPU")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("batch", "seqlen", "heads", "dim"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if every error is within its bound."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))

    # Fast decays leave subnormal numbers, which CPUs compute with at a hundredth of their speed.
    torch.set_flush_denormal(True)

    def progress(what: str) -> None:
        print(f"... {what}", file=sys.stderr, flush=True)

    shape = f"B{options.batch} T{options.seqlen} H{options.heads} K = V = {options.dim}"
    progress(f"making a layer's input: {shape}, {dtype}, {device}")
    x = make_layer_input(
        options.batch, options.seqlen, options.heads, options.dim, dtype, device, options.seed
    )
    supported, reason = supports(x.q, x.k, x.v, x.g, x.b, x.w)
    backend = "cuda" if supported else "torch"
    progress(f"forward and backward on the {backend} backend")
    results = forward_backward(x, backend=backend)
    progress("the same in float64, by the reference")
    expected = reference_results(x)
    bound = BOUNDS[dtype]
    errors = {name: relative_error(results[name], expected[name]) for name in expected}
    print(f"\nGated DeltaNet-2, {shape}, {dtype}, {device}, seed {options.seed}")
    print(f"backend: {backend} ({'the kernels take this call' if supported else reason})\n")
    verdicts = {name: "ok" if error <= bound else "TOO LARGE" for name, error in errors.items()}
    print(table(
        ("tensor", "relative error", "bound", ""),
        [(name, f"{error:.1e}", f"{bound:.0e}", verdicts[name]) for name, error in errors.items()],
    ))  # fmt: skip
    times = measure_times(x, [*dict.fromkeys([backend, "torch"])], progress)
    slowest = times[0]
    print("\n" + table(
        ("milliseconds", "forward", "times faster", "forward+backward", "times faster"),
        [(who, f"{1e3 * f:.2f}", f"{slowest[1] / f:.1f}", f"{1e3 * fb:.2f}", f"{slowest[2] / fb:.1f}")
         for who, f, fb in times],
    ))  # fmt: skip
    return 0 if all(verdict == "ok" for verdict in verdicts.values()) else 1
