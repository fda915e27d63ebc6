"""Public functions: argument checks, choice of backend, and the call into the operators."""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, cuda_backend, cuda_launch, cuda_recurrent  # noqa: F401  (autograd registers the gradients)
from .autocast import in_autocast_dtype
from .sequence_split import MAX_SEGMENTS
from .torch_backend import CHUNK, GateOptions, compute_dtype

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BACKENDS = ("auto", "cuda", "torch")
_warned_reasons: set[str] = set()


class _Call(NamedTuple):
    """The arguments of a call after its checks, in the operators' order."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self[:9]


class _Options(NamedTuple):
    """Non-tensor arguments that every operator takes, in the operators' order."""

    scale: float
    use_qk_l2norm: bool
    use_gate: bool
    lower_bound: float | None
    use_gate_sigmoid: bool
    erase_scale: float
    state_v_first: bool


# ------------------------------------------------------------------------------------------------------------
# Checks: device, dtype, rank, shape, value, in this order
# ------------------------------------------------------------------------------------------------------------


def _check_is_tensor(name: str, x: object, *, optional: bool = False) -> None:
    if not isinstance(x, Tensor) and not (optional and x is None):
        expected = "a torch.Tensor or None" if optional else "a torch.Tensor"
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")


def _check_shape(name: str, x: Tensor, shape: tuple, meaning: str) -> None:
    if x.dim() != len(shape):
        raise ValueError(f"{name}: expected {len(shape)} dimensions {meaning}, got shape {tuple(x.shape)}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} {meaning}, got {tuple(x.shape)}")


def _dtype_names(dtypes) -> str:
    return " or ".join(str(d) for d in dict.fromkeys(dtypes))


def _check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {_dtype_names(allowed)}, got {x.dtype}")


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor) -> None:
    """The six tensors with one row per token and head."""
    tensors = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}
    for name, x in tensors.items():
        _check_is_tensor(name, x)
    for name, x in tensors.items():
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {x.device}")
    _check_dtype("q", q, *_FLOAT_DTYPES)
    for name in ("k", "v", "b", "w"):
        if tensors[name].dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} as q, got {tensors[name].dtype}")
    _check_dtype("g", g, compute_dtype(q.dtype), q.dtype)
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [B, T, heads, channels], got shape {tuple(x.shape)}"
            )
    batch, seqlen, heads, dim_k = q.shape
    value_heads, dim_v = v.shape[2:]
    if heads == 0 or dim_k == 0 or value_heads == 0 or dim_v == 0:
        raise ValueError(
            f"q, v: heads and channels must not be 0, got q {tuple(q.shape)} and v {tuple(v.shape)}"
        )
    _check_shape("k", k, (batch, seqlen, heads, dim_k), "[B, T, H, K] as q")
    if value_heads % heads != 0:
        raise ValueError(f"v: HV must be a multiple of the H = {heads} of q, got HV = {value_heads}")
    _check_shape("v", v, (batch, seqlen, value_heads, dim_v), "[B, T, HV, V] with B and T as q")
    _check_shape("w", w, (batch, seqlen, value_heads, dim_v), "[B, T, HV, V] as v")
    gate_heads = g.shape[2]
    if gate_heads not in (heads, value_heads):
        raise ValueError(f"g: expected H = {heads} or HV = {value_heads} heads, got {gate_heads}")
    _check_shape("g", g, (batch, seqlen, gate_heads, dim_k), "[B, T, H or HV, K] with B, T and K as q")
    _check_shape("b", b, (batch, seqlen, gate_heads, dim_k), "[B, T, heads of g, K] as g")


