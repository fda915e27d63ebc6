"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class WarmupCosine:
    """The factor of the learning rate at an update, for `torch.optim.lr_scheduler.LambdaLR`.

    It rises linearly over `warmup_tokens`, then falls along half a cosine to `floor`. Tokens are counted with
    those of the update itself: the first one is not lost to a factor of 0, and the last one has `floor`.
    """

    tokens_per_update: int
    warmup_tokens: int
    total_tokens: int
    floor: float

    def __call__(self, update: int) -> float:
        tokens = (update + 1) * self.tokens_per_update
        if tokens < self.warmup_tokens:
            return tokens / self.warmup_tokens
        progress = (tokens - self.warmup_tokens) / max(1, self.total_tokens - self.warmup_tokens)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def names_with_decay(model: nn.Module) -> set[str]:
    """Matrices, and whatever else has two dimensions or more, unless marked with `_no_weight_decay`.

    Asked of the bare model: FSDP puts other parameters, without attributes, in the place of its own.
    """
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
    }


def make_optimizer(
    model: nn.Module, with_decay: set[str], lr: float, weight_decay: float, fused: bool
) -> torch.optim.AdamW:
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in with_decay].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
            for decays, parameters in groups.items()
            if parameters
        ],
        lr=lr,
        betas=(0.9, 0.95),
        fused=fused,
    )
