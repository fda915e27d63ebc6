"""Gradients of the operators in library.py: what is saved, and which backward operator runs.

Saved between forward and backward: the inputs, and in one tensor A - I and P, the maps and first states of a
split's segments, and with disable_recompute the tiles that the walks read. The states are recomputed. Only
gradients that somebody asked for are returned. A second derivative does not exist and says so.
"""

from __future__ import annotations

import torch

from .library import lib

_TENSORS = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state")
_NUM_INPUTS = len(_TENSORS) + 1  # and cu_seqlens
_NUM_OPTIONS = 7  # scale ... state_v_first


def _save_chunk_forward(ctx, inputs, output):
    *_, h, kept = output
    ctx.save_for_backward(*inputs[:_NUM_INPUTS], kept)
    ctx.options = inputs[_NUM_INPUTS : _NUM_INPUTS + _NUM_OPTIONS]
    *_, ctx.save_for_backward_asked, _, ctx.sequence_split, ctx.backend = inputs[_NUM_INPUTS + _NUM_OPTIONS :]
    ctx.mark_non_differentiable(h, kept)
    ctx.set_materialize_grads(False)


def _chunk_gradients(ctx, do, d_final_state, *_):
    if not ctx.save_for_backward_asked:
        raise RuntimeError(
            "gdn2_ext::chunk_forward was called with save_for_backward=False: it has no backward"
        )
    *inputs, kept = ctx.saved_tensors
    needed = [
        asked and tensor is not None for tensor, asked in zip(inputs[: len(_TENSORS)], ctx.needs_input_grad)
    ]
    if do is None:
        v = inputs[2]
        do = v.new_zeros(v.shape)
    if d_final_state is not None and d_final_state.numel() == 0:
        d_final_state = None
    gradients = torch.ops.gdn2_ext.chunk_backward(
        do, d_final_state, *inputs, kept, *ctx.options, needed, ctx.sequence_split, ctx.backend
    )
    gradients = [x if wanted else None for x, wanted in zip(gradients, needed)]
    num_others = 1 + _NUM_OPTIONS + 6  # cu_seqlens, the options, output_final_state ... backend
    return (*gradients, *[None] * num_others)


def _no_double_backward(ctx, *_):
    raise RuntimeError("gdn2_ext: chunk_gdn2 has no second derivative (double backward is not implemented)")


def _no_recurrent_backward(ctx, *_):
    raise RuntimeError(
        "gdn2_ext: fused_recurrent_gdn2 is for inference and has no backward; train with chunk_gdn2"
    )


def _save_nothing(ctx, inputs, output):
    pass


for _name, _backward, _setup in (
    ("chunk_forward", _chunk_gradients, _save_chunk_forward),
    ("chunk_backward", _no_double_backward, _save_nothing),
    ("recurrent_forward", _no_recurrent_backward, _save_nothing),
):
    torch.library.register_autograd(f"gdn2_ext::{_name}", _backward, setup_context=_setup, lib=lib)
