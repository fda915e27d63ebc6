"""What surrounds the op in a block: the short causal convolution and the gated norm."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {"silu": functional.silu, "swish": functional.silu, "sigmoid": torch.sigmoid}


def fused_on_gpu(function: Callable) -> Callable:
    """Elementwise work as one kernel: compiles the function for tensors on a GPU, where Triton is installed.

    On the CPU, and inside a compilation of the caller's, it runs as it is written.
    """
    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def run(x: Tensor, *arguments, **options):
        if x.is_cuda and not torch.compiler.is_compiling() and _has_module("triton"):
            return compiled()(x, *arguments, **options)
        return function(x, *arguments, **options)

    return run


@functools.cache
def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# -- convolution ---------------------------------------------------------------------------------------------


@fused_on_gpu
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, positions) -> Tensor:
    """silu of the causal depthwise convolution of x [B, T, D] in float32, in the dtype of x.

    weight is [D, width], the last tap for the token itself; history [B, width - 1, D] or None for zeros are
    the inputs before x; positions [B, T], or None where they count from 0 in every row, say how many tokens
    of its sequence a token has before it in x.
    """
    seqlen, width = x.shape[1], weight.shape[1]
    if history is None:
        before = functional.pad(x, (0, 0, width - 1, 0))
    else:
        before = torch.cat([history.to(x.dtype), x], 1)
    y = bias.float() if bias is not None else 0.0
    for distance in range(width):
        term = before[:, width - 1 - distance :][:, :seqlen].float() * weight[:, width - 1 - distance].float()
        if positions is not None:
            term = torch.where((positions >= distance).unsqueeze(-1), term, 0.0)
        y = y + term
    return functional.silu(y).to(x.dtype)


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution over time, then SiLU: y[t] = silu(sum_j weight[j] x[t - width + 1 + j]).

    `weight` [channels, 1, width] and `bias` [channels] are those of `torch.nn.Conv1d`. On a GPU it runs in
    causal-conv1d (Dao-AILab) where that is installed, else in PyTorch.
    """

    def __init__(self, channels: int, width: int, bias: bool = False):
        super().__init__(channels, channels, width, groups=channels, padding=width - 1, bias=bias)

    def forward(self, x: Tensor, history: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, T, channels].
            history: [B, width - 1, channels], the inputs before x; None: zeros.
            cu_seqlens: [N+1], offsets of sequences packed in one row (B = 1), none of which sees another.

        Returns:
            [B, T, channels] in the dtype of x.
        """
        if history is not None and cu_seqlens is not None:
            raise ValueError("history: expected None with cu_seqlens, packed sequences start from nothing")
        weight = self.weight.squeeze(1)
        if x.is_cuda and self.kernel_size[0] <= 4 and _has_module("causal_conv1d"):
            return _causal_conv1d(x, weight, self.bias, history, cu_seqlens)
        positions = None if cu_seqlens is None else _positions(cu_seqlens, x.shape[1])
        return _convolve(x, weight, self.bias, history, positions)


def sequence_of_token(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """[1, T] int32"""
    tokens = torch.arange(seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True).unsqueeze(0)


def _positions(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """[1, T]: how many tokens of its sequence a token has before it."""
    tokens = torch.arange(seqlen, device=cu_seqlens.device)
    last = cu_seqlens.shape[0] - 2
    return tokens - cu_seqlens[sequence_of_token(cu_seqlens, seqlen).clamp(max=last)]


def _causal_conv1d(x, weight, bias, history, cu_seqlens) -> Tensor:
    import causal_conv1d

    y = causal_conv1d.causal_conv1d_fn(
        x.transpose(1, 2),
        weight.to(x.dtype),
        bias if bias is None else bias.to(x.dtype),
        seq_idx=None if cu_seqlens is None else sequence_of_token(cu_seqlens, x.shape[1]),
        initial_states=None if history is None else history.to(x.dtype).transpose(1, 2),
        activation="silu",
    )
    return y.transpose(1, 2)


# -- norm ----------------------------------------------------------------------------------------------------


@fused_on_gpu
def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (y * ACTIVATIONS[activation](gate.float())).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm over the last dimension, times an activated gate: x / rms(x) * weight * activation(gate).

    Args:
        activation: "silu", "swish" (the same) or "sigmoid".
    """

    def __init__(self, size: int, eps: float = 1e-5, activation: str = "silu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.activation = eps, activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [.., size]; float32 inside, the dtype of x outside."""
        return _gated_norm(x, gate, self.weight, self.eps, self.activation)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, activation={self.activation}"
