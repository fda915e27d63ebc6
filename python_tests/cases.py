"""Shapes, input regimes and accuracy bars shared by the tests and the benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Sequence lengths around the sizes that kernels work in: a row of tokens, a block of 16, a chunk of 64.
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 127)

# Lengths of sequences packed together: some around the chunk length, and empty ones at the ends and inside.
PACKED_LENGTHS = (0, 1, 63, 64, 0, 17, 70, 0)
# Some have chunks for several segments, most have not.
LONG_PACKED_LENGTHS = (0, 1, 63, 64, 550, 0, 17, 330)

# What a call of raw inputs leaves to the kernels.
EVERYTHING = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_gate_sigmoid_in_kernel": True}

# Worst relative L2 error over seeds 1 to 3 of the Triton kernels of flash-linear-attention 0.6.0 on an H200,
# against a float64 recurrence on the same rounded inputs: bfloat16, float32 g, B1 T1024 H4 K = V = 128. S is
# the final state.
TENSORS = ("o", "S", "dq", "dk", "dv", "dg", "db", "dw")
BARS = {
    regime: dict(zip(TENSORS, errors, strict=True))
    for regime, errors in {
        "layer_init": (0.0039, 0.0034, 0.0035, 0.0036, 0.0035, 0.0038, 0.0048, 0.0035),
        "slow": (0.0043, 0.0037, 0.0039, 0.0043, 0.0038, 0.0048, 0.0054, 0.0039),
        "uniform5": (0.0033, 0.0024, 0.0028, 0.0028, 0.0029, 0.0024, 0.0041, 0.0029),
        "resets": (0.0039, 0.0035, 0.0035, 0.0036, 0.0035, 0.0035, 0.0048, 0.0035),
        "erase2": (0.0048, 0.0043, 0.0044, 0.0054, 0.0044, 0.0057, 0.0063, 0.0044),
        "correlated": (0.0081, 0.0079, 0.0077, 0.0056, 0.0078, 0.0090, 0.0136, 0.0078),
    }.items()
}
REGIMES = tuple(BARS)

# Largest relative L2 error of o in bfloat16 for `near_parallel_keys`; nothing may be non-finite there.
NEAR_PARALLEL_O_BAR = 3e-2


def parallel_keys_bar(dtype: torch.dtype) -> float:
    """The bar where keys are parallel: NEAR_PARALLEL_O_BAR in bfloat16, a quarter of it in float16."""
    return {torch.bfloat16: NEAR_PARALLEL_O_BAR, torch.float16: NEAR_PARALLEL_O_BAR / 4}.get(dtype, 0.0)


def bar(regime: str, tensor: str, dtype: torch.dtype) -> float:
    """The largest relative L2 error that `tensor`, a name in TENSORS, may have for inputs of `dtype`.

    bfloat16: 1.15 times the entry of BARS, or 4.5e-3 where that is larger (rounding the exact result alone
    costs 1.66e-3). float16: a quarter of that. float32 and float64 have one bar for everything.
    """
    if dtype == torch.float32:
        return 1e-5
    if dtype == torch.float64:
        return 1e-10
    bfloat16_bar = max(1.15 * BARS[regime][tensor], 4.5e-3)
    return {torch.bfloat16: bfloat16_bar, torch.float16: bfloat16_bar / 4}[dtype]


@dataclass
class Inputs:
    """Inputs of the op and the gradient of its output. A_log and dt_bias are given for raw gates only."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    g: torch.Tensor  # [B, T, H, K] or [B, T, HV, K]
    b: torch.Tensor  # as g
    w: torch.Tensor  # [B, T, HV, V]
    do: torch.Tensor  # [B, T, HV, V]
    A_log: torch.Tensor | None = None  # [H]
    dt_bias: torch.Tensor | None = None  # [H*K]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, g, b, w: the op's positional arguments."""
        return self.q, self.k, self.v, self.g, self.b, self.w


