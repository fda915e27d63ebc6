"""The operators: torch.ops.gdn2_ext.*, functional, with fake kernels, one schema for every backend.

Operators are defined with torch.library.Library, since a custom_op costs tens of microseconds a call.
Arguments that a backend does not need are ignored by it; outputs that were not asked for are empty tensors,
as schemas have no optional outputs. Validation lies in ops.py: operators trust their arguments.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import cuda_backend, cuda_recurrent, torch_backend
from .cuda_backend import kept_size
from .torch_backend import CHUNK, GateOptions, compute_dtype, num_chunk_slots

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w, Tensor? A_log, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
_OPTIONS = (
    "float scale, bool use_qk_l2norm, bool use_gate, float? lower_bound, bool use_gate_sigmoid, "
    "float erase_scale, bool state_v_first"
)

lib = torch.library.Library("gdn2_ext", "DEF")
lib.define(
    f"chunk_forward({_INPUTS}, {_OPTIONS}, bool output_final_state, SymInt? num_state_chunks, "
    "bool save_for_backward, bool disable_recompute, int sequence_split, str backend) "
    "-> (Tensor o, Tensor final_state, Tensor h, Tensor kept)"
)
lib.define(
    f"chunk_backward(Tensor do, Tensor? d_final_state, {_INPUTS}, Tensor kept, {_OPTIONS}, "
    "bool[] needed, int sequence_split, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor db, Tensor dw, Tensor dA_log, Tensor d_dt_bias, "
    "Tensor d_initial_state)"
)
lib.define(
    f"recurrent_forward({_INPUTS}, Tensor? state_indices, Tensor? num_accepted_tokens, {_OPTIONS}, "
    "bool output_final_state, str backend) -> (Tensor o, Tensor final_state)"
)
lib.define(
    f"recurrent_forward_({_INPUTS.replace('Tensor? initial_state', 'Tensor(a!) pool')}, "
    f"Tensor state_indices, Tensor? num_accepted_tokens, {_OPTIONS}, str backend) -> Tensor"
)


def state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, state_v_first: bool) -> tuple:
    """[N, HV, K, V], or [N, HV, V, K] with state_v_first."""
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    matrix = (v.shape[3], q.shape[3]) if state_v_first else (q.shape[3], v.shape[3])
    return (num_sequences, v.shape[2], *matrix)


def _chunk_matrices_shape(q: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> tuple:
    """What the torch backend keeps, A - I and P: [2, chunk slots, heads of g, C, C]."""
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = num_chunk_slots(q.shape[0], q.shape[1], num_sequences, cu_seqlens is not None)
    return (2, slots, g.shape[2], CHUNK, CHUNK)


def _empty(q: Tensor) -> Tensor:
    return q.new_empty(0)


def _without_autocast(kernel):
    """The kernel with autocast off: it has chosen its dtypes."""

    @functools.wraps(kernel)
    def call(*args):
        device_type = args[0].device.type
        if not torch.is_autocast_enabled(device_type):
            return kernel(*args)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args)

    return call


def _chunk_forward(
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens,
    scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first,
    output_final_state, num_state_chunks, save_for_backward, disable_recompute, sequence_split, backend,
):  # fmt: skip
    if q.shape[0] == 0:  # no batch: nothing to compute, and the shapes are all there is
        return _chunk_forward_fake(
            q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens,
            scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first,
            output_final_state, num_state_chunks, save_for_backward, disable_recompute, sequence_split,
            backend,
        )  # fmt: skip
    options = GateOptions(use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale)
    inputs = (q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, scale, options)
    arguments = {
        "state_v_first": state_v_first, "output_final_state": output_final_state,
        "num_state_chunks": num_state_chunks, "keep": save_for_backward,
    }  # fmt: skip
    if backend == "cuda":
        arguments["sequence_split"] = sequence_split
        arguments["keep_tiles"] = save_for_backward and disable_recompute
        o, *others = cuda_backend.chunk_forward(*inputs, **arguments)
    else:
        o, *others = torch_backend.chunk_forward(*inputs, **arguments)
    return (o, *(_empty(q) if x is None else x for x in others))


def _chunk_forward_fake(
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens,
    scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first,
    output_final_state, num_state_chunks, save_for_backward, disable_recompute, sequence_split, backend,
):  # fmt: skip
    dtype = compute_dtype(q.dtype)
    o = v.new_empty(v.shape)
    state = state_shape(q, v, cu_seqlens, state_v_first)
    final_state = q.new_empty(state, dtype=dtype) if output_final_state else _empty(q)
    if num_state_chunks is None:
        h = _empty(q)
    else:
        h = q.new_empty((q.shape[0], num_state_chunks, *state[1:]), dtype=dtype)
    if not save_for_backward:
        kept = _empty(q)
    elif backend == "cuda":
        segments = sequence_split if sequence_split > 1 and q.shape[1] != 0 else 1
        size = kept_size(q, v, g, cu_seqlens, segments, disable_recompute, use_qk_l2norm)
        kept = q.new_empty(size, dtype=torch.float32)
    else:
        kept = q.new_empty(_chunk_matrices_shape(q, g, cu_seqlens), dtype=dtype)
    return o, final_state, h, kept


def _chunk_backward(
    do, d_final_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, kept,
    scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first,
    needed, sequence_split, backend,
):  # fmt: skip
    if q.shape[0] == 0:
        inputs = (q, k, v, g, b, w, A_log, dt_bias, initial_state)
        return tuple(torch.zeros_like(x) if wanted else _empty(q) for x, wanted in zip(inputs, needed))
    options = GateOptions(use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale)
    arguments = (
        do, d_final_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, kept, scale, options,
    )  # fmt: skip
    if backend == "cuda":
        gradients = cuda_backend.chunk_backward(
            *arguments, state_v_first=state_v_first, needed=needed, sequence_split=sequence_split
        )
    else:
        gradients = torch_backend.chunk_backward(*arguments, state_v_first=state_v_first)
    return tuple(x.contiguous() if wanted else _empty(q) for x, wanted in zip(gradients, needed))


def _chunk_backward_fake(
    do, d_final_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, kept,
    scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first,
    needed, sequence_split, backend,
):  # fmt: skip
    inputs = (q, k, v, g, b, w, A_log, dt_bias, initial_state)
    return tuple(x.new_empty(x.shape) if wanted else q.new_empty(0) for x, wanted in zip(inputs, needed))


def _recurrent_forward(
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, state_indices, num_accepted_tokens,
    scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first,
    output_final_state, backend, inplace_final_state=False,
):  # fmt: skip
    options = GateOptions(use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale)
    module = cuda_recurrent if backend == "cuda" else torch_backend
    o, final_state = module.recurrent_forward(
        q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, state_indices, num_accepted_tokens,
        scale, options, state_v_first=state_v_first, inplace_final_state=inplace_final_state,
        output_final_state=output_final_state,
    )  # fmt: skip
    return o, _empty(q) if final_state is None else final_state


def _recurrent_forward_fake(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, *rest):
    *_, state_v_first, output_final_state, _ = rest
    state = state_shape(q, v, cu_seqlens, state_v_first) if output_final_state else (0,)
    dtype = compute_dtype(q.dtype) if output_final_state else q.dtype
    return v.new_empty(v.shape), q.new_empty(state, dtype=dtype)


def _recurrent_forward_inplace(*args):
    *args, backend = args
    return _recurrent_forward(*args, False, backend, inplace_final_state=True)[0]


def _recurrent_forward_inplace_fake(q, k, v, *rest):
    return v.new_empty(v.shape)


for _name, _kernel, _fake in (
    ("chunk_forward", _chunk_forward, _chunk_forward_fake),
    ("chunk_backward", _chunk_backward, _chunk_backward_fake),
    ("recurrent_forward", _recurrent_forward, _recurrent_forward_fake),
    ("recurrent_forward_", _recurrent_forward_inplace, _recurrent_forward_inplace_fake),
):
    lib.impl(_name, _without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gdn2_ext::{_name}", _fake, lib=lib)
