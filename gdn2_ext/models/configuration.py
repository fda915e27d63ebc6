"""Sizes and options of the language model."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..layers import check_layer_options

RECURRENT, SLIDING = "linear_attention", "sliding_attention"

# By name, for GatedDeltaNet2Config.named. Those of 1.3 billion parameters follow the paper: 16 heads of
# 128 x 128 (262144 state elements a layer), windows of 2048; depth and the MLP's width make up the count.
_SIZES = {
    "1.3b": {"num_hidden_layers": 20},
    "1.3b-hybrid": {"num_hidden_layers": 22, "attention_every": 2},
    "tiny": {
        "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_heads": 2, "head_dim": 32,
    },
}  # fmt: skip


class GatedDeltaNet2Config(PretrainedConfig):
    """A stack of blocks, each a mixer of tokens and a SwiGLU MLP with RMSNorm before both.

    Mixers are Gated DeltaNet-2 layers (`gdn2_ext.GatedDeltaNet2`, which explains `num_heads` to `variant`),
    and where `layer_types` says so attention over a sliding window with rotary positions.

    Args:
        intermediate_size: of the MLP; None: 8/3 of hidden_size, up to a multiple of 128.
        attention_every: n makes every n-th layer attention, 0 none. Shorthand for `layer_types`.
        layer_types: "linear_attention" (recurrent) or "sliding_attention" for every layer.
        num_attention_heads, num_key_value_heads: of attention layers; None: hidden_size / 128, and the same.
        sliding_window: tokens that attention sees, the current one included.
        rope_theta: base of the rotary positions.
        use_chunked_loss: in training, with labels, the loss comes straight from the hidden states in pieces
            (`torch.nn.functional.linear_cross_entropy`, where PyTorch has it) and `logits` is None.
        backend: of the op: "auto", "cuda" or "torch".
    """

    model_type = "gated_deltanet2"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 20,
        intermediate_size: int | None = None,
        num_heads: int = 16,
        head_dim: int = 128,
        num_v_heads: int | None = None,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        gate_activation: str = "silu",
        variant: str = "gdn2",
        attention_every: int = 0,
        layer_types: list[str] | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        sliding_window: int = 2048,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        use_chunked_loss: bool = True,
        backend: str = "auto",
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        check_layer_options(
            hidden_size, expand_v, head_dim, num_heads, num_v_heads, conv_size, gate_activation, variant,
            backend,
        )  # fmt: skip
        for name, size in (("vocab_size", vocab_size), ("num_hidden_layers", num_hidden_layers)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not 0 <= attention_every <= num_hidden_layers:
            raise ValueError(
                f"attention_every: expected up to {num_hidden_layers} layers, or 0 for none with attention, "
                f"got {attention_every}"
            )
        if layer_types is None:
            layer_types = [
                SLIDING if attention_every and (layer + 1) % attention_every == 0 else RECURRENT
                for layer in range(num_hidden_layers)
            ]
        if len(layer_types) != num_hidden_layers or not {*layer_types} <= {RECURRENT, SLIDING}:
            raise ValueError(
                f"layer_types: expected {num_hidden_layers} of {RECURRENT!r} or {SLIDING!r}, "
                f"got {layer_types}"
            )
        num_attention_heads = num_attention_heads or max(1, hidden_size // 128)
        num_key_value_heads = num_key_value_heads or num_attention_heads
        if SLIDING in layer_types:
            if hidden_size % num_attention_heads or hidden_size // num_attention_heads % 2:
                raise ValueError(
                    f"num_attention_heads: expected heads of an even size in {hidden_size}, "
                    f"got {num_attention_heads}"
                )
            if num_attention_heads % num_key_value_heads:
                raise ValueError(
                    f"num_key_value_heads: expected a divisor of {num_attention_heads}, "
                    f"got {num_key_value_heads}"
                )
            if sliding_window < 1:
                raise ValueError(f"sliding_window: expected at least 1 token, got {sliding_window}")
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.intermediate_size = intermediate_size or -(-hidden_size * 8 // 3 // 128) * 128
        self.num_heads, self.head_dim, self.num_v_heads, self.expand_v = (
            num_heads,
            head_dim,
            num_v_heads,
            expand_v,
        )
        self.use_short_conv, self.conv_size, self.conv_bias = use_short_conv, conv_size, conv_bias
        self.allow_neg_eigval, self.gate_activation, self.variant = allow_neg_eigval, gate_activation, variant
        self.layer_types, self.sliding_window, self.rope_theta = list(layer_types), sliding_window, rope_theta
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.norm_eps, self.initializer_range = norm_eps, initializer_range
        self.use_cache, self.use_chunked_loss, self.backend = use_cache, use_chunked_loss, backend
        super().__init__(
            pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings, **kwargs,
        )  # fmt: skip

    @classmethod
    def named(cls, name: str, **changes) -> GatedDeltaNet2Config:
        """The paper's sizes, "1.3b" or "1.3b-hybrid", or "tiny" (bytes, for tests), with fields changed."""
        if name not in _SIZES:
            raise ValueError(f"name: expected one of {', '.join(_SIZES)}, got {name!r}")
        return cls(**{**_SIZES[name], **changes})