def _check_decay_gate(
    q: Tensor, use_gate: bool, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> None:
    heads, dim_k = q.shape[2:]
    for name, x, shape, meaning in (
        ("A_log", A_log, (heads,), "[H]"),
        ("dt_bias", dt_bias, (heads * dim_k,), "[H*K]"),
    ):
        _check_is_tensor(name, x, optional=True)
        if x is None:
            continue
        if not use_gate:
            raise ValueError(f"{name}: expected None without use_gate_in_kernel, got a tensor")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {x.device}")
        _check_dtype(name, x, torch.float32, compute_dtype(q.dtype))
        _check_shape(name, x, shape, meaning)
    if use_gate and lower_bound is None and A_log is None:
        raise ValueError(
            "A_log: expected a tensor [H] with use_gate_in_kernel, got None (optional with lower_bound)"
        )
    if lower_bound is not None and not isinstance(lower_bound, numbers.Real):
        raise TypeError(f"lower_bound: expected a number below 0 or None, got {type(lower_bound).__name__}")
    if lower_bound is not None and not lower_bound < 0:
        raise ValueError(f"lower_bound: expected a number below 0, got {lower_bound}")


def _check_state(
    name: str,
    state: Tensor | None,
    q: Tensor,
    v: Tensor,
    rows: int | None,
    state_v_first: bool,
    dtypes: tuple,
) -> None:
    """rows: how many states; None for a pool of any size but 0."""
    _check_is_tensor(name, state, optional=True)
    if state is None:
        return
    if state.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} as q, got {state.device}")
    _check_dtype(name, state, *dtypes)
    heads, dim_k, dim_v = v.shape[2], q.shape[3], v.shape[3]
    matrix, letters = ((dim_v, dim_k), "V, K") if state_v_first else ((dim_k, dim_v), "K, V")
    leading = "N" if rows is not None else "num_slots"
    if rows is None:
        rows = state.shape[0] if state.dim() else 0
        if rows == 0:
            raise ValueError(
                f"{name}: expected a pool [num_slots, HV, {letters}], got shape {tuple(state.shape)}"
            )
    _check_shape(name, state, (rows, heads, *matrix), f"[{leading}, HV, {letters}]")


def _check_host_offsets(name: str, offsets: Tensor, seqlen: int) -> None:
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {values[0]}")
    for n, (begin, end) in enumerate(zip(values, values[1:])):
        if end < begin:
            raise ValueError(f"{name}: expected ascending offsets, got {begin} then {end} at index {n + 1}")
    if values[-1] != seqlen:
        raise ValueError(f"{name}: expected to end at T = {seqlen}, got {values[-1]}")


def check_offsets(
    q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """cu_seqlens on the device of q, and on the host when it is known there."""
    _check_is_tensor("cu_seqlens", cu_seqlens, optional=True)
    _check_is_tensor("cu_seqlens_cpu", cu_seqlens_cpu, optional=True)
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise ValueError("cu_seqlens_cpu: expected None without cu_seqlens, got a tensor")
        return None, None
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if x is None:
            continue
        _check_dtype(name, x, torch.int32, torch.int64)
        if x.dim() != 1 or x.shape[0] < 2:
            raise ValueError(f"{name}: expected shape [N+1] with N >= 1, got {tuple(x.shape)}")
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected device {q.device} as q or cpu, got {cu_seqlens.device}")
    if q.shape[0] != 1:
        raise ValueError(
            f"q: expected B = 1 with cu_seqlens (sequences are packed along T), got B = {q.shape[0]}"
        )
    host, host_name = cu_seqlens_cpu, "cu_seqlens_cpu"
    if host is None and cu_seqlens.device.type == "cpu":
        host, host_name = cu_seqlens, "cu_seqlens"
    if host is not None:
        if host.device.type != "cpu":
            raise ValueError(f"cu_seqlens_cpu: expected device cpu, got {host.device}")
        if host.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_cpu: expected shape {tuple(cu_seqlens.shape)} as cu_seqlens, "
                f"got {tuple(host.shape)}"
            )
        if not torch.compiler.is_compiling():  # values are not known while tracing
            _check_host_offsets(host_name, host, q.shape[1])
            if cu_seqlens.device.type == "cpu" and cu_seqlens.tolist() != host.tolist():
                raise ValueError("cu_seqlens_cpu: expected the values of cu_seqlens, got others")
    return cu_seqlens.to(q.device, non_blocking=True), host


