"""What a model remembers while it generates."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from ..layers import LayerState
from .configuration import SLIDING, GatedDeltaNet2Config


class WindowState:
    """Keys and values of the last tokens of an attention layer, and which of them are padding.

    Attributes:
        keys, values: [B, heads, tokens, head size], or None before the first token.
        is_token: [B, tokens] bool, or None where nothing is padding.
        num_tokens: seen so far, those that have left the window included.
    """

    def __init__(self, window: int):
        self.window = window
        self.reset()

    def reset(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_token: Tensor | None = None
        self.num_tokens = 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch."""
        for name in ("keys", "values", "is_token"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x.index_select(0, rows.to(x.device)))

    def append(
        self, keys: Tensor, values: Tensor, is_token: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and is_token of the tokens kept and the new; keeps what the next one sees."""
        batch, _, count, _ = keys.shape
        if is_token is not None or self.is_token is not None:
            before = self.num_kept
            old = (
                self.is_token if self.is_token is not None else keys.new_ones(batch, before, dtype=torch.bool)
            )
            new = is_token if is_token is not None else keys.new_ones(batch, count, dtype=torch.bool)
            is_token = torch.cat([old, new], 1)
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        kept = self.window - 1
        self.keys, self.values = (x[:, :, max(0, x.shape[2] - kept) :] for x in (keys, values))
        self.is_token = None if is_token is None else is_token[:, max(0, is_token.shape[1] - kept) :]
        self.num_tokens += count
        return keys, values, is_token

    @property
    def num_kept(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


class GatedDeltaNet2Cache(Cache):
    """The states of a model's layers: `layers[i]` is a `gdn2_ext.layers.LayerState`, or a `WindowState`."""

    is_compileable = False

    def __init__(self, config: GatedDeltaNet2Config):
        super().__init__(
            layers=[
                WindowState(config.sliding_window) if kind == SLIDING else LayerState()
                for kind in config.layer_types
            ]
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.layers[layer_idx].get_seq_length()

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            first = layer.S if isinstance(layer, LayerState) else layer.keys
            if first is not None:
                layer.select(torch.arange(first.shape[0], device=first.device).repeat_interleave(repeats))

    def crop(self, *_: object) -> None:
        raise NotImplementedError("a recurrent state cannot go back: assisted generation is not possible")
