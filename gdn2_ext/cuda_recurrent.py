"""How `fused_recurrent_gdn2` is launched on a GPU, with as little as possible on the host.

A decoding step calls the op once a layer: `recurrent_at_once` goes around the checks of ops.py and around
torch.library, for calls that need neither.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import cuda_launch
from .cuda_launch import READ_TENSORS, are_plain, as_tuple, nobody_watches
from .torch_backend import GateOptions

_CONTIGUOUS = torch.contiguous_format


def _new_final_state(q: Tensor, v: Tensor, num_sequences: int, state_v_first: bool) -> Tensor:
    matrix = (v.shape[3], q.shape[3]) if state_v_first else (q.shape[3], v.shape[3])
    return q.new_empty((num_sequences, v.shape[2], *matrix), dtype=torch.float32)


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    scale: float,
    options: GateOptions,
    *,
    state_v_first: bool,
    inplace_final_state: bool,
    output_final_state: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o (`out`, if that is given) and the final state (None unless asked for, or with inplace_final_state).

    Everything has been checked. A layout that the kernel does not read is copied, and copied back.
    """
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    final_state = None
    if output_final_state and not inplace_final_state:
        final_state = _new_final_state(q, v, num_sequences, state_v_first)
    A_log, dt_bias = (x if x is None else x.contiguous() for x in (A_log, dt_bias))
    others = [as_tuple(x) for x in (final_state, cu_seqlens, state_indices, num_accepted_tokens)]

    def launch(*tensors: Tensor | None) -> bool:
        return cuda_launch._C.recurrent_forward(
            None, *(as_tuple(x) for x in tensors), *others, scale, options.use_qk_l2norm, options.use_gate,
            options.lower_bound, options.use_gate_sigmoid, options.erase_scale, state_v_first,
            inplace_final_state, torch.cuda.current_stream(q.device).cuda_stream,
        )  # fmt: skip

    with torch.cuda.device(q.device):
        if not launch(q, k, v, g, b, w, o, A_log, dt_bias, initial_state):
            tokens = [x.contiguous() for x in (q, k, v, g, b, w, o)]
            states = initial_state if initial_state is None else initial_state.contiguous()
            if not launch(*tokens, A_log, dt_bias, states):
                raise RuntimeError("gdn2_ext: the recurrent kernel takes no tensors as large as these")
            if tokens[-1] is not o:
                o.copy_(tokens[-1])
            if inplace_final_state and states is not initial_state:
                initial_state.copy_(states)
    if out is not None:
        increment_version(out)
    if inplace_final_state:
        increment_version(initial_state)
    return o, final_state


def recurrent_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm: bool,
    use_gate: bool,
    lower_bound: float | None,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    inplace_final_state: bool,
    use_gate_sigmoid: bool,
    erase_scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """`fused_recurrent_gdn2` for the calls that decoding makes again and again: plain tensors on the current
    device. They are checked where their shapes and types are read, in csrc/api/recurrent_binding.cpp.

    None, and nothing done, for any other call and for any that is wrong, which ops.py then looks at.
    """
    if READ_TENSORS is None or cuda_launch._C is None:
        return None
    if not (type(q) is type(v) is Tensor) or not q.is_cuda or not nobody_watches():
        return None
    if torch.is_grad_enabled():
        if not are_plain((q, k, v, g, b, w, A_log, dt_bias, initial_state, out)):
            return None
    o = out
    if out is None:
        o = torch.empty_like(v) if v.is_contiguous() else torch.empty_like(v, memory_format=_CONTIGUOUS)
    final_state = None
    if output_final_state and not inplace_final_state:
        if state_indices is None and type(initial_state) is Tensor and initial_state.is_contiguous():
            final_state = torch.empty_like(initial_state)
        elif q.dim() != 4 or v.dim() != 4:
            return None
        elif cu_seqlens is None:
            final_state = _new_final_state(q, v, q.shape[0], state_v_first)
        elif type(cu_seqlens) is Tensor and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 1:
            final_state = _new_final_state(q, v, cu_seqlens.shape[0] - 1, state_v_first)
        else:
            return None
    if not cuda_launch._C.recurrent_forward(
        READ_TENSORS, q, k, v, g, b, w, o, A_log, dt_bias, initial_state, final_state, cu_seqlens,
        state_indices, num_accepted_tokens, scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid,
        erase_scale, state_v_first, inplace_final_state, 0,
    ):  # fmt: skip
        return None
    # Autograd does not know of the kernel's writes.
    if out is not None:
        increment_version(out)
    if inplace_final_state:
        increment_version(initial_state)
        if output_final_state:
            final_state = initial_state
    return o, final_state