def _check_scalars(
    scale: float | None, q: Tensor, use_gate_sigmoid: bool, erase_scale: float, chunk_size: int = CHUNK,
    sequence_split: int | None = None,
) -> float:  # fmt: skip
    if chunk_size != CHUNK:
        raise ValueError(f"chunk_size: expected {CHUNK}, got {chunk_size}")
    if not _is_split(sequence_split):
        raise ValueError(
            f"sequence_split: expected None or a whole number from 1 to {MAX_SEGMENTS}, got {sequence_split}"
        )
    if erase_scale not in (1, 2):
        raise ValueError(f"erase_scale: expected 1 or 2, got {erase_scale}")
    if erase_scale != 1 and not use_gate_sigmoid:
        raise ValueError(f"erase_scale: expected 1 without use_gate_sigmoid_in_kernel, got {erase_scale}")
    if scale is not None and not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


def _check_no_tangents(function: str, tensors: Sequence[Tensor | None]) -> None:
    """They would be lost without a word."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{function} has no forward-mode derivative: use backward()")


def _is_split(sequence_split: object) -> bool:
    """Whether it is None, or a number of segments."""
    return sequence_split is None or (type(sequence_split) is int and 1 <= sequence_split <= MAX_SEGMENTS)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, b, w in the dtype of autocast where it is on; g, A_log, dt_bias and states stay."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors  # the checks will name it
    return tuple(map(in_autocast_dtype, tensors))


def _choose_backend(backend: str, device: torch.device, reason: str | None) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return backend
    if reason is None:
        return "cuda"
    if backend == "cuda":
        raise ValueError(f"backend: 'cuda' cannot take this call: {reason}")
    if device.type == "cuda" and not torch.compiler.is_compiling() and reason not in _warned_reasons:
        _warned_reasons.add(reason)
        warnings.warn(f"gdn2_ext falls back to its torch backend: {reason}", stacklevel=3)
    return "torch"


# ------------------------------------------------------------------------------------------------------------
# Public functions
# ------------------------------------------------------------------------------------------------------------


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = CHUNK,
    use_gate_sigmoid_in_kernel: bool = False,
    erase_scale: float = 1.0,
    sequence_split: int | None = None,
    backend: str = "auto",
):
    r"""Gated DeltaNet-2 linear attention over whole sequences, chunk by chunk, with gradients.

    Per head, with the state S [K, V] in float32:

        S_t = (I - k_t (b_t*k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t*v_t)^T        o_t = scale * S_t^T q_t

    Args:
        q, k: queries and keys [B, T, H, K]; bfloat16, float16, float32 or float64. Usually L2-normalised, by
            the caller or with `use_qk_l2norm_in_kernel`.
        v: values [B, T, HV, V], dtype as q. HV is a multiple of H; value head hv reads key
            head hv // (HV // H).
        g: log-decay (natural logarithm), g <= 0, -inf allowed, [B, T, H, K] or [B, T, HV, K]; float32
            recommended, or the dtype of q. With `use_gate_in_kernel` the raw projection.
        b: erase gate, shape as g, dtype as q, in [0, 1], or [0, 2] to allow negative eigenvalues.
        w: write gate [B, T, HV, V], dtype as q, in [0, 1].
        scale: factor of the outputs; K ** -0.5 by default.
        initial_state: [N, HV, K, V] float32 (float64 with float64 inputs), zero by default. N is B, or the
            number of packed sequences.
        output_final_state: whether to return the state after the last token, shape and dtype as
            `initial_state`.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum x^2 + 1e-6) first.
        use_gate_in_kernel: g is raw; the decay is -exp(A_log) * softplus(g + dt_bias), or, with
            `lower_bound` L < 0, L * sigmoid(exp(A_log) * (g + dt_bias)).
        cu_seqlens: offsets of packed sequences [N+1], int32 or int64, B = 1. Sequences of length 0 are
            allowed. On the device nothing is read back; malformed offsets give NaN from the first bad
            sequence on.
        cu_seqlens_cpu: the same offsets on the CPU; they are then checked, and malformed ones raise.
        safe_gate: accepted for compatibility; every decay is safe here.
        lower_bound: see `use_gate_in_kernel`; without it not used.
        disable_recompute: save more for the backward, in exchange for time. The CUDA backend keeps about
            6 bytes a token, gate head and channel of K more, which it does anyway in several segments where
            that is no more than 40 MB; gradients are the same to the bit.
        return_intermediate_states: also return the state at every chunk's start (inference only).
        state_v_first: states are [N, HV, V, K].
        A_log: [H] float32, with `use_gate_in_kernel`; optional with `lower_bound`.
        dt_bias: [H*K] float32, optional, with `use_gate_in_kernel`.
        chunk_size: 64; anything else is refused.
        use_gate_sigmoid_in_kernel: b and w are raw; b = erase_scale * sigmoid(b), w = sigmoid(w).
        erase_scale: 1 or 2, with `use_gate_sigmoid_in_kernel`.
        sequence_split: 1 never splits a sequence, n (up to 64) walks n segments of it side by side, exactly,
            None chooses by shape, but 1 in a compiled graph, which may serve many shapes. The torch backend
            needs none.
        backend: "cuda", "torch", or "auto": cuda where `supports` says yes, else torch.

    Returns:
        (o, final_state), or (o, final_state, h) with `return_intermediate_states`: o [B, T, HV, V] in the
        dtype of q; final_state or None; h [B, chunks, HV, K, V] (V, K with `state_v_first`). For packed
        sequences the chunks of one sequence follow those of the one before; where the offsets are known on
        the device only, h has room for T // 64 + N chunks and the rest is zero.

    Differentiable in q, k, v, g, b, w, A_log, dt_bias and initial_state, once, by backward() and
    torch.autograd.grad; not by torch.func. Two runs agree bit for bit.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; before anything runs.

    Source: Gated DeltaNet-2, arXiv 2605.22791.

    Example:
        >>> import torch
        >>> from gdn2_ext import chunk_gdn2
        >>> q, k, v = (torch.randn(1, 100, 2, 64) for _ in range(3))
        >>> g, b, w = -torch.rand(1, 100, 2, 64), torch.rand(1, 100, 2, 64), torch.rand(1, 100, 2, 64)
        >>> o, state = chunk_gdn2(q, k, v, g, b, w, output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 64]), torch.Size([1, 2, 64, 64]))
    """
    if torch.is_autocast_enabled():  # of GPUs: what goes at once is theirs
        q, k, v, b, w = _autocast(q, k, v, b, w)
    if (
        backend in ("auto", "cuda") and chunk_size == CHUNK
        and (sequence_split is None or _is_split(sequence_split))
        and not return_intermediate_states and cu_seqlens_cpu is None
    ):  # fmt: skip
        results = cuda_backend.chunk_at_once(
            q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel,
            use_gate_in_kernel, lower_bound, use_gate_sigmoid_in_kernel, erase_scale, state_v_first,
            sequence_split or 0, output_final_state, disable_recompute,
        )  # fmt: skip
        if results is not None:
            return results
    _check_flags(
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_gate_sigmoid_in_kernel=use_gate_sigmoid_in_kernel, output_final_state=output_final_state,
        state_v_first=state_v_first, disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
    )  # fmt: skip
    q, k, v, b, w = _autocast(q, k, v, b, w)
    _check_tokens(q, k, v, g, b, w)
    _check_decay_gate(q, use_gate_in_kernel, A_log, dt_bias, lower_bound)
    cu_seqlens, host_offsets = check_offsets(q, cu_seqlens, cu_seqlens_cpu)
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_state(
        "initial_state", initial_state, q, v, num_sequences, state_v_first, (compute_dtype(q.dtype),)
    )
    scale = _check_scalars(scale, q, use_gate_sigmoid_in_kernel, erase_scale, chunk_size, sequence_split)
    call = _Call(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens)
    options = _Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, lower_bound if use_gate_in_kernel else None,
        use_gate_sigmoid_in_kernel, float(erase_scale), state_v_first,
    )  # fmt: skip
    _check_no_tangents("chunk_gdn2", call.differentiable)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in call.differentiable
    )
    if return_intermediate_states and needs_grad:
        raise ValueError("return_intermediate_states: for inference only, but an input requires grad")
    num_state_chunks = _num_state_chunks(q, cu_seqlens, host_offsets) if return_intermediate_states else None
    backend = _choose_backend(backend, q.device, cuda_backend.why_not_chunk(q, v))

    # A compiled graph may serve many shapes: it chooses nothing by them.
    default = 1 if torch.compiler.is_compiling() else 0
    o, final_state, h, *_ = torch.ops.gdn2_ext.chunk_forward(
        *call, *options, output_final_state, num_state_chunks, needs_grad, disable_recompute,
        sequence_split or default, backend,
    )  # fmt: skip
    final_state = final_state if output_final_state else None
    return (o, final_state, h) if return_intermediate_states else (o, final_state)


_CHUNK_SIGNATURE = inspect.signature(chunk_gdn2)  # once: it takes 26 us


def _num_state_chunks(q: Tensor, cu_seqlens: Tensor | None, host_offsets: Tensor | None) -> int:
    seqlen = q.shape[1]
    if cu_seqlens is None:
        return (seqlen + CHUNK - 1) // CHUNK
    if host_offsets is None or torch.compiler.is_compiling():
        return seqlen // CHUNK + cu_seqlens.shape[0] - 1
    offsets = host_offsets.tolist()
    return sum((end - begin + CHUNK - 1) // CHUNK for begin, end in zip(offsets, offsets[1:]))


def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    inplace_final_state: bool = False,
    use_gate_sigmoid_in_kernel: bool = False,
    erase_scale: float = 1.0,
    out: Tensor | None = None,
    check_indices: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet-2 token by token, for decoding. Inference only: calling backward on a result raises, and
    `inplace_final_state` does at once where an input requires grad and torch.no_grad is off.

    The recurrence, the tensors and the options are those of `chunk_gdn2`. In addition:

    Args:
        initial_state: [N, HV, K, V] float32, or with `state_indices` a pool [num_slots, HV, K, V], float32 or
            bfloat16 ([.., V, K] with `state_v_first`). Arithmetic is float32.
        state_indices: slots of the pool, int32 or int64. [N]: the slot of every sequence. [N, T]: a slot for
            every position (speculative decoding); the state after token t goes to slot [n, t]. A sequence
            that would start from a negative or too large index reads and writes nothing; its output rows are
            zero, and so is its final state where one is returned. The state after a position with such an
            index goes nowhere, and its output row is zero.
        num_accepted_tokens: [N] int32 or int64, with indices [N, T]: sequence n starts from the state in slot
            [n, num_accepted_tokens[n] - 1]; by default from slot [n, 0]. Below 1 counts as 1, above T as T.
        inplace_final_state: write final states back into `initial_state`, which is what is returned as the
            final state where `output_final_state` asks for one. Needs `state_indices`. Slots that several
            sequences share are written in no stated order.
        out: [B, T, HV, V] to write the output to, dtype as q, any strides.
        check_indices: read indices and accepted tokens back and raise on one that is out of range. Only -1,
            for rows that are free, passes as an index.

    Returns:
        (o, final_state): o [B, T, HV, V] in the dtype of q; final_state [N, HV, K, V] with
        `output_final_state`, else None; with `inplace_final_state` it is the pool itself.

    The CUDA backend is one launch. It reads any strides of the tokens, and states whose matrices have
    contiguous rows or columns, wherever the slots lie; others are copied, and a pool copied back. It
    allocates the outputs alone, waits for nothing, and can be captured in a CUDA graph, between whose replays
    indices, accepted tokens and offsets may change. A sequence's results depend, to the bit, neither on the
    others of the call nor, with float32 states, on how many tokens a call has.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; before anything runs.

    Example:
        >>> import torch
        >>> from gdn2_ext import fused_recurrent_gdn2
        >>> pool = torch.zeros(8, 2, 64, 64)  # slots, heads, K, V
        >>> q, k, v = (torch.randn(3, 1, 2, 64) for _ in range(3))  # three requests, one token each
        >>> g, b, w = -torch.rand(3, 1, 2, 64), torch.rand(3, 1, 2, 64), torch.rand(3, 1, 2, 64)
        >>> o, _ = fused_recurrent_gdn2(q, k, v, g, b, w, initial_state=pool, inplace_final_state=True,
        ...                             state_indices=torch.tensor([5, -1, 0]))
        >>> o.shape, bool(o[1].any()), [slot for slot in range(8) if pool[slot].any()]
        (torch.Size([3, 1, 2, 64]), False, [0, 5])
    """
    if backend in ("auto", "cuda") and not check_indices and not torch.compiler.is_compiling():
        results = cuda_recurrent.recurrent_at_once(
            q, k, v, g, b, w, A_log, dt_bias, scale, initial_state, output_final_state,
            use_qk_l2norm_in_kernel, use_gate_in_kernel, lower_bound, state_v_first, cu_seqlens,
            state_indices, num_accepted_tokens, inplace_final_state, use_gate_sigmoid_in_kernel, erase_scale,
            out,
        )  # fmt: skip
        if results is not None:
            return results
    _check_flags(
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_gate_sigmoid_in_kernel=use_gate_sigmoid_in_kernel, output_final_state=output_final_state,
        state_v_first=state_v_first, inplace_final_state=inplace_final_state, check_indices=check_indices,
    )  # fmt: skip
    q, k, v, b, w = _autocast(q, k, v, b, w)
    _check_tokens(q, k, v, g, b, w)
    _check_decay_gate(q, use_gate_in_kernel, A_log, dt_bias, lower_bound)
    cu_seqlens, _ = check_offsets(q, cu_seqlens, None)
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_pool(q, v, initial_state, state_indices, num_accepted_tokens, inplace_final_state, num_sequences)
    pooled = state_indices is not None
    state_dtypes = (compute_dtype(q.dtype), torch.bfloat16) if pooled else (compute_dtype(q.dtype),)
    _check_state(
        "initial_state", initial_state, q, v, None if pooled else num_sequences, state_v_first, state_dtypes
    )
    if check_indices and pooled:
        _check_index_values(state_indices, num_accepted_tokens, initial_state.shape[0])
    _check_out(out, v)
    scale = _check_scalars(scale, q, use_gate_sigmoid_in_kernel, erase_scale)
    options = _Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, lower_bound if use_gate_in_kernel else None,
        use_gate_sigmoid_in_kernel, float(erase_scale), state_v_first,
    )  # fmt: skip
    backend = _choose_backend(backend, q.device, cuda_backend.why_not_recurrent(q, v))
    call = _Call(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens)
    _check_no_tangents("fused_recurrent_gdn2", call.differentiable)
    if inplace_final_state:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.differentiable):
            raise ValueError(
                "inplace_final_state: for inference only (torch.no_grad), but an input requires grad"
            )
        call = _Call(*(x if x is None else x.detach() for x in call))
    pool_arguments = (state_indices, num_accepted_tokens)
    launch_at_once = backend == "cuda" and not torch.compiler.is_compiling()
    if launch_at_once and cuda_launch.nobody_watches() and cuda_launch.are_plain((*call, out)):
        gates = GateOptions(*options[1:-1])
        o, final_state = cuda_recurrent.recurrent_forward(
            *call, *pool_arguments, scale, gates, state_v_first=state_v_first,
            inplace_final_state=inplace_final_state, output_final_state=output_final_state, out=out,
        )  # fmt: skip
    elif inplace_final_state:
        o = torch.ops.gdn2_ext.recurrent_forward_(*call, *pool_arguments, *options, backend)
    else:
        o, final_state = torch.ops.gdn2_ext.recurrent_forward(
            *call, *pool_arguments, *options, output_final_state, backend
        )
    if out is not None and o is not out:
        o = out.copy_(o)
    if inplace_final_state:
        final_state = initial_state
    return o, final_state if output_final_state else None


