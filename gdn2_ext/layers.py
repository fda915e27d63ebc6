"""The Gated DeltaNet-2 layer, its relatives with tied gates, and the states they keep while they generate.

Source: Gated DeltaNet-2, arXiv 2605.22791, section 3.5 and appendix C. Names of arguments and parameters are
those of flash-linear-attention's layer, whose checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .autocast import in_autocast_dtype
from .modules import ACTIVATIONS, GatedRMSNorm, ShortConvolution
from .ops import BACKENDS, check_offsets, chunk_gdn2, fused_recurrent_gdn2

# A raw decay gate that softplus turns into no decay at all.
_NO_DECAY = -1e4
# Up to so many tokens go through the recurrence one by one where a state is kept.
_FEW_TOKENS = 16


class Gates(NamedTuple):
    """Which gates a variant learns, and per what; "none" for a gate that is not there.

    decay: "channel", "head" or "none". erase, b: "channel", "head", or "none" (nothing is erased: b = 0).
    write, w: "channel", "erase" (tied: w is the b of its head), or "none" (w = 1).
    """

    decay: str
    erase: str
    write: str
    use_qk_l2norm: bool


# The same op all the time: what differs is which gates are tied.
VARIANTS = {
    "gdn2": Gates("channel", "channel", "channel", True),  # Gated DeltaNet-2
    "kda": Gates("channel", "head", "erase", True),  # Kimi Delta Attention
    "gated_deltanet": Gates("head", "head", "erase", True),
    "deltanet": Gates("none", "head", "erase", True),
    "gla": Gates("channel", "none", "none", False),  # gated linear attention
    "mamba2": Gates("head", "none", "none", False),  # Mamba-2's recurrence
}


class LayerState:
    """What a layer remembers of the tokens it has seen: the state S, and the last inputs of the convolutions.

    Attributes:
        S: [B, HV, K, V] float32, or None before the first token.
        inputs: by name of the convolution, [B, width - 1, channels].
        num_tokens: seen so far.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.S: Tensor | None = None
        self.inputs: dict[str, Tensor] = {}
        self.num_tokens = 0
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """[B]: the slots of a call that takes S as a pool."""
        if self._rows is None or self._rows.shape[0] != self.S.shape[0]:
            self._rows = torch.arange(self.S.shape[0], device=self.S.device)
        return self._rows

    def get_seq_length(self) -> int:
        return self.num_tokens

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch."""
        if self.S is not None:
            self.S = self.S.index_select(0, rows.to(self.S.device))
        self.inputs = {name: x.index_select(0, rows.to(x.device)) for name, x in self.inputs.items()}

    def keep(self, S: Tensor, inputs: dict[str, Tensor], num_tokens: int) -> None:
        """After `num_tokens` more. Tensors keep their addresses where their shapes stay, for CUDA graphs; but
        not where a backward may still need what they were.
        """
        self.S = _overwritten(self.S, S.detach())
        self.inputs = {name: _overwritten(self.inputs.get(name), x.detach()) for name, x in inputs.items()}
        self.num_tokens += num_tokens


def check_attention_mask(mask: Tensor, batch: int, seqlen: int) -> None:
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < seqlen:
        raise ValueError(
            f"attention_mask: expected [{batch}, {seqlen}] or longer, 0 at padding, got {tuple(mask.shape)}"
        )


def check_layer_options(
    hidden_size: int, expand_v: float, head_dim: int, num_heads: int, num_v_heads: int | None, conv_size: int,
    gate_activation: str, variant: str, backend: str,
) -> None:  # fmt: skip
    """Raises TypeError or ValueError for what no layer can be made of."""
    sizes = {"hidden_size": hidden_size, "head_dim": head_dim, "num_heads": num_heads, "conv_size": conv_size}
    for name, size in sizes.items():
        if type(size) is not int:
            raise TypeError(f"{name}: expected a whole number, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    choices = {
        "gate_activation": (gate_activation, ACTIVATIONS),
        "variant": (variant, VARIANTS),
        "backend": (backend, BACKENDS),
    }
    for name, (choice, possible) in choices.items():
        if choice not in possible:
            raise ValueError(f"{name}: expected one of {', '.join(possible)}, got {choice!r}")
    head_v_dim = round(head_dim * expand_v)
    if head_v_dim < 1 or not math.isclose(head_v_dim, head_dim * expand_v):
        raise ValueError(f"expand_v: expected a whole number of value channels a head, got {expand_v}")
    if num_v_heads is not None and type(num_v_heads) is not int:
        raise TypeError(f"num_v_heads: expected a whole number or None, got {num_v_heads!r}")
    if num_v_heads is not None and (num_v_heads < 1 or num_v_heads % num_heads):
        raise ValueError(f"num_v_heads: expected a multiple of num_heads {num_heads}, got {num_v_heads}")


def _overwritten(kept: Tensor | None, new: Tensor) -> Tensor:
    if kept is None or kept.shape != new.shape or torch.is_grad_enabled():
        return new
    return kept if kept.data_ptr() == new.data_ptr() else kept.copy_(new)


class RecurrentCache:
    """The states of a stack of layers while it generates: `layers[layer_idx]` is a `LayerState`.

    Example:
        >>> import torch
        >>> from gdn2_ext import GatedDeltaNet2, RecurrentCache
        >>> layer, cache = GatedDeltaNet2(64, head_dim=32, num_heads=2, layer_idx=0), RecurrentCache(1)
        >>> x = torch.randn(1, 5, 64)
        >>> with torch.no_grad():
        ...     whole, _, _ = layer(x)
        ...     first, _, _ = layer(x[:, :4], past_key_values=cache, use_cache=True)
        ...     last, _, _ = layer(x[:, 4:], past_key_values=cache, use_cache=True)
        >>> torch.allclose(torch.cat([first, last], 1), whole, atol=1e-5), cache.get_seq_length()
        (True, 5)
    """

    def __init__(self, num_layers: int):
        self.layers = [LayerState() for _ in range(num_layers)]

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.layers[layer_idx].get_seq_length()


class GatedDeltaNet2(nn.Module):
    """The Gated DeltaNet-2 layer: [B, T, hidden_size] to [B, T, hidden_size].

    q and k are linear, convolved, SiLU and L2-normalised; v linear, convolved and SiLU; the gates b and w
    sigmoids of linears; the log-decay g = -exp(A_log) softplus(f(x) + dt_bias), f of low rank. The output of
    the op is RMS-normalised per head, gated and projected back. Norms, sigmoids and the decay run inside the
    op, which gets raw projections.

    Args:
        hidden_size: of the input and output.
        expand_v: V = expand_v * head_dim.
        head_dim: K.
        num_heads: H, heads of q and k and of the gates g and b.
        num_v_heads: HV, value heads, a multiple of H; each group of HV / H shares q, k, g and b. None: H.
        mode: "chunk", or "fused_recurrent" for token by token under torch.no_grad.
        use_short_conv: without it q, k and v go through SiLU alone.
        allow_neg_eigval: b up to 2, so that transitions may have negative eigenvalues.
        conv_size, conv_bias: of the convolutions.
        layer_idx: of this layer's state in a cache.
        norm_eps: of the output's norm.
        gate_activation: of the output gate: "sigmoid" (flash-linear-attention) or "silu" (the paper).
        variant: "gdn2", or a relative with tied gates: "kda", "gated_deltanet", "deltanet", "gla", "mamba2".
            Their b, w and g have one value a head, or none, where the published recurrence has.
        backend: of the op: "auto", "cuda" or "torch".

    A_log, dt_bias, biases and norms carry `_no_weight_decay = True`.

    Example:
        >>> import torch
        >>> from gdn2_ext import GatedDeltaNet2
        >>> layer = GatedDeltaNet2(hidden_size=128, head_dim=32, num_heads=4)
        >>> o, _, _ = layer(torch.randn(2, 100, 128))
        >>> o.shape
        torch.Size([2, 100, 128])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        *,
        gate_activation: str = "sigmoid",
        variant: str = "gdn2",
        backend: str = "auto",
    ):
        super().__init__()
        if mode not in ("chunk", "fused_recurrent"):
            raise ValueError(f"mode: expected 'chunk' or 'fused_recurrent', got {mode!r}")
        check_layer_options(
            hidden_size, expand_v, head_dim, num_heads, num_v_heads, conv_size, gate_activation, variant,
            backend,
        )  # fmt: skip
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        head_v_dim = round(head_dim * expand_v)
        self.hidden_size, self.expand_v, self.mode, self.backend = hidden_size, expand_v, mode, backend
        self.head_dim, self.head_k_dim, self.head_v_dim = head_dim, head_dim, head_v_dim
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.key_dim, self.value_dim = num_heads * head_dim, num_v_heads * head_v_dim
        self.use_short_conv, self.conv_size, self.allow_neg_eigval = (
            use_short_conv,
            conv_size,
            allow_neg_eigval,
        )
        self.layer_idx, self.variant, self.gates = layer_idx, variant, VARIANTS[variant]

        def linear(size: int) -> nn.Linear:
            return nn.Linear(hidden_size, size, bias=False)

        def low_rank(size: int, bias: bool) -> nn.Sequential:
            return nn.Sequential(linear(head_v_dim), nn.Linear(head_v_dim, size, bias=bias))

        self.q_proj, self.k_proj = linear(self.key_dim), linear(self.key_dim)
        self.v_proj = linear(self.value_dim)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(self.value_dim, conv_size, conv_bias)
        if self.gates.decay != "none":
            decays = self.key_dim if self.gates.decay == "channel" else num_heads
            self.f_proj = low_rank(decays, bias=False) if self.gates.decay == "channel" else linear(decays)
            self.A_log, self.dt_bias = nn.Parameter(torch.empty(num_heads)), nn.Parameter(torch.empty(decays))
        if self.gates.erase != "none":
            self.b_proj = linear(self.key_dim if self.gates.erase == "channel" else num_heads)
        if self.gates.write == "channel":
            self.w_proj = linear(self.value_dim)
        self.g_proj = low_rank(self.value_dim, bias=True)
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps, gate_activation)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The decay's: A = exp(A_log) in U[1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
        if self.gates.decay != "none":
            self.A_log.uniform_(1, 16).log_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        *,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, None, RecurrentCache | None]:
        """
        Args:
            hidden_states: [B, T, hidden_size].
            attention_mask: [B, T'] with T' >= T, whose last T columns are 0 at padding, on whichever side: it
                changes no state, and no output but its own, which are to be ignored. A single token that goes
                on from a cache counts as one, whatever the mask says of it.
            past_key_values: a cache; the layer goes on from `past_key_values.layers[layer_idx]`.
            use_cache: keep the state there, without gradients of it. Nothing is kept without a cache.
            output_attentions: accepted for the sake of common call sites; there are none.
            cu_seqlens: [N+1] int32 or int64, offsets of sequences packed in one row (B = 1).
            cu_seqlens_cpu: the same on the CPU, where they are checked.

        Returns:
            (o, None, past_key_values): o [B, T, hidden_size].
        """
        if not isinstance(hidden_states, Tensor):
            raise TypeError(f"hidden_states: expected a torch.Tensor, got {type(hidden_states).__name__}")
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: expected [B, T, {self.hidden_size}], got {tuple(hidden_states.shape)}"
            )
        check_offsets(hidden_states, cu_seqlens, cu_seqlens_cpu)
        batch, seqlen, _ = hidden_states.shape
        if attention_mask is not None:
            check_attention_mask(attention_mask, batch, seqlen)
        if cu_seqlens is not None and (attention_mask is not None or past_key_values is not None):
            raise ValueError("cu_seqlens: expected neither attention_mask nor past_key_values with it")
        state = None if past_key_values is None else self._state_in(past_key_values, batch)
        is_token = None
        if attention_mask is not None and not (state is not None and state.num_tokens and seqlen == 1):
            is_token = attention_mask[:, -seqlen:].bool().unsqueeze(-1)  # [B, T, 1]
            hidden_states = hidden_states.masked_fill(~is_token, 0)
        hidden_states = in_autocast_dtype(hidden_states)

        raw = {
            "q": self.q_proj(hidden_states),
            "k": self.k_proj(hidden_states),
            "v": self.v_proj(hidden_states),
        }
        q, k, v = (self._convolved(name, x, state, cu_seqlens) for name, x in raw.items())
        if is_token is not None:
            k = k.masked_fill(~is_token, 0)  # nothing is erased or written
        q, k = q.unflatten(-1, (self.num_heads, -1)), k.unflatten(-1, (self.num_heads, -1))
        v = v.unflatten(-1, (self.num_v_heads, -1))
        o, S = self._op(
            q, k, v, self._gates(hidden_states, k, v, is_token), state, use_cache, cu_seqlens, cu_seqlens_cpu
        )
        if use_cache and state is not None:
            state.keep(S, self._last_inputs(raw, state, is_token), seqlen)
        o = self.o_norm(o, self.g_proj(hidden_states).unflatten(-1, (self.num_v_heads, -1)))
        return self.o_proj(o.flatten(-2)), None, past_key_values

    def _state_in(self, cache: RecurrentCache, batch: int) -> LayerState:
        if self.layer_idx is None:
            raise ValueError("layer_idx: expected this layer's index in the cache, got None")
        states = getattr(cache, "layers", ())
        state = states[self.layer_idx] if self.layer_idx < len(states) else None
        if not isinstance(state, LayerState):
            raise ValueError(
                f"past_key_values: expected a cache with a LayerState for layer {self.layer_idx}, such as "
                f"RecurrentCache, got {type(cache).__name__} with {len(states)} layers"
            )
        if state.S is not None and state.S.shape[0] != batch:
            raise ValueError(
                f"hidden_states: expected a batch of {state.S.shape[0]} as in the cache, got {batch}"
            )
        return state

    def _convolved(self, name: str, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
        if not self.use_short_conv:
            return functional.silu(x)
        return getattr(self, f"{name}_conv1d")(x, state and state.inputs.get(name), cu_seqlens)

    def _last_inputs(
        self, raw: dict[str, Tensor], state: LayerState, is_token: Tensor | None
    ) -> dict[str, Tensor]:
        """The inputs of the convolutions of the last conv_size - 1 tokens; padding does not count."""
        if not self.use_short_conv or self.conv_size == 1:
            return {}
        return {
            name: _last_rows(x, state.inputs.get(name), is_token, self.conv_size - 1)
            for name, x in raw.items()
        }

    def _gates(self, x: Tensor, k: Tensor, v: Tensor, is_token: Tensor | None) -> dict:
        """g, b and w as the op takes them, and what it has to do with them."""
        heads = (self.num_heads, -1)
        gates: dict = {"use_qk_l2norm_in_kernel": self.gates.use_qk_l2norm}
        if self.gates.decay == "none":
            gates["g"] = torch.zeros((), device=x.device).expand(k.shape)
        else:
            g = self.f_proj(x)
            if is_token is not None:
                g = g.masked_fill(~is_token, _NO_DECAY)
            repeats = k.shape[-1] if self.gates.decay == "head" else 1
            gates["g"] = g.unflatten(-1, heads).expand(k.shape)
            gates |= {"use_gate_in_kernel": True, "A_log": self.A_log.float()}
            gates["dt_bias"] = self.dt_bias.float().repeat_interleave(repeats)
        if self.gates.erase == "none":
            return gates | {"b": torch.zeros_like(k), "w": torch.ones_like(v)}
        b, erase_scale = self.b_proj(x).unflatten(-1, heads), 2.0 if self.allow_neg_eigval else 1.0
        if self.gates.write == "channel":
            w = self.w_proj(x).unflatten(-1, v.shape[-2:])
            gates |= {"use_gate_sigmoid_in_kernel": True, "erase_scale": erase_scale}
        else:
            b = erase_scale * b.float().sigmoid().to(k.dtype)
            w = b.repeat_interleave(self.num_v_heads // self.num_heads, -2).expand(v.shape)
        return gates | {"b": b.expand(k.shape), "w": w}

    def _op(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict, state: LayerState | None, use_cache, cu_seqlens,
        cu_seqlens_cpu,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        few = state is not None and q.shape[1] <= _FEW_TOKENS
        if (self.mode == "fused_recurrent" or few) and not torch.is_grad_enabled():
            options = {"cu_seqlens": cu_seqlens, "backend": self.backend}
            if state is not None and state.S is not None and use_cache:
                options |= {"state_indices": state.rows, "inplace_final_state": True}
            function = fused_recurrent_gdn2
        else:
            options = {"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": cu_seqlens_cpu, "backend": self.backend}
            function = chunk_gdn2
        initial_state = None if state is None else state.S
        return function(
            q, k, v, **gates, initial_state=initial_state, output_final_state=bool(use_cache), **options
        )

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_v_heads={self.num_v_heads}"
        return f"variant={self.variant}, {heads}, K={self.head_k_dim}, V={self.head_v_dim}"


def _last_rows(x: Tensor, history: Tensor | None, is_token: Tensor | None, count: int) -> Tensor:
    """The last `count` rows [B, count, D] of history (or zeros) and x, but for padding at the end of x."""
    if history is None:
        history = x.new_zeros(x.shape[0], count, x.shape[2])
    rows = torch.cat([history.to(x.dtype), x], 1)
    if is_token is None:
        return rows[:, -count:].contiguous()
    tokens = torch.arange(1, x.shape[1] + 1, device=x.device)
    end = (is_token.squeeze(-1) * tokens).amax(1)  # behind the last token
    index = end.unsqueeze(-1) + torch.arange(count, device=x.device)
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
