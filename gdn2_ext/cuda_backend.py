"""The CUDA backend: which calls the Hopper kernels of csrc/ take, and how they are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda_launch
from .cuda_launch import MAKE_TENSORS, READ_TENSORS, are_plain, nobody_traces
from .sequence_split import gpu, num_segments
from .torch_backend import CHUNK, GateOptions, Gradients, PackedTokens, num_chunk_slots

MAX_DIM_K = 128
MAX_DIM_V = 256
_TRIANGLE = 10 * 16 * 16  # of a chunk's A - I or P: blocks on and below the diagonal (csrc/tile/triangle.h)
_ALIGNMENT = 16  # bytes: what a bulk tensor copy asks of addresses and strides


# ------------------------------------------------------------------------------------------------------------
# Which calls the kernels take
# ------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> str:
    """As in "9.0"; while a graph is traced this is a constant of it."""
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


def _why_no_kernels(device: torch.device) -> str | None:
    if cuda_launch._C is None:
        return cuda_launch.WHY_NO_EXTENSION
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


def _readable(x: Tensor) -> Tensor:
    """Tokens [B, T, heads, channels], or a copy of them that a bulk tensor copy can read.

    Contiguous channels and strides of whole 16 bytes are read as they are. Anything else is copied, channels
    padded to whole 16 bytes.
    """
    batch, seqlen, heads, channels = x.shape
    width = _ALIGNMENT // x.element_size()
    strides = x.stride()
    usable = (strides[3] == 1 or channels == 1) and x.data_ptr() % _ALIGNMENT == 0
    for size, stride in zip((batch, seqlen, heads), strides):
        usable = usable and (size == 1 or (stride > 0 and stride % width == 0))
    if usable or seqlen == 0:
        return x
    padded = (channels + width - 1) // width * width
    return x.new_empty(batch, seqlen, heads, padded)[..., :channels].copy_(x)


def kept_size(
    q: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None, num_segments: int, keep_tiles: bool,
    use_qk_l2norm: bool,
) -> int:  # fmt: skip
    """How many floats a call keeps for its backward."""
    sizes = _Sizes.of(q, v, g, cu_seqlens)
    return sizes.kept_size(num_segments, sizes.keeps_tiles(num_segments, keep_tiles), use_qk_l2norm)


class _Sizes(NamedTuple):
    """The dimensions of a call that its memory depends on."""

    batch: int
    seqlen: int
    num_sequences: int
    num_heads: int
    num_gate_heads: int
    num_value_heads: int
    dim_k: int
    dim_v: int
    packed: bool

    @classmethod
    def of(cls, q: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> _Sizes:
        batch, seqlen, num_heads, dim_k = q.shape
        _, _, num_value_heads, dim_v = v.shape
        packed = cu_seqlens is not None
        num_sequences = cu_seqlens.shape[0] - 1 if packed else batch
        heads = (num_heads, g.shape[2], num_value_heads)
        return cls(batch, seqlen, num_sequences, *heads, dim_k, dim_v, packed)

    @property
    def num_slots(self) -> int:
        return num_chunk_slots(self.batch, self.seqlen, self.num_sequences, self.packed)

    def states(self, rows: int, state_v_first: bool) -> tuple[int, int, int, int]:
        """Of so many sequences or chunks."""
        matrix = (self.dim_v, self.dim_k) if state_v_first else (self.dim_k, self.dim_v)
        return (rows, self.num_value_heads, *matrix)

    def num_segments(self, requested: int, device: torch.device) -> int:
        """Of every sequence in the forward; requested: 0 for whatever is quickest."""
        if self.seqlen == 0:  # nothing to split
            return 1
        return num_segments(
            requested, self.seqlen, self.num_sequences, self.num_gate_heads, self.num_value_heads, self.dim_k,
            self.dim_v, self.packed, gpu(device.index),
        )  # fmt: skip

    def keeps_tiles(self, num_segments: int, asked: bool) -> bool:
        """Asked or not: `keeps_tiles` of csrc/api/sequence_split.h."""
        tiles = self.num_slots * self.num_gate_heads
        return asked or (num_segments > 1 and tiles <= cuda_launch._C.MOST_TILES_KEPT)

    def kept_size(self, num_segments: int, keep_tiles: bool, use_qk_l2norm: bool) -> int:
        """In floats, without gaps: `take_kept` of csrc/api/chunk_room.h."""
        tiles = self.num_slots * self.num_gate_heads
        padded_k = 64 if self.dim_k <= 64 else 128
        maps = self.num_sequences * max(num_segments - 2, 0) * self.num_gate_heads
        states = self.num_sequences * (num_segments - 1) * self.num_value_heads
        padded_v = (self.dim_v + 63) // 64 * 64
        floats = padded_k * (maps * padded_k + states * padded_v)
        if use_qk_l2norm:
            floats += tiles * 2 * CHUNK
        if keep_tiles:
            floats += tiles * (3 * CHUNK * padded_k // 2 + padded_k) + padded_k * states * padded_v
        return tiles * _TRIANGLE + floats  # a float for an element of each

    def is_all_written(self, num_segments: int) -> bool:
        """Whether the kernels write all that is kept.

        Not without tokens, nor that of segments without chunks, of which packed sequences may have some.
        """
        if self.packed:
            return self.seqlen > 0 and num_segments == 1
        chunks = -(-self.seqlen // CHUNK)
        chunks_of_segment = max(-(-chunks // num_segments), 1)
        return -(-chunks // chunks_of_segment) == num_segments

    def workspace(
        self,
        q: Tensor,
        keeps: bool,
        backward: bool,
        num_segments: int = 1,
        keeps_tiles: bool = False,
    ) -> Tensor:
        """Memory that the kernels of a call use among themselves."""
        num_bytes = cuda_launch._C.chunk_workspace_bytes(
            self.batch, self.seqlen, self.num_sequences, self.num_gate_heads, self.num_value_heads,
            self.dim_k, self.dim_v, self.packed, keeps, backward, num_segments, keeps_tiles,
        )  # fmt: skip
        return q.new_empty(num_bytes // q.element_size())


def _launch(function, tensors: Sequence[Tensor | None], options: Sequence) -> None:
    """On the device and the stream of the tensors, whatever kind of tensors they are."""
    device = tensors[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if not function(*map(cuda_launch.as_tuple, tensors), *options, stream):
            raise RuntimeError("gdn2_ext: the kernels take no tensors as large as these")


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


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
    keep: bool,
    sequence_split: int = 0,
    keep_tiles: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """o, final_state (or None), chunk states (or None), and with keep what `chunk_backward` reads (or None).

    Everything has been checked.
    """
    sizes = _Sizes.of(q, v, g, cu_seqlens)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = chunk_states = None
    if output_final_state:
        shape = sizes.states(sizes.num_sequences, state_v_first)
        final_state = q.new_empty(shape, dtype=torch.float32)
    if num_state_chunks is not None:
        chunk_states = q.new_empty(sizes.states(sizes.num_slots, state_v_first), dtype=torch.float32)
    segments = sizes.num_segments(sequence_split, q.device)
    keep_tiles = keep and sizes.keeps_tiles(segments, keep_tiles)
    kept = None
    if keep:
        new = q.new_empty if sizes.is_all_written(segments) else q.new_zeros
        kept = new(sizes.kept_size(segments, keep_tiles, options.use_qk_l2norm), dtype=torch.float32)
    tensors = [
        *map(_readable, (q, k, v, g, b, w)), *_contiguous(A_log, dt_bias, initial_state, cu_seqlens),
        o, final_state, chunk_states, kept,
        sizes.workspace(q, keep, False, segments, keep_tiles),
    ]  # fmt: skip
    _launch(cuda_launch._C.chunk_forward, tensors, (scale, *options, state_v_first, segments))
    if chunk_states is not None:
        if cu_seqlens is not None:
            tokens = PackedTokens(cu_seqlens, sizes.seqlen)
            chunk_states = tokens.in_sequence_order(chunk_states, num_state_chunks)
        chunk_states = chunk_states.unflatten(0, (sizes.batch, num_state_chunks))
    return o, final_state, chunk_states, kept


def _new_gradients(sizes: _Sizes, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list:
    """Where the kernels write the gradients that are needed, and None for the others.

    With gates per value head dq and dk are float32 and of every one of them, to be summed.
    """
    q = inputs[0]
    out: list[Tensor | None] = [None] * len(inputs)
    for n, (name, x, asked) in enumerate(zip(Gradients._fields, inputs, needed)):
        if not asked:
            continue
        if name in ("dq", "dk") and sizes.num_gate_heads != sizes.num_heads:
            shape = (sizes.batch, sizes.seqlen, sizes.num_gate_heads, sizes.dim_k)
            out[n] = q.new_empty(shape, dtype=torch.float32)
        else:
            out[n] = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out


def _summed(
    num_heads: int, num_gate_heads: int, out: Sequence[Tensor | None], dtype: torch.dtype
) -> Gradients:
    """The gradients from what the kernels wrote."""
    dq, dk, *others = out
    if num_gate_heads != num_heads:
        groups = (num_heads, -1)
        dq, dk = (x if x is None else x.unflatten(2, groups).sum(3).to(dtype) for x in (dq, dk))
    return Gradients(dq, dk, *others)


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
    kept: Tensor,
    scale: float,
    options: GateOptions,
    *,
    state_v_first: bool,
    needed: Sequence[bool],
    sequence_split: int = 0,
) -> Gradients:
    """The gradients that are needed, None for the others; kept comes from `chunk_forward`."""
    sizes = _Sizes.of(q, v, g, cu_seqlens)
    out = _new_gradients(sizes, (q, k, v, g, b, w, A_log, dt_bias, initial_state), needed)
    whole = kept.numel() == sizes.kept_size(1, False, options.use_qk_l2norm)
    segments = 1 if whole else sizes.num_segments(sequence_split, q.device)
    keeps_tiles = kept.numel() > sizes.kept_size(segments, False, options.use_qk_l2norm)
    tensors = [
        _readable(do), *_contiguous(d_final_state), *map(_readable, (q, k, v, g, b, w)),
        *_contiguous(A_log, dt_bias, initial_state, cu_seqlens), kept,
        sizes.workspace(q, True, True, segments, keeps_tiles), *out,
    ]  # fmt: skip
    _launch(cuda_launch._C.chunk_backward, tensors, (scale, *options, state_v_first, segments))
    return _summed(sizes.num_heads, sizes.num_gate_heads, out, q.dtype)


# ------------------------------------------------------------------------------------------------------------
# Without the dispatcher
# ------------------------------------------------------------------------------------------------------------


class _Chunk(torch.autograd.Function):
    """Forward and backward at once; the outputs are None where the extension does not take the call."""

    @staticmethod
    def forward(ctx, output_final_state: bool, keep_tiles: bool, options: tuple, *tensors):
        results = cuda_launch._C.chunk_forward_at_once(
            READ_TENSORS, MAKE_TENSORS, *tensors, *options, output_final_state, True, keep_tiles
        )
        if results is None:
            return None, None
        o, final_state, kept = results
        ctx.save_for_backward(*tensors, kept)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    def backward(ctx, do, d_final_state):
        *inputs, kept = ctx.saved_tensors
        needed = [asked and x is not None for x, asked in zip(inputs[:9], ctx.needs_input_grad[3:])]
        q, v, g = inputs[0], inputs[2], inputs[3]
        if do is None:
            do = v.new_zeros(v.shape)
        tensors = (do, d_final_state, *inputs, kept)
        gradients = None
        if not torch.is_grad_enabled() and nobody_traces():
            gradients = cuda_launch._C.chunk_backward_at_once(
                READ_TENSORS, MAKE_TENSORS, *tensors, *ctx.options, *needed
            )
        if gradients is not None:
            gradients = _summed(q.shape[2], g.shape[2], gradients, q.dtype)
        else:  # a layout to be copied, or a second derivative to be refused
            scale, *options, sequence_split = ctx.options
            scale = q.shape[3] ** -0.5 if scale is None else scale
            gradients = torch.ops.gdn2_ext.chunk_backward(
                *tensors, scale, *options, needed, sequence_split, "cuda"
            )
            gradients = [x if wanted else None for x, wanted in zip(gradients, needed)]
        return None, None, None, *gradients, None


def chunk_at_once(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float | None,
    use_qk_l2norm: bool, use_gate: bool, lower_bound: float | None, use_gate_sigmoid: bool,
    erase_scale: float, state_v_first: bool, sequence_split: int, output_final_state: bool, keep_tiles: bool,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """`chunk_gdn2` for plain tensors on the current device, which are checked where their shapes and types
    are read, in csrc/api/chunk_at_once.cpp.

    None, and nothing done, for any other call and for any that is wrong, which ops.py then looks at.
    sequence_split: 0 for whatever is quickest. keep_tiles: for a backward, which then need not make them;
    those of a split are kept anyway where they are few.
    """
    if not nobody_traces() or READ_TENSORS is None or cuda_launch._C is None:
        return None
    if torch.is_grad_enabled():
        tensors = (q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens)
        if not are_plain(tensors):
            if not all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors):
                return None
            options = (
                scale, use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first,
                sequence_split,
            )  # fmt: skip
            o, final_state = _Chunk.apply(output_final_state, keep_tiles, options, *tensors)
            return None if o is None else (o, final_state)
    return cuda_launch._C.chunk_forward_at_once(
        READ_TENSORS, MAKE_TENSORS, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, scale,
        use_qk_l2norm, use_gate, lower_bound, use_gate_sigmoid, erase_scale, state_v_first, sequence_split,
        output_final_state, False, False,
    )  # fmt: skip
