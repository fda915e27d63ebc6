"""Attention over a sliding window, for hybrid models."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..autocast import in_autocast_dtype
from ..layers import check_attention_mask
from ..modules import fused_on_gpu, sequence_of_token
from .cache import GatedDeltaNet2Cache


@fused_on_gpu
def _normalize_and_rotate(
    x: Tensor, weight: Tensor, eps: float, positions: Tensor, rope_theta: float
) -> Tensor:
    """Pairs (i, i + head_dim / 2) turn by position * rope_theta**(-2 i / head_dim)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions.float().unsqueeze(-1) * rope_theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    y1, y2 = y.split(half, -1)
    return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], -1).to(x.dtype)


class RotaryRMSNorm(nn.RMSNorm):
    """RMSNorm over the channels of x [B, heads, T, head_dim], then rotary positions [T]; float32 inside."""

    def forward(self, x: Tensor, positions: Tensor, rope_theta: float) -> Tensor:
        return _normalize_and_rotate(x, self.weight, self.eps, positions, rope_theta)


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


class SlidingWindowAttention(nn.Module):
    """Causal attention over the last `window` tokens, with rotary positions, RMS-normalised q and k, groups.

    Through PyTorch: scaled_dot_product_attention, or on a GPU flex_attention, which skips what lies outside,
    where the window is shorter than the sequence, or sequences are packed or padded.

    Args:
        num_heads, num_kv_heads: of q and o, and of k and v, which groups of q's heads share.
        window: tokens that a token sees, itself included.
        rope_theta: base of the rotary positions.
        layer_idx: of this layer's state in a cache.
        norm_eps: of the norms of q and k.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        window: int,
        rope_theta: float,
        layer_idx: int,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.head_dim, self.window, self.layer_idx = hidden_size // num_heads, window, layer_idx
        self.rope_theta = rope_theta
        kv_size = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(hidden_size, kv_size, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (RotaryRMSNorm(self.head_dim, norm_eps) for _ in range(2))
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GatedDeltaNet2Cache | None = None,
        use_cache: bool | None = False,
        *,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, None, GatedDeltaNet2Cache | None]:
        """As `gdn2_ext.GatedDeltaNet2.forward`."""
        batch, seqlen, _ = hidden_states.shape
        device = hidden_states.device
        if attention_mask is not None:
            check_attention_mask(attention_mask, batch, seqlen)
        hidden_states = in_autocast_dtype(hidden_states)
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        first = 0 if state is None else state.num_tokens
        positions = torch.arange(first, first + seqlen, device=device)
        q, k = self.q_norm(q, positions, self.rope_theta), self.k_norm(k, positions, self.rope_theta)
        is_token = None if attention_mask is None else attention_mask[:, -seqlen:].bool()
        if state is not None and use_cache:
            k, v, is_token = state.append(k, v, is_token)
        elif state is not None and state.keys is not None:
            raise ValueError("use_cache: expected True where past_key_values has seen tokens")
        o = self._attend(q, k, v, is_token, cu_seqlens)
        return self.o_proj(o.transpose(1, 2).flatten(-2)), None, past_key_values

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, is_token: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """o [B, heads, T, head_dim]; the last queries belong to the last keys."""
        num_queries, num_keys = q.shape[2], k.shape[2]
        grouped = q.shape[1] != k.shape[1]
        whole = num_queries == num_keys and num_keys <= self.window
        if whole and is_token is None and cu_seqlens is None:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        sequence = None if cu_seqlens is None else sequence_of_token(cu_seqlens, num_keys)[0]
        offset = num_keys - num_queries

        def sees(batch, head, query, key):
            seen = (key <= query + offset) & (query + offset - key < self.window)
            if sequence is not None:
                seen = seen & (sequence[query] == sequence[key])
            if is_token is not None:
                seen = seen & (is_token[batch, key] | (key == query + offset))  # padding sees itself
            return seen

        if q.is_cuda and num_queries == num_keys:
            rows = None if is_token is None else q.shape[0]
            mask = create_block_mask(sees, rows, None, num_queries, num_keys, device=q.device)
            return _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        queries = torch.arange(num_queries, device=q.device)[:, None]
        mask = sees(batch, 0, queries, torch.arange(num_keys, device=q.device))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
