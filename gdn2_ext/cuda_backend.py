"""The CUDA backend: which calls the Hopper kernels of csrc/ take, and how they are launched."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .torch_backend import CHUNK, GateOptions, Gradients, PackedTokens, num_chunk_slots

_C, _WHY_NO_EXTENSION = None, None
try:
    _C = importlib.import_module("gdn2_ext._C")
except ModuleNotFoundError:
    _WHY_NO_EXTENSION = "gdn2_ext was built without its kernels (GDN2_CUDA=OFF)"
except ImportError as error:
    _WHY_NO_EXTENSION = f"the kernels of gdn2_ext could not be loaded: {error}"

MAX_DIM_K = 128
MAX_DIM_V = 256
_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # ElementType of csrc/params.h
_DECAY_NONE, _DECAY_SOFTPLUS, _DECAY_LOWER_BOUND = 0, 1, 2  # DecayGate of csrc/params.h
_ALIGNMENT = 16  # bytes: what a bulk tensor copy asks of addresses and strides


# ------------------------------------------------------------------------------------------------------------
# Which calls the kernels take
# ------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> str:
    """As in "9.0"; while a graph is traced this is a constant of it."""
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


def _why_no_kernels(device: torch.device) -> str | None:
    if _C is None:
        return _WHY_NO_EXTENSION
    if device.type != "cuda":
        return f"the kernels need an NVIDIA Hopper GPU and the tensors are on {device.type}"
    capability = _capability(device.index)
    if capability != "9.0":
        return f"the kernels need compute capability 9.0 and this device has {capability}"
    return None


def why_not_chunk(q: Tensor, v: Tensor) -> str | None:
    """None when the kernels take checked tensors like these, else why not."""
    reason = _why_no_kernels(q.device)
    if reason is not None:
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, and q is {q.dtype}"
    if q.shape[3] > MAX_DIM_K:
        return f"the kernels take K up to {MAX_DIM_K}, and K is {q.shape[3]}"
    if v.shape[3] > MAX_DIM_V:
        return f"the kernels take V up to {MAX_DIM_V}, and V is {v.shape[3]}"
    return None


why_not_recurrent = why_not_chunk  # the same dtypes and sizes


# ------------------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------------------


def _token_tensor(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x or a copy of it that a bulk tensor copy can read, and its address and strides in elements.

    Contiguous channels and strides of whole 16 bytes are read as they are. Anything else is copied, channels
    padded to whole 16 bytes.
    """
    batch, seqlen, heads, channels = x.shape
    width = _ALIGNMENT // x.element_size()
    strides = x.stride()
    # The stride of a dimension of one element is never used, but has to be valid.
    usable = (strides[3] == 1 or channels == 1) and x.data_ptr() % _ALIGNMENT == 0
    for size, stride in zip((batch, seqlen, heads), strides):
        usable = usable and (size == 1 or (stride > 0 and stride % width == 0))
    if not usable:
        padded = (channels + width - 1) // width * width
        x = x.new_empty(batch, seqlen, heads, padded)[..., :channels].copy_(x)
        strides = x.stride()
    strides = [stride if size > 1 else width for size, stride in zip((batch, seqlen, heads), strides)]
    return x, (x.data_ptr(), *strides)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Sizes(NamedTuple):
    """The dimensions of a call, in the order of csrc/bindings.cpp."""

    batch: int
    seqlen: int
    num_sequences: int
    num_heads: int
    num_gate_heads: int
    num_value_heads: int
    dim_k: int
    dim_v: int
    num_slots: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> _Sizes:
        batch, seqlen, num_heads, dim_k = q.shape
        num_value_heads, dim_v = v.shape[2:]
        packed = cu_seqlens is not None
        num_sequences = cu_seqlens.shape[0] - 1 if packed else batch
        num_slots = num_chunk_slots(batch, seqlen, num_sequences, packed)
        heads = (num_heads, g.shape[2], num_value_heads)
        return cls(batch, seqlen, num_sequences, *heads, dim_k, dim_v, num_slots)

    @property
    def padded_k(self) -> int:
        return 64 if self.dim_k <= 64 else 128

    def state(self, state_v_first: bool) -> tuple[int, int, int]:
        """Of one sequence or chunk."""
        matrix = (self.dim_v, self.dim_k) if state_v_first else (self.dim_k, self.dim_v)
        return (self.num_value_heads, *matrix)