def _check_pool(
    q: Tensor, v: Tensor, pool: Tensor | None, state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    inplace_final_state: bool, num_sequences: int,
) -> None:  # fmt: skip
    _check_is_tensor("state_indices", state_indices, optional=True)
    _check_is_tensor("num_accepted_tokens", num_accepted_tokens, optional=True)
    if state_indices is None:
        if inplace_final_state:
            raise ValueError("inplace_final_state: expected state_indices with it, got None")
        if num_accepted_tokens is not None:
            raise ValueError("num_accepted_tokens: expected state_indices [N, T] with it, got None")
        return
    if pool is None:
        raise ValueError("initial_state: expected a pool with state_indices, got None")
    for name, x in (("state_indices", state_indices), ("num_accepted_tokens", num_accepted_tokens)):
        if x is None:
            continue
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {x.device}")
        _check_dtype(name, x, torch.int32, torch.int64)
    if state_indices.dim() == 2:
        columns = state_indices.shape[1]
        if state_indices.shape[0] != num_sequences or columns == 0:
            raise ValueError(
                f"state_indices: expected [N, T] with N = {num_sequences}, "
                f"got shape {tuple(state_indices.shape)}"
            )
        if q.shape[0] == num_sequences and q.shape[1] > columns:
            raise ValueError(
                f"state_indices: expected a column for each of the {q.shape[1]} positions, got {columns}"
            )
    else:
        _check_shape("state_indices", state_indices, (num_sequences,), "[N] or [N, T]")
        if num_accepted_tokens is not None:
            raise ValueError("num_accepted_tokens: expected state_indices [N, T] with it, got [N]")
    if num_accepted_tokens is not None:
        _check_shape("num_accepted_tokens", num_accepted_tokens, (num_sequences,), "[N]")


