"""How `fused_recurrent_gdn2` is launched on a GPU, with as little as possible on the host.

A decoding step calls the op once a layer, and the kernel takes a few microseconds. The checks of ops.py and the
ways of torch.library take tens: `recurrent_at_once` goes around both, for calls that need neither.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import cuda_backend
from .cuda_backend import _DECAY_LOWER_BOUND, _DECAY_NONE, _DECAY_SOFTPLUS, _ELEMENTS, MAX_DIM_K, MAX_DIM_V
from .torch_backend import GateOptions

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)
_STATE_ELEMENTS = {torch.float32: 2, torch.bfloat16: 0}
_INDEX_DTYPES = (torch.int32, torch.int64)
_CONTIGUOUS = torch.contiguous_format


def _current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)


def _current_device() -> int:
    return torch._C._cuda_getDevice()


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def _count_writes(*written: Tensor | None) -> None:
    """Tells autograd of tensors that the kernel has written to."""
    for x in written:
        if x is not None:
            torch.autograd.graph.increment_version(x)


def _index_arguments(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.data_ptr(), x.dtype is torch.int64, x.stride())


def _launch_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    o: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    states: Tensor | None,
    final_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    use_gate: bool,
    lower_bound: float | None,
    use_gate_sigmoid: bool,
    erase_scale: float,
    state_v_first: bool,
    inplace: bool,
    device_index: int,
) -> bool:
    """On the current device. False, and nothing launched, where the kernel does not read a layout."""
    shape = q.shape
    decay_gate = _DECAY_NONE
    if use_gate:
        decay_gate = _DECAY_SOFTPLUS if lower_bound is None else _DECAY_LOWER_BOUND
    if states is None:
        state_element, num_slots, state_arguments = 2, 0, None
    else:
        state_element, num_slots = _STATE_ELEMENTS[states.dtype], states.shape[0]
        state_arguments = (states.data_ptr(), states.stride())
    return cuda_backend._C.recurrent_forward(
        _ELEMENTS[q.dtype], _ELEMENTS[g.dtype], state_element, shape, v.shape, g.shape[2],
        shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, num_slots,
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        g.data_ptr(), g.stride(), b.data_ptr(), b.stride(), w.data_ptr(), w.stride(),
        o.data_ptr(), o.stride(),
        0 if A_log is None else A_log.data_ptr(), 0 if dt_bias is None else dt_bias.data_ptr(),
        state_v_first, state_arguments,
        None if final_state is None else (final_state.data_ptr(), final_state.stride()),
        None if cu_seqlens is None else _index_arguments(cu_seqlens),
        None if state_indices is None else _index_arguments(state_indices),
        None if num_accepted_tokens is None else _index_arguments(num_accepted_tokens),
        state_indices.shape[1] if state_indices is not None and state_indices.dim() == 2 else 0,
        inplace, scale, use_qk_l2norm, decay_gate, lower_bound or 0.0, use_gate_sigmoid, erase_scale,
        _current_stream(device_index),
    )  # fmt: skip


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
    """o (`out`, if that is given) and the final state (or None; with inplace_final_state always).

    Everything has been checked. A layout that the kernel does not read is copied, and copied back.
    """
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    final_state = None
    if output_final_state and not inplace_final_state:
        matrix = (v.shape[3], q.shape[3]) if state_v_first else (q.shape[3], v.shape[3])
        final_state = q.new_empty((num_sequences, v.shape[2], *matrix), dtype=torch.float32)
    A_log, dt_bias = (x if x is None else x.contiguous() for x in (A_log, dt_bias))

    def launch(q, k, v, g, b, w, o, states) -> bool:
        return _launch_recurrent(
            q, k, v, g, b, w, o, A_log, dt_bias, states, final_state, cu_seqlens, state_indices,
            num_accepted_tokens, scale, *options, state_v_first, inplace_final_state, q.device.index,
        )  # fmt: skip

    with torch.cuda.device(q.device):
        if not launch(q, k, v, g, b, w, o, initial_state):
            tokens = [x.contiguous() for x in (q, k, v, g, b, w)]
            plain_o = o.contiguous()
            states = initial_state if initial_state is None else initial_state.contiguous()
            if not launch(*tokens, plain_o, states):
                raise RuntimeError("gdn2_ext: the recurrent kernel takes no tensors of this size")
            if plain_o is not o:
                o.copy_(plain_o)
            if inplace_final_state and states is not initial_state:
                initial_state.copy_(states)
    _count_writes(out, initial_state if inplace_final_state else None)
    return o, final_state


def needs_no_operator(tensors) -> bool:
    """Whether the kernels may be launched without going through torch.library: plain tensors on a GPU, of
    which none is differentiated, and nobody who traces, compiles, casts or watches operators.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x is not None and type(x) not in _TENSOR_TYPES:
            return False
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cuda")
    )


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
    """`fused_recurrent_gdn2` for the call that decoding makes again and again, with as little as possible on
    the host; None, and nothing done, for any other, which is then checked argument by argument.

    What is asked here implies all checks of ops.py.
    """
    if type(q) is not Tensor or not q.is_cuda or cuda_backend._C is None:
        return None
    if not needs_no_operator((q, k, v, g, b, w, A_log, dt_bias, initial_state, out)):
        return None
    index = q.get_device()
    if index != _current_device() or not _is_hopper(index):
        return None
    dtype, shape, value_shape, gate_shape = q.dtype, q.shape, v.shape, g.shape
    if dtype is not torch.bfloat16 and dtype is not torch.float16:
        return None
    for x in (k, v, b, w):
        if x.dtype is not dtype or x.get_device() != index:
            return None
    if (g.dtype is not torch.float32 and g.dtype is not dtype) or g.get_device() != index:
        return None
    if k.shape != shape or w.shape != value_shape or b.shape != gate_shape:
        return None
    if len(shape) != 4 or len(value_shape) != 4:
        return None
    batch, seqlen, heads, dim_k = shape
    value_batch, value_seqlen, value_heads, dim_v = value_shape
    if value_batch != batch or value_seqlen != seqlen or not 0 < dim_k <= MAX_DIM_K:
        return None
    if not 0 < dim_v <= MAX_DIM_V or heads == 0 or value_heads == 0 or value_heads % heads:
        return None
    if gate_shape != shape and tuple(gate_shape) != (batch, seqlen, value_heads, dim_k):
        return None

    if use_gate:
        if A_log is None:
            if lower_bound is None:
                return None
        elif not _is_parameter(A_log, heads, index):
            return None
        if dt_bias is not None and not _is_parameter(dt_bias, heads * dim_k, index):
            return None
        if lower_bound is not None and not (type(lower_bound) is float and lower_bound < 0):
            return None
    elif A_log is not None or dt_bias is not None or lower_bound is not None:
        return None
    if erase_scale != 1 and not (erase_scale == 2 and use_gate_sigmoid):
        return None
    if scale is None:
        scale = dim_k**-0.5
    elif type(scale) is not float:
        return None

    num_sequences = batch
    if cu_seqlens is not None:
        if type(cu_seqlens) is not Tensor or not _are_indices(cu_seqlens, index) or batch != 1:
            return None
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            return None
        num_sequences = cu_seqlens.shape[0] - 1
    matrix = (dim_v, dim_k) if state_v_first else (dim_k, dim_v)
    if initial_state is not None:
        if initial_state.dim() != 4 or initial_state.get_device() != index:
            return None
        num_slots, state_heads, *state_matrix = initial_state.shape
        if state_heads != value_heads or state_matrix[0] != matrix[0] or state_matrix[1] != matrix[1]:
            return None
        if state_indices is None:
            if num_slots != num_sequences or initial_state.dtype is not torch.float32:
                return None
        elif num_slots == 0 or initial_state.dtype not in _STATE_ELEMENTS:
            return None
    elif state_indices is not None:
        return None
    if state_indices is None:
        if inplace_final_state or num_accepted_tokens is not None:
            return None
    else:
        if type(state_indices) is not Tensor or not _are_indices(state_indices, index):
            return None
        index_shape = state_indices.shape
        if len(index_shape) == 2:
            rows, columns = index_shape
            if rows != num_sequences or columns == 0 or (batch == rows and seqlen > columns):
                return None
        elif index_shape != (num_sequences,) or num_accepted_tokens is not None:
            return None
        if num_accepted_tokens is not None:
            if type(num_accepted_tokens) is not Tensor or not _are_indices(num_accepted_tokens, index):
                return None
            if num_accepted_tokens.shape != (num_sequences,):
                return None

    if out is None:
        o = torch.empty_like(v) if v.is_contiguous() else torch.empty_like(v, memory_format=_CONTIGUOUS)
    else:
        if out.dtype is not dtype or out.get_device() != index or out.shape != value_shape:
            return None
        o = out
    final_state = None
    if output_final_state and not inplace_final_state:
        if state_indices is None and initial_state is not None and initial_state.is_contiguous():
            final_state = torch.empty_like(initial_state)
        else:
            final_state = q.new_empty((num_sequences, value_heads, *matrix), dtype=torch.float32)
    launched = _launch_recurrent(
        q, k, v, g, b, w, o, A_log, dt_bias, initial_state, final_state, cu_seqlens, state_indices,
        num_accepted_tokens, scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale,
        state_v_first, inplace_final_state, index,
    )  # fmt: skip
    if not launched:
        return None
    _count_writes(out, initial_state if inplace_final_state else None)
    if inplace_final_state and output_final_state:
        final_state = initial_state
    return o, final_state


def _is_parameter(x: Tensor, length: int, index: int) -> bool:
    """A float32 vector as the kernels read it."""
    return x.dtype is torch.float32 and x.get_device() == index and x.shape == (length,) and x.is_contiguous()


def _are_indices(x: Tensor, index: int) -> bool:
    return x.dtype in _INDEX_DTYPES and x.get_device() == index