def _token_tensors(sizes: _Sizes, *tensors: Tensor) -> tuple[tuple, tuple]:
    """`_token_tensor` of each; without tokens nothing reads them."""
    if sizes.seqlen == 0:
        return (), ((0, 0, 0, 0),) * len(tensors)
    copies, addresses = zip(*map(_token_tensor, tensors))
    return copies, addresses


def _chunk_call(
    sizes: _Sizes,
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
    A_minus_I: Tensor,
    P: Tensor,
    scale: float,
    options: GateOptions,
    state_v_first: bool,
) -> tuple[object, list]:
    """A ChunkCall of csrc/api with room for what prepare makes, and what has to live until it is enqueued."""
    factors = q.new_empty(sizes.num_slots, sizes.num_gate_heads, 3, CHUNK * sizes.padded_k)
    gamma_last = q.new_empty((sizes.num_slots, sizes.num_gate_heads, sizes.padded_k), dtype=torch.float32)
    plan_slots = plan_spans = None
    if cu_seqlens is not None:
        plan_slots = q.new_empty((sizes.num_slots, 2), dtype=torch.int32)
        plan_spans = q.new_empty((sizes.num_sequences, 3), dtype=torch.int32)
    A_log, dt_bias, initial_state, cu_seqlens = (
        None if x is None else x.contiguous() for x in (A_log, dt_bias, initial_state, cu_seqlens)
    )
    copies, tokens = _token_tensors(sizes, q, k, v, g, b, w)
    decay_gate = _DECAY_NONE
    if options.use_gate:
        decay_gate = _DECAY_SOFTPLUS if options.lower_bound is None else _DECAY_LOWER_BOUND
    call = _C.ChunkCall(
        _ELEMENTS[q.dtype], _ELEMENTS[g.dtype], *sizes, *tokens,
        _pointer(A_log), _pointer(dt_bias), _pointer(initial_state),
        _pointer(cu_seqlens), cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        _pointer(plan_slots), _pointer(plan_spans),
        factors.data_ptr(), gamma_last.data_ptr(), A_minus_I.data_ptr(), P.data_ptr(),
        scale, options.use_qk_l2norm, decay_gate, options.lower_bound or 0.0,
        options.use_gate_sigmoid, options.erase_scale, state_v_first,
    )  # fmt: skip
    kept = [*copies, A_log, dt_bias, initial_state, cu_seqlens, plan_slots, plan_spans, factors, gamma_last]
    return call, kept


