"""The language model: embedding, blocks, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..autocast import in_autocast_dtype
from ..layers import GatedDeltaNet2
from ..modules import GatedRMSNorm, ShortConvolution, fused_on_gpu
from .attention import SlidingWindowAttention
from .cache import GatedDeltaNet2Cache
from .configuration import SLIDING, GatedDeltaNet2Config

# What callers written for other models pass along: nothing follows from it here, or what cu_seqlens says.
_KNOWN = frozenset(
    ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    + ("position_ids", "cache_position", "output_attentions", "token_type_ids")
)


def _offsets(cu_seqlens: Tensor | None, others: dict) -> Tensor | None:
    return others.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast_dtype(x)
        return self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))


@fused_on_gpu
def _gated(gate: Tensor, x: Tensor) -> Tensor:
    return functional.silu(gate) * x


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GatedDeltaNet2Config, layer_idx: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        if config.layer_types[layer_idx] == SLIDING:
            self.attn = SlidingWindowAttention(
                config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
                config.sliding_window, config.rope_theta, layer_idx, config.norm_eps,
            )  # fmt: skip
        else:
            self.attn = GatedDeltaNet2(
                config.hidden_size, config.expand_v, config.head_dim, config.num_heads, config.num_v_heads,
                use_short_conv=config.use_short_conv, allow_neg_eigval=config.allow_neg_eigval,
                conv_size=config.conv_size, conv_bias=config.conv_bias, layer_idx=layer_idx,
                norm_eps=config.norm_eps, gate_activation=config.gate_activation, variant=config.variant,
                backend=config.backend,
            )  # fmt: skip
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, **options) -> Tensor:
        x = x + self.attn(self.attn_norm(x), **options)[0]
        return x + self.mlp(self.mlp_norm(x))


class GatedDeltaNet2PreTrainedModel(PreTrainedModel):
    config_class = GatedDeltaNet2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linears and embeddings N(0, initializer_range); the rest as its modules start."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (GatedDeltaNet2, GatedRMSNorm, ShortConvolution)):
            _reset_what_is_not_loaded(module)

    @classmethod
    def _supports_default_dynamic_cache(cls, *_: object) -> bool:
        return False


def _reset_what_is_not_loaded(module: nn.Module) -> None:
    parameters = list(module.parameters(recurse=False))
    loaded = {x: x.clone() for x in parameters if getattr(x, "_is_hf_initialized", False)}
    if len(loaded) < len(parameters):
        module.reset_parameters()
        for parameter, value in loaded.items():
            parameter.copy_(value)


class GatedDeltaNet2Model(GatedDeltaNet2PreTrainedModel):
    """Token ids or embeddings to hidden states, all blocks and a last norm."""

    def __init__(self, config: GatedDeltaNet2Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GatedDeltaNet2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        **others: object,
    ) -> BaseModelOutputWithPast | tuple:
        """
        Args:
            input_ids: [B, T]; or inputs_embeds: [B, T, hidden_size].
            attention_mask: [B, T] or longer, 0 at padding. A single token that goes on from a cache counts as
                one, whatever the mask says of it.
            past_key_values: a `GatedDeltaNet2Cache`; one is made where use_cache asks for it.
            use_cache: None: config.use_cache, but not in training or with cu_seqlens.
            cu_seqlens: [N+1], offsets of sequences packed in one row, also as cu_seq_lens_q (Hugging Face's
                flattening collator); cu_seqlens_cpu: the same on the CPU.
            others: position_ids and cache_position tell the model nothing; TypeError for unknown names.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        cu_seqlens = _offsets(cu_seqlens, others)
        if unknown := sorted(name for name in others if name not in _KNOWN):
            raise TypeError(f"{', '.join(unknown)}: not an argument of {type(self).__name__}.forward")
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        elif use_cache and checkpointing:
            raise ValueError("use_cache: expected False with gradient checkpointing, got True")
        if not isinstance(past_key_values, (GatedDeltaNet2Cache, type(None))):
            kind = type(past_key_values).__name__
            raise TypeError(f"past_key_values: expected a GatedDeltaNet2Cache or None, got {kind}")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = GatedDeltaNet2Cache(self.config)
        options = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        options |= {"cu_seqlens": cu_seqlens, "cu_seqlens_cpu": cu_seqlens_cpu}
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            if checkpointing:
                x = self._gradient_checkpointing_func(layer.__call__, x, **options)
            else:
                x = layer(x, **options)
        x = self.norm(x)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output


class GatedDeltaNet2ForCausalLM(GatedDeltaNet2PreTrainedModel, GenerationMixin):
    """The model with a linear head over the vocabulary, and `generate()`.

    Example:
        >>> import torch
        >>> from gdn2_ext.models import GatedDeltaNet2Config, GatedDeltaNet2ForCausalLM
        >>> model = GatedDeltaNet2ForCausalLM(GatedDeltaNet2Config.named("tiny", attention_every=2)).eval()
        >>> tokens = model.generate(torch.tensor([[72, 105]]), max_new_tokens=8, do_sample=False)
        >>> tokens.shape
        torch.Size([1, 10])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: GatedDeltaNet2Config):
        super().__init__(config)
        self.model = GatedDeltaNet2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GatedDeltaNet2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **options: object,
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            labels: [B, T] token ids, shifted in here. The loss leaves out -100, and first tokens of packed
                sequences.
            logits_to_keep: of the last so many tokens, or of these; 0: of all.
            num_items_in_batch: what the sum of the losses is divided by; None: the labels that count.

        The rest is that of `GatedDeltaNet2Model`.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            **options,
        )
        x, loss, logits = outputs.last_hidden_state, None, None
        if labels is None or not (self.training and self.config.use_chunked_loss):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x[:, kept])
        if labels is not None:
            if logits is not None and logits.shape[1] != x.shape[1]:
                raise ValueError("logits_to_keep: expected 0 with labels")
            if labels.shape != x.shape[:2]:
                raise ValueError(f"labels: expected {tuple(x.shape[:2])}, got {tuple(labels.shape)}")
            cu_seqlens = _offsets(options.get("cu_seqlens"), options)
            loss = self._loss(x, logits, labels, num_items_in_batch, cu_seqlens)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self, x: Tensor, logits: Tensor | None, labels: Tensor, num_items: int | Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Cross entropy of the next token, from logits [B, T, vocabulary] or in pieces from x."""
        targets = functional.pad(labels[:, 1:], (0, 1), value=-100).flatten().to(x.device)
        if cu_seqlens is not None:  # -1, before an empty sequence, is the last token of all
            targets[cu_seqlens[1:-1].to(x.device, torch.long) - 1] = -100
        reduction = "mean" if num_items is None else "sum"
        if logits is not None:
            loss = functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction=reduction)
        else:
            loss = _linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets, reduction)
        return loss if num_items is None else loss / num_items


def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """cross_entropy(x @ weight.T, targets), in pieces where PyTorch can."""
    if not hasattr(functional, "linear_cross_entropy") or torch.compiler.is_compiling():
        return functional.cross_entropy(functional.linear(x, weight).float(), targets, reduction=reduction)
    x, weight = in_autocast_dtype(x), in_autocast_dtype(weight)
    options = nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(
        x, weight, targets, reduction=reduction, ignore_index=-100, options=options
    )