def _check_index_values(state_indices: Tensor, num_accepted_tokens: Tensor | None, num_slots: int) -> None:
    for place, slot in enumerate(state_indices.flatten().tolist()):
        if not -1 <= slot < num_slots:
            raise ValueError(
                f"state_indices: expected slots from 0 to {num_slots - 1}, or -1 for none, "
                f"got {slot} at flat index {place}"
            )
    if num_accepted_tokens is not None:
        columns = state_indices.shape[1]
        for n, count in enumerate(num_accepted_tokens.tolist()):
            if not 1 <= count <= columns:
                raise ValueError(
                    f"num_accepted_tokens: expected numbers from 1 to {columns}, got {count} at index {n}"
                )


def _check_out(out: Tensor | None, v: Tensor) -> None:
    _check_is_tensor("out", out, optional=True)
    if out is None:
        return
    if out.device != v.device:
        raise ValueError(f"out: expected device {v.device} as q, got {out.device}")
    _check_dtype("out", out, v.dtype)
    _check_shape("out", out, tuple(v.shape), "[B, T, HV, V]")


def supports(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, **options: object
) -> tuple[bool, str]:
    """Whether the CUDA backend would take `chunk_gdn2(q, k, v, g, b, w, **options)`, and if not, why.

    Returns:
        (True, "") or (False, reason). Nothing is launched but the casts of autocast, where that is on. Of
        options the names alone are looked at; q to w raise the errors of `chunk_gdn2` where it would refuse
        them.
    """
    _CHUNK_SIGNATURE.bind(q, k, v, g, b, w, **options)
    q, k, v, b, w = _autocast(q, k, v, b, w)
    _check_tokens(q, k, v, g, b, w)
    reason = cuda_backend.why_not_chunk(q, v)
    return reason is None, reason or ""
