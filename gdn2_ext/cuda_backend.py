"""The CUDA backend: which calls the Hopper kernels of csrc/ take, and how they are launched."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .torch_backend import CHUNK, GateOptions, PackedTokens, num_chunk_slots

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
    """o, final_state (or None), chunk states (or None), A - I and P (see `from_tile_image`)."""
    batch, seqlen, num_heads, dim_k = q.shape
    num_gate_heads = g.shape[2]
    num_value_heads, dim_v = v.shape[2:]
    packed = cu_seqlens is not None
    num_sequences = cu_seqlens.shape[0] - 1 if packed else batch
    num_slots = num_chunk_slots(batch, seqlen, num_sequences, packed)
    matrix = (dim_v, dim_k) if state_v_first else (dim_k, dim_v)

    o = torch.empty(batch, seqlen, num_value_heads, dim_v, dtype=v.dtype, device=v.device)
    final_state = chunk_states = None
    if output_final_state:
        final_state = q.new_empty((num_sequences, num_value_heads, *matrix), dtype=torch.float32)
    if num_state_chunks is not None:
        chunk_states = q.new_empty((num_slots, num_value_heads, *matrix), dtype=torch.float32)
    padded_k = 64 if dim_k <= 64 else 128
    factors = q.new_empty(num_slots, num_gate_heads, 3, CHUNK * padded_k)
    gamma_last = q.new_empty((num_slots, num_gate_heads, padded_k), dtype=torch.float32)
    # Without tokens nothing runs that would write them.
    new = q.new_empty if seqlen else q.new_zeros
    A_minus_I, P = (new(num_slots, num_gate_heads, CHUNK, CHUNK) for _ in range(2))
    plan_slots = plan_spans = None
    if packed:
        cu_seqlens = cu_seqlens.contiguous()
        plan_slots = q.new_empty((num_slots, 2), dtype=torch.int32)
        plan_spans = q.new_empty((num_sequences, 3), dtype=torch.int32)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if A_log is not None:
        A_log = A_log.contiguous()
    if dt_bias is not None:
        dt_bias = dt_bias.contiguous()

    # Copies that had to be made stay alive until the kernels are enqueued.
    kept, tensors = (
        zip(*(_token_tensor(x) for x in (q, k, v, g, b, w))) if seqlen else ((), [(0, 0, 0, 0)] * 6)
    )
    decay_gate = _DECAY_NONE
    if options.use_gate:
        decay_gate = _DECAY_SOFTPLUS if options.lower_bound is None else _DECAY_LOWER_BOUND
    with torch.cuda.device(q.device):
        _C.chunk_forward(
            _ELEMENTS[q.dtype], _ELEMENTS[g.dtype],
            batch, seqlen, num_sequences, num_heads, num_gate_heads, num_value_heads, dim_k, dim_v, num_slots,
            *tensors,
            _pointer(A_log), _pointer(dt_bias), _pointer(initial_state),
            _pointer(cu_seqlens), packed and cu_seqlens.dtype == torch.int64,
            _pointer(plan_slots), _pointer(plan_spans),
            factors.data_ptr(), gamma_last.data_ptr(), A_minus_I.data_ptr(), P.data_ptr(),
            o.data_ptr(), _pointer(final_state), _pointer(chunk_states),
            scale, options.use_qk_l2norm, decay_gate, options.lower_bound or 0.0,
            options.use_gate_sigmoid, options.erase_scale, state_v_first,
            torch.cuda.current_stream(q.device).cuda_stream,
        )  # fmt: skip
    del kept
    if chunk_states is not None:
        if packed:
            tokens = PackedTokens(cu_seqlens, seqlen)
            chunk_states = tokens.in_sequence_order(chunk_states, num_state_chunks)
        chunk_states = chunk_states.unflatten(0, (batch, num_state_chunks))
    return o, final_state, chunk_states, A_minus_I, P


def from_tile_image(x: Tensor) -> Tensor:
    """[..., 64, 64] from an image of shared memory: row r has its 16-byte pieces at piece ^ (r % 8)."""
    pieces = x.unflatten(-1, (8, 8))
    row = torch.arange(CHUNK, device=x.device).unsqueeze(1)
    order = (torch.arange(8, device=x.device) ^ (row % 8)).unsqueeze(-1)
    return pieces.gather(-2, order.expand_as(pieces)).flatten(-2)