def chunk_forward(
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
    scale: float,
    options: GateOptions,
    *,
    state_v_first: bool,
    output_final_state: bool,
    num_state_chunks: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """o, final_state (or None), chunk states (or None); A - I and P as `chunk_backward` reads them: images of
    shared memory (ChunkTiles in csrc/params.h).
    """
    sizes = _Sizes.of(q, v, g, cu_seqlens)
    state = sizes.state(state_v_first)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = chunk_states = None
    if output_final_state:
        final_state = q.new_empty((sizes.num_sequences, *state), dtype=torch.float32)
    if num_state_chunks is not None:
        chunk_states = q.new_empty((sizes.num_slots, *state), dtype=torch.float32)
    # Without tokens nothing runs that would write them.
    new = q.new_empty if sizes.seqlen else q.new_zeros
    A_minus_I, P = (new(sizes.num_slots, sizes.num_gate_heads, CHUNK, CHUNK) for _ in range(2))

    call, kept = _chunk_call(
        sizes, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, A_minus_I, P, scale, options,
        state_v_first,
    )  # fmt: skip
    with torch.cuda.device(q.device):
        _C.chunk_forward(
            call, o.data_ptr(), _pointer(final_state), _pointer(chunk_states),
            torch.cuda.current_stream(q.device).cuda_stream,
        )  # fmt: skip
    del kept
    if chunk_states is not None:
        if cu_seqlens is not None:
            tokens = PackedTokens(cu_seqlens, sizes.seqlen)
            chunk_states = tokens.in_sequence_order(chunk_states, num_state_chunks)
        chunk_states = chunk_states.unflatten(0, (sizes.batch, num_state_chunks))
    return o, final_state, chunk_states, A_minus_I, P


def chunk_backward(
    do: Tensor,
    d_final_state: Tensor | None,
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
    A_minus_I: Tensor,
    P: Tensor,
    scale: float,
    options: GateOptions,
    *,
    state_v_first: bool,
    needed: Sequence[bool],
) -> Gradients:
    """The gradients that are needed, and None for the others; A - I and P come from `chunk_forward`."""
    sizes = _Sizes.of(q, v, g, cu_seqlens)
    # What the kernels leave to be summed, in float32: dA_log and d_dt_bias of every slot, and with gates per
    # value head dq and dk of every one of them.
    per_slot = (sizes.num_slots, sizes.num_gate_heads, sizes.dim_k)
    parts = {"dA_log": per_slot, "d_dt_bias": per_slot}
    if sizes.num_gate_heads != sizes.num_heads:
        per_gate_head = (sizes.batch, sizes.seqlen, sizes.num_gate_heads, sizes.dim_k)
        parts |= {"dq": per_gate_head, "dk": per_gate_head}
    new = q.new_empty if sizes.seqlen else q.new_zeros  # without tokens nothing writes the parts
    inputs = (q, k, v, g, b, w, A_log, dt_bias, initial_state)
    out: dict[str, Tensor | None] = dict.fromkeys(Gradients._fields)
    for name, x, asked in zip(Gradients._fields, inputs, needed):
        if asked and name in parts:
            out[name] = new(parts[name], dtype=torch.float32)
        elif asked:
            out[name] = torch.empty_like(x, memory_format=torch.contiguous_format)

    slices = (sizes.num_slots, sizes.num_value_heads, (sizes.dim_v + CHUNK - 1) // CHUNK)
    S, dS = (q.new_empty(*slices, CHUNK * sizes.padded_k) for _ in range(2))
    R, dX = (q.new_empty(*slices, CHUNK * CHUNK) for _ in range(2))
    row_norms = None
    if options.use_qk_l2norm:
        rows = (sizes.num_slots, sizes.num_gate_heads, 2, CHUNK)
        row_norms = q.new_empty(rows, dtype=torch.float32)
    d_final_state = None if d_final_state is None else d_final_state.contiguous()
    copy_of_do, [dO] = _token_tensors(sizes, do)

    call, kept = _chunk_call(
        sizes, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, A_minus_I, P, scale, options,
        state_v_first,
    )  # fmt: skip
    with torch.cuda.device(q.device):
        _C.chunk_backward(
            call, dO, _pointer(d_final_state), *map(_pointer, (S, dS, R, dX, row_norms)),
            *map(_pointer, out.values()), torch.cuda.current_stream(q.device).cuda_stream,
        )  # fmt: skip
    del kept, copy_of_do, S, dS, R, dX, row_norms

    groups = (sizes.num_heads, -1)
    for name, part in out.items():
        if part is None or name not in parts:
            continue
        if name == "dA_log":
            out[name] = part.unflatten(1, groups).sum((0, 2, 3))
        elif name == "d_dt_bias":
            out[name] = part.unflatten(1, groups).sum((0, 2)).flatten()
        else:
            out[name] = part.unflatten(2, groups).sum(3).to(q.dtype)
    return Gradients(**out)