def make_inputs(
    regime: str,
    *,
    batch: int = 1,
    seqlen: int = 1024,
    heads: int = 4,
    value_heads: int | None = None,
    dim_k: int = 128,
    dim_v: int = 128,
    gate_heads: str = "key",
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 1,
) -> Inputs:
    """Activated inputs of a regime, for which the op is called without any `use_..._in_kernel`.

    q and k are L2-normalised; v and do are N(0, 1); w, and b unless the regime says otherwise, are U[0, 1].

        layer_init  g = -A softplus(N(0, 1) + bias), A in U[1, 16], softplus(bias) log-uniform in [1e-3, 0.1]
        slow        g in U[-0.02, 0]
        uniform5    g in U[-5, 0]
        resets      g in U[-0.05, 0], and -100 in 3% of the entries
        erase2      as slow, with b in U[0, 2]
        correlated  keys = normalise(common + 0.3 * unit noise), b = 0.98, g in U[-1e-3, 0]

    Args:
        gate_heads: "key" for g and b of [B, T, H, K], "value" for [B, T, HV, K].
        dtype: of everything but g. Values are drawn in float64 on the CPU, so that they depend on the seed
            alone, and then rounded.
        gate_dtype: of g.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {REGIMES}, got {regime!r}")
    draw = _Draw(seed)
    value_heads = heads if value_heads is None else value_heads
    num_gate_heads = {"key": heads, "value": value_heads}[gate_heads]
    gate_shape = (batch, seqlen, num_gate_heads, dim_k)
    value_shape = (batch, seqlen, value_heads, dim_v)

    q = _unit(draw.normal(batch, seqlen, heads, dim_k))
    k = _unit(draw.normal(batch, seqlen, heads, dim_k))
    if regime == "correlated":
        common = _unit(draw.normal(batch, 1, heads, dim_k))
        k = _unit(common + 0.3 * k)

    if regime == "layer_init":
        A_log, dt_bias = _initial_gate_parameters(draw, heads, dim_k)
        groups = num_gate_heads // heads
        A = A_log.exp().repeat_interleave(groups).unsqueeze(-1)
        bias = dt_bias.view(heads, dim_k).repeat_interleave(groups, dim=0)
        g = -A * torch.nn.functional.softplus(draw.normal(*gate_shape) + bias)
    else:
        slowest = {"slow": 0.02, "uniform5": 5.0, "resets": 0.05, "erase2": 0.02, "correlated": 1e-3}[regime]
        g = draw.uniform(-slowest, 0.0, *gate_shape)
    if regime == "resets":
        g = torch.where(draw.uniform(0.0, 1.0, *gate_shape) < 0.03, -100.0, g)

    b = draw.uniform(0.0, 2.0 if regime == "erase2" else 1.0, *gate_shape)
    if regime == "correlated":
        b = torch.full_like(b, 0.98)
    v, w, do = draw.normal(*value_shape), draw.uniform(0.0, 1.0, *value_shape), draw.normal(*value_shape)
    return Inputs(g=g.to(device, gate_dtype), **_to(device, dtype, q=q, k=k, v=v, b=b, w=w, do=do))


def near_parallel_keys(**kwargs) -> Inputs:
    """The hardest keys: the correlated regime with b = 2. Every token reflects nearly the same direction.

    Takes the arguments of `make_inputs` other than the regime. The bar is NEAR_PARALLEL_O_BAR.
    """
    inputs = make_inputs("correlated", **kwargs)
    inputs.b.fill_(2.0)
    return inputs


def raw_inputs(
    *,
    batch: int = 1,
    seqlen: int = 1024,
    heads: int = 4,
    value_heads: int | None = None,
    dim_k: int = 128,
    dim_v: int = 128,
    gate_heads: str = "key",
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 1,
) -> Inputs:
    """Inputs as a layer at initialisation hands them over, for a call with every `use_..._in_kernel`.

    q, k, v, g, b, w and do are N(0, 1), not normalised and without activation; A = exp(A_log) is U[1, 16] and
    softplus(dt_bias) log-uniform in [1e-3, 0.1], both float32. The arguments are those of `make_inputs`.
    """
    draw = _Draw(seed)
    value_heads = heads if value_heads is None else value_heads
    key_shape = (batch, seqlen, heads, dim_k)
    gate_shape = (batch, seqlen, {"key": heads, "value": value_heads}[gate_heads], dim_k)
    value_shape = (batch, seqlen, value_heads, dim_v)
    q, k, g, b = (draw.normal(*shape) for shape in (key_shape, key_shape, gate_shape, gate_shape))
    v, w, do = (draw.normal(*value_shape) for _ in range(3))
    A_log, dt_bias = _initial_gate_parameters(draw, heads, dim_k)
    return Inputs(
        g=g.to(device, gate_dtype),
        A_log=A_log.to(device, torch.float32),
        dt_bias=dt_bias.to(device, torch.float32),
        **_to(device, dtype, q=q, k=k, v=v, b=b, w=w, do=do),
    )


def with_another_future(inputs: Inputs, t: int, seed: int) -> Inputs:
    """Activated inputs with tokens from t on replaced: values far larger, decays up to a reset, erase gates
    up to 2.
    """
    batch, seqlen, heads, dim_k = inputs.q.shape
    other = make_inputs(
        "erase2", batch=batch, seqlen=seqlen, heads=heads, dim_k=dim_k, dim_v=inputs.v.shape[3], seed=seed,
        dtype=inputs.q.dtype, gate_dtype=inputs.g.dtype, device=inputs.q.device,
    )  # fmt: skip
    other.v *= 1e6 if inputs.v.dtype != torch.float16 else 1e2
    other.g[:, ::3] = -50.0
    other.g[:, 1::7, :, ::2] = -float("inf")
    changed = (
        torch.cat([x[:, :t], y[:, t:]], dim=1) for x, y in zip(inputs.tensors, other.tensors, strict=True)
    )
    return Inputs(*changed, do=inputs.do)


def packed_offsets(lengths=PACKED_LENGTHS, *, dtype: torch.dtype = torch.int32, device="cpu") -> torch.Tensor:
    """cu_seqlens [N + 1] of sequences of these lengths."""
    return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=dtype, device=device)


class _Draw:
    """Float64 random tensors on the CPU that depend on the seed alone."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _initial_gate_parameters(draw: _Draw, heads: int, dim_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A_log [heads] and dt_bias [heads * dim_k] of a layer at initialisation."""
    A_log = draw.uniform(1.0, 16.0, heads).log()
    step = draw.uniform(math.log(1e-3), math.log(0.1), heads * dim_k).exp()
    return A_log, step.expm1().log()  # softplus(log(expm1(step))) = step


def _to(device, dtype: torch.dtype, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
