"""Gated Delta Rule-2 in float64: the definition, its chunk form, and the chunk form's analytic backward.

Source: Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention (arXiv 2605.22791). For one head,
with a state S of shape [K, V] and alpha_t = exp(g_t),

    S_t = (I - k_t (b_t*k_t)^T) Diag(alpha_t) S_{t-1} + k_t (w_t*v_t)^T        o_t = scale * S_t^T q_t

Everything here favours being evidently right over being quick. No autograd is involved, and no decay comes
from a difference of cumulative sums: between two tokens it is a product of alphas, so that g = -300 and
g = -inf are exact.

Arrays are NumPy or CuPy, and the results float64 arrays of CuPy if any argument is of CuPy, else of NumPy.
Importing this file needs NumPy alone.

    argument        shape                                     range
    q, k            [B, T, H, K]                              any; k is usually L2-normalised
    v, w            [B, T, HV, V], HV a multiple of H         w in [0, 1]
    g               [B, T, H, K], or per value head           log-decay (natural logarithm), at most 0;
                    [B, T, HV, K]                             -inf resets the channel
    b               as g                                      [0, 1], or [0, 2] with negative eigenvalues
    scale           number                                    K**-0.5 when None
    initial_state   [N, HV, K, V]                             zero when None
    cu_seqlens      N + 1 integers, rising from 0 to T        B = 1 then, and N sequences; N = B when None

Value head hv reads key head hv // (HV // H). The ranges are not enforced: the equations hold outside them.

Example:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 100, 2, 8)) for _ in range(3))
    >>> g, b, w = -rng.random((1, 100, 2, 8)), rng.random((1, 100, 2, 8)), rng.random((1, 100, 2, 8))
    >>> o, final_state, h = chunk_gdn2(q, k, v, g, b, w, use_qk_l2norm_in_kernel=True)
    >>> o.shape, final_state.shape, h.shape
    ((1, 100, 2, 8), (1, 2, 8, 8), (1, 2, 2, 8, 8))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "ActivationGradients",
    "Gradients",
    "activations",
    "activations_backward",
    "chunk_backward",
    "chunk_forward",
    "chunk_gdn2",
    "chunk_gdn2_backward",
    "recurrence",
]

Array = Any  # numpy.ndarray or cupy.ndarray

CHUNK_SIZE = 64
L2_NORM_EPS = 1e-6


class Gradients(NamedTuple):
    """Gradients of the op's inputs, each of its input's shape; None where an input was not given."""

    dq: Array
    dk: Array
    dv: Array
    dg: Array
    db: Array
    dw: Array
    dA_log: Array | None = None
    d_dt_bias: Array | None = None
    d_initial_state: Array | None = None


class _ActivationOptions(NamedTuple):
    """The options of `activations`, which describes them."""

    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    A_log: Array | None = None
    dt_bias: Array | None = None
    lower_bound: float | None = None
    use_gate_sigmoid_in_kernel: bool = False
    erase_scale: float = 1.0


class ActivationGradients(NamedTuple):
    """Gradients of what `activations` takes, each of its input's shape; None where an input was not given."""

    dq: Array
    dk: Array
    dg: Array
    db: Array
    dw: Array
    dA_log: Array | None
    d_dt_bias: Array | None


# ------------------------------------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------------------------------------


def _array_module(*arrays):
    """cupy if any of the arrays is a CuPy array, else numpy."""
    for x in arrays:
        if type(x).__module__.partition(".")[0] == "cupy":
            import cupy

            return cupy.get_array_module(x)
    return np


class _Inputs(NamedTuple):
    """The op's inputs in float64, every one of them per value head."""

    xp: Any
    q: Array  # [B, T, HV, K]
    k: Array  # [B, T, HV, K]
    v: Array  # [B, T, HV, V]
    g: Array  # [B, T, HV, K]
    b: Array  # [B, T, HV, K]
    w: Array  # [B, T, HV, V]
    scale: float
    initial_state: Array  # [N, HV, K, V]
    sequences: list[tuple[int, int, int]]  # (batch row, first token, end) of each of the N sequences
    key_heads: int  # H
    gate_heads: int  # H or HV


def _read_inputs(q, k, v, g, b, w, scale, initial_state, cu_seqlens, *gradients) -> _Inputs:
    """Check the shapes, convert to float64 and give every value head its own q, k, g and b."""
    xp = _array_module(q, k, v, g, b, w, initial_state, *gradients)
    q, k, v, g, b, w = (xp.asarray(x, dtype=xp.float64) for x in (q, k, v, g, b, w))
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q and v must have 4 dimensions, got shapes {q.shape} and {v.shape}")
    batch, seqlen, key_heads, dim_k = q.shape
    value_heads, dim_v = v.shape[2:]
    if value_heads % key_heads:
        raise ValueError(f"v must have a multiple of q's {key_heads} heads, got {value_heads}")
    gate_heads = g.shape[2] if g.ndim == 4 and g.shape[2] in (key_heads, value_heads) else key_heads
    expected_shapes = {
        "k": (k, (batch, seqlen, key_heads, dim_k)),
        "v": (v, (batch, seqlen, value_heads, dim_v)),
        "g": (g, (batch, seqlen, gate_heads, dim_k)),
        "b": (b, (batch, seqlen, gate_heads, dim_k)),
        "w": (w, (batch, seqlen, value_heads, dim_v)),
    }
    sequences = _sequences(batch, seqlen, cu_seqlens)
    if initial_state is None:
        initial_state = xp.zeros((len(sequences), value_heads, dim_k, dim_v))
    initial_state = xp.asarray(initial_state, dtype=xp.float64)
    expected_shapes["initial_state"] = (initial_state, (len(sequences), value_heads, dim_k, dim_v))
    for name, (x, shape) in expected_shapes.items():
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {x.shape}")

    def per_value_head(x):
        return xp.repeat(x, value_heads // x.shape[2], axis=2)

    return _Inputs(
        xp=xp,
        q=per_value_head(q),
        k=per_value_head(k),
        v=v,
        g=per_value_head(g),
        b=per_value_head(b),
        w=w,
        scale=_scale(scale, dim_k),
        initial_state=initial_state,
        sequences=sequences,
        key_heads=key_heads,
        gate_heads=gate_heads,
    )


def _scale(scale, dim_k: int) -> float:
    return dim_k**-0.5 if scale is None else float(scale)


def _sequences(batch: int, seqlen: int, cu_seqlens) -> list[tuple[int, int, int]]:
    """(batch row, first token, end) of every sequence, in the order of the states."""
    if cu_seqlens is None:
        return [(row, 0, seqlen) for row in range(batch)]
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1, got {batch}")
    offsets = [int(offset) for offset in cu_seqlens]
    if not offsets or offsets[0] != 0 or offsets[-1] != seqlen or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens must rise from 0 to {seqlen}, got {offsets}")
    return [(0, start, end) for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


class _ChunkSpan(NamedTuple):
    """Where a chunk's tokens lie, and the place of its state in h[row]."""

    row: int
    start: int
    end: int
    index: int


def _chunk_spans(sequences, chunk_size: int) -> list[list[_ChunkSpan]]:
    """The chunks of every sequence. They count from the sequence's start, and its last one may be short."""
    spans, next_index = [], {}
    for row, first, end in sequences:
        spans.append([])
        for start in range(first, end, chunk_size):
            index = next_index.get(row, 0)
            next_index[row] = index + 1
            spans[-1].append(_ChunkSpan(row, start, min(start + chunk_size, end), index))
    return spans


def _heads_first(x, span: _ChunkSpan):
    """A chunk's tokens of [B, T, HV, width] as [HV, C, width]."""
    return x[span.row, span.start : span.end].swapaxes(0, 1)


def _sum_groups(x, heads: int):
    """[B, T, HV, width] summed over each group of value heads: [B, T, heads, width]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3]).sum(axis=3)


# ------------------------------------------------------------------------------------------------------------
# The recurrence
# ------------------------------------------------------------------------------------------------------------


def recurrence(q, k, v, g, b, w, *, scale=None, initial_state=None, cu_seqlens=None):
    """Gated Delta Rule-2 token by token, which is its definition.

    Shapes and ranges are those of the module's table.

    Returns:
        o [B, T, HV, V] and final_state [N, HV, K, V], the state after each sequence's last token. A sequence
        of length 0 returns its initial state.
    """
    x = _read_inputs(q, k, v, g, b, w, scale, initial_state, cu_seqlens)
    o = x.xp.zeros(x.v.shape)
    final_state = x.initial_state.copy()
    if cu_seqlens is None:
        runs = [(slice(None), slice(None), 0, x.q.shape[1])]  # all batch rows at once
    else:
        runs = [(slice(0, 1), slice(n, n + 1), start, end) for n, (_, start, end) in enumerate(x.sequences)]
    for rows, states, start, end in runs:
        S = final_state[states]  # [rows, HV, K, V], a copy's view: updated in place below
        for t in range(start, end):
            q_t, k_t, g_t, b_t = (y[rows, t, :, :, None] for y in (x.q, x.k, x.g, x.b))  # [rows, HV, K, 1]
            v_t, w_t = (y[rows, t, :, None, :] for y in (x.v, x.w))  # [rows, HV, 1, V]
            S *= x.xp.exp(g_t)
            erased = (b_t * k_t * S).sum(axis=2, keepdims=True)  # S^T (b*k): [rows, HV, 1, V]
            S += k_t * (w_t * v_t - erased)
            o[rows, t] = x.scale * (q_t * S).sum(axis=2)
    return o, final_state


# ------------------------------------------------------------------------------------------------------------
# The chunk form
# ------------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """What a chunk of C tokens is before a state reaches it. alpha = exp(g); products run over tokens."""

    q: Array  # [HV, C, K]
    k: Array  # [HV, C, K]
    decay: Array  # [HV, C, C, K]   decay[r, s] = alpha[s+1] ... alpha[r] for s <= r, else 0
    gamma: Array  # [HV, C, K]      alpha[0] ... alpha[r]
    tail: Array  # [HV, C, K]       alpha[s+1] ... alpha[C-1]
    E: Array  # [HV, C, K]          b*k, the erase direction
    Z: Array  # [HV, C, V]          w*v, the gated value
    T: Array  # [HV, C, C]          strictly lower: T[r, s] = sum_i E[r, i] k[s, i] decay[r, s, i]
    P: Array  # [HV, C, C]          lower: P[r, s] = scale * sum_i q[r, i] k[s, i] decay[r, s, i]


def _read_chunk(x: _Inputs, span: _ChunkSpan) -> _Chunk:
    xp = x.xp
    q, k, v, g, b, w = (_heads_first(y, span) for y in (x.q, x.k, x.v, x.g, x.b, x.w))
    E, Z, alpha = b * k, w * v, xp.exp(g)
    heads, C, dim_k = k.shape
    decay = xp.zeros((heads, C, C, dim_k))
    for r in range(C):
        if r > 0:
            decay[:, r, :r] = alpha[:, r, None] * decay[:, r - 1, :r]
        decay[:, r, r] = 1.0
    T = xp.einsum("hrk,hrsk,hsk->hrs", E, decay, k)
    return _Chunk(
        q=q,
        k=k,
        decay=decay,
        gamma=decay[:, :, 0] * alpha[:, :1],
        tail=decay[:, -1],
        E=E,
        Z=Z,
        T=xp.where(xp.tri(C, k=-1, dtype=bool), T, 0.0),
        P=x.scale * xp.einsum("hrk,hrsk,hsk->hrs", q, decay, k),
    )


def _solve(T, X):
    """R with (I+T) R = X, by forward substitution. T is strictly lower triangular."""
    R = X.copy()
    for r in range(1, T.shape[1]):
        R[:, r] -= (T[:, r, None, :r] @ R[:, :r])[:, 0]
    return R


def _solve_transposed(T, dR):
    """dX with (I+T)^T dX = dR, by back substitution. T is strictly lower triangular."""
    dX = dR.copy()
    for s in reversed(range(T.shape[1] - 1)):
        dX[:, s] -= (T[:, None, s + 1 :, s] @ dX[:, s + 1 :])[:, 0]
    return dX


def _transposed(x):
    return x.swapaxes(-1, -2)


def _residual(c: _Chunk, S):
    """R, the rows actually written: X = Z - (gamma*E) S and R = A X with A = (I+T)^-1. S is [HV, K, V]."""
    return _solve(c.T, c.Z - (c.gamma * c.E) @ S)


def chunk_forward(
    q, k, v, g, b, w, *, scale=None, initial_state=None, cu_seqlens=None, chunk_size=CHUNK_SIZE
):
    """Gated Delta Rule-2 in chunks. With S the state at a chunk's start:

        X = Z - (gamma*E) S
        R = A X
        O = scale (gamma*q) S + P R
        S' = Diag(gamma[C-1]) S + (tail*k)^T R

    Shapes and ranges are those of the module's table. A short last chunk is computed at its own length.

    Returns:
        o [B, T, HV, V], final_state [N, HV, K, V], and h, the state at every chunk's start:
        [B, chunks, HV, K, V], or with cu_seqlens [1, all chunks, HV, K, V] in the order of the sequences.
    """
    x = _read_inputs(q, k, v, g, b, w, scale, initial_state, cu_seqlens)
    spans = _chunk_spans(x.sequences, chunk_size)
    num_chunks = sum(len(s) for s in spans) if cu_seqlens is not None else max(map(len, spans), default=0)
    o = x.xp.zeros(x.v.shape)
    h = x.xp.zeros((x.q.shape[0], num_chunks, *x.initial_state.shape[1:]))
    final_state = x.initial_state.copy()
    for n, sequence in enumerate(spans):
        S = x.initial_state[n]  # [HV, K, V]
        for span in sequence:
            h[span.row, span.index] = S
            c = _read_chunk(x, span)
            R = _residual(c, S)
            O = x.scale * (c.gamma * c.q) @ S + c.P @ R
            o[span.row, span.start : span.end] = O.swapaxes(0, 1)
            S = c.gamma[:, -1, :, None] * S + _transposed(c.tail * c.k) @ R
        final_state[n] = S
    return o, final_state, h


def chunk_backward(
    q,
    k,
    v,
    g,
    b,
    w,
    do,
    *,
    scale=None,
    initial_state=None,
    d_final_state=None,
    cu_seqlens=None,
    chunk_size=CHUNK_SIZE,
) -> Gradients:
    """Gradients of sum(do * o) + sum(d_final_state * final_state): analytic, walking the chunks backwards.

    Given dO and dS', the gradient of the state after the chunk:

        dR = P^T dO + (tail*k) dS'        dX = A^T dR        dP = tril(dO R^T)        dT = -tril(dX R^T, -1)
        dS = Diag(gamma[C-1]) dS' + scale (gamma*q)^T dO - (gamma*E)^T dX

    and from these the gradients of q, k, v, g, b and w, token by token. Shapes and ranges are those of the
    module's table.

    Args:
        do: [B, T, HV, V], the gradient of o.
        d_final_state: [N, HV, K, V], the gradient of final_state; zero when None.

    Returns:
        Gradients of q, k, v, g, b, w and of the initial state (also when it was None, and therefore zero).
        Where heads share an input, its gradient is the sum over them.
    """
    x = _read_inputs(q, k, v, g, b, w, scale, initial_state, cu_seqlens, do, d_final_state)
    xp = x.xp
    do = xp.asarray(do, dtype=xp.float64)
    if do.shape != x.v.shape:
        raise ValueError(f"do must have the shape of v, {x.v.shape}, got {do.shape}")
    if d_final_state is None:
        d_state = xp.zeros(x.initial_state.shape)
    else:
        d_state = xp.array(d_final_state, dtype=xp.float64)
    if d_state.shape != x.initial_state.shape:
        raise ValueError(f"d_final_state must have shape {x.initial_state.shape}, got {d_state.shape}")

    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "chunk_size": chunk_size}
    _, _, h = chunk_forward(q, k, v, g, b, w, scale=scale, **options)
    dq, dk, dg, db = (xp.zeros(x.q.shape) for _ in range(4))
    dv, dw = (xp.zeros(x.v.shape) for _ in range(2))
    for n, sequence in enumerate(_chunk_spans(x.sequences, chunk_size)):
        for span in reversed(sequence):
            c = _read_chunk(x, span)
            S, dO, dS_next = h[span.row, span.index], _heads_first(do, span), d_state[n]
            dE, dZ, dq_chunk, dk_chunk, dg_chunk, d_state[n] = _chunk_backward(xp, c, x.scale, S, dO, dS_next)
            b_chunk, v_chunk, w_chunk = (_heads_first(y, span) for y in (x.b, x.v, x.w))
            for total, chunk in (
                (dq, dq_chunk),
                (dk, dk_chunk + b_chunk * dE),
                (dg, dg_chunk),
                (db, c.k * dE),
                (dv, w_chunk * dZ),
                (dw, v_chunk * dZ),
            ):
                total[span.row, span.start : span.end] = chunk.swapaxes(0, 1)
    return Gradients(
        dq=_sum_groups(dq, x.key_heads),
        dk=_sum_groups(dk, x.key_heads),
        dv=dv,
        dg=_sum_groups(dg, x.gate_heads),
        db=_sum_groups(db, x.gate_heads),
        dw=dw,
        d_initial_state=d_state,
    )


def _chunk_backward(xp, c: _Chunk, scale, S, dO, dS_next):
    """One chunk: from dO [HV, C, V] and dS_next, the gradient of the state after the chunk [HV, K, V], to the
    gradients of E, Z, q, k (other than through E), g and S."""
    # The residual rows, and the gradients that reach them. dZ = dX, because X = Z - (gamma*E) S.
    R = _residual(c, S)
    dR = _transposed(c.P) @ dO + (c.tail * c.k) @ dS_next
    dX = _solve_transposed(c.T, dR)
    dS = (
        c.gamma[:, -1, :, None] * dS_next
        + scale * _transposed(c.gamma * c.q) @ dO
        - _transposed(c.gamma * c.E) @ dX
    )

    # The pairs of tokens. (I+T) R = X gives dT = -dX R^T without the gradient of A.
    C = c.k.shape[1]
    dP = scale * xp.where(xp.tri(C, dtype=bool), dO @ _transposed(R), 0.0)  # of P / scale
    dT = -xp.where(xp.tri(C, k=-1, dtype=bool), dX @ _transposed(R), 0.0)

    # What each token reads from S, and what it adds to the state after the chunk.
    dq_state = scale * c.gamma * (dO @ _transposed(S))
    dE_state = -c.gamma * (dX @ _transposed(S))
    dk_state = c.tail * (R @ _transposed(dS_next))

    dq = xp.einsum("hrs,hrsk,hsk->hrk", dP, c.decay, c.k) + dq_state
    dE = xp.einsum("hrs,hrsk,hsk->hrk", dT, c.decay, c.k) + dE_state
    dk = (
        xp.einsum("hrs,hrsk,hrk->hsk", dP, c.decay, c.q)
        + xp.einsum("hrs,hrsk,hrk->hsk", dT, c.decay, c.E)
        + dk_state
    )
    carried = c.gamma[:, -1] * (S * dS_next).sum(axis=-1)  # [HV, K], through Diag(gamma[C-1]) S
    dg = _decay_gradient(xp, c, dP, dT, c.q * dq_state + c.E * dE_state, c.k * dk_state, carried)
    return dE, dX, dq, dk, dg, dS


def _decay_gradient(xp, c: _Chunk, dP, dT, reads, writes, carried):
    """dg [HV, C, K]: each term with a factor alpha[i] adds its value times its gradient to dg[i]. They are

        pairs (r, s) with s < i <= r,        reads of S by tokens r >= i (decayed by gamma[r]),
        the state carried through,           writes to S' by tokens s < i (decayed by tail[s]).

    The same gradient can be had as a reverse cumulative sum in which the pairs with both tokens after i
    cancel. Here they are left out instead, so that dg keeps its relative accuracy however small alpha is.
    """
    dg = carried[:, None] + xp.cumsum(reads[:, ::-1], axis=1)[:, ::-1]
    dg[:, 1:] += xp.cumsum(writes, axis=1)[:, :-1]
    pairs = xp.zeros(c.k.shape)  # [HV, s, K]: the sum over r >= i
    for i in range(c.k.shape[1] - 1, 0, -1):
        row = dP[:, i, :i, None] * c.q[:, i, None] + dT[:, i, :i, None] * c.E[:, i, None]
        pairs[:, :i] += row * c.k[:, :i] * c.decay[:, i, :i]
        dg[:, i] += pairs[:, :i].sum(axis=1)
    return dg


# ------------------------------------------------------------------------------------------------------------
# Around the core
# ------------------------------------------------------------------------------------------------------------


def _softplus(xp, x):
    return xp.logaddexp(0.0, x)


def _sigmoid(xp, x):
    return xp.exp(-_softplus(xp, -x))


def _l2_norm(xp, x):
    return xp.sqrt((x * x).sum(axis=-1, keepdims=True) + L2_NORM_EPS)


def _l2_normalise_backward(xp, x, dy):
    """dx of y = x / n, n = sqrt(sum x^2 + eps): (dy - y (y.dy)) / n, finite where x is zero."""
    n = _l2_norm(xp, x)
    y = x / n
    return (dy - y * (y * dy).sum(axis=-1, keepdims=True)) / n


def _gate_terms(xp, g, A_log, dt_bias, num_heads: int, lower_bound):
    """a = exp(A_log) [heads of g, 1] and u = g + dt_bias; a gate head has the parameters of its key head."""
    gate_heads, dim_k = g.shape[2:]
    groups = gate_heads // num_heads
    if A_log is None and lower_bound is None:
        raise ValueError("use_gate_in_kernel needs A_log, unless lower_bound is given")
    a, u = xp.ones((gate_heads, 1)), g
    if A_log is not None:
        A_log = xp.asarray(A_log, dtype=xp.float64)
        if A_log.shape != (num_heads,):
            raise ValueError(f"A_log must have shape {(num_heads,)}, got {A_log.shape}")
        a = xp.repeat(xp.exp(A_log), groups)[:, None]
    if dt_bias is not None:
        dt_bias = xp.asarray(dt_bias, dtype=xp.float64)
        if dt_bias.shape != (num_heads * dim_k,):
            raise ValueError(f"dt_bias must have shape {(num_heads * dim_k,)}, got {dt_bias.shape}")
        u = g + xp.repeat(dt_bias.reshape(num_heads, dim_k), groups, axis=0)
    return a, u


def activations(
    q,
    k,
    g,
    b,
    w,
    *,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    lower_bound=None,
    use_gate_sigmoid_in_kernel=False,
    erase_scale=1.0,
):
    """What the op applies to raw projections before the recurrence, in float64.

    Args:
        q, k, g, b, w: raw, with the shapes of the module's table.
        use_qk_l2norm_in_kernel: q and k become x / sqrt(sum x^2 + 1e-6) over their channels.
        use_gate_in_kernel: with u = g + dt_bias and a = exp(A_log), g becomes -a softplus(u), or, with a
            lower_bound < 0, lower_bound * sigmoid(a u). Without it those three are ignored.
        A_log: [H]; may be None (a = 1) with lower_bound. Gates per value head use their key head's entry.
        dt_bias: [H*K]; zero when None. Gates per value head use their key head's entries.
        use_gate_sigmoid_in_kernel: b becomes erase_scale * sigmoid(b) and w becomes sigmoid(w).
        erase_scale: 1, or 2 to allow negative eigenvalues. Ignored without the sigmoids.

    Returns:
        q, k, g, b, w as the recurrence takes them.
    """
    xp = _array_module(q, k, g, b, w, A_log, dt_bias)
    q, k, g, b, w = (xp.asarray(x, dtype=xp.float64) for x in (q, k, g, b, w))
    num_heads = q.shape[2]
    if use_qk_l2norm_in_kernel:
        q, k = q / _l2_norm(xp, q), k / _l2_norm(xp, k)
    if use_gate_in_kernel:
        a, u = _gate_terms(xp, g, A_log, dt_bias, num_heads, lower_bound)
        g = -a * _softplus(xp, u) if lower_bound is None else lower_bound * _sigmoid(xp, a * u)
    if use_gate_sigmoid_in_kernel:
        b, w = erase_scale * _sigmoid(xp, b), _sigmoid(xp, w)
    return q, k, g, b, w


def activations_backward(q, k, g, b, w, dq, dk, dg, db, dw, **options) -> ActivationGradients:
    """Gradients of the raw inputs of `activations`.

    Args:
        q, k, g, b, w: the raw inputs.
        dq, dk, dg, db, dw: gradients of the activated ones, of the same shapes.
        options: those of `activations`.

    Returns:
        Gradients of q, k, g, b, w, A_log and dt_bias; the last two are None where they were not used.
    """
    opt = _ActivationOptions(**options)
    xp = _array_module(q, k, g, b, w, dq, dk, dg, db, dw, opt.A_log, opt.dt_bias)
    q, k, g, b, w = (xp.asarray(x, dtype=xp.float64) for x in (q, k, g, b, w))
    dq, dk, dg, db, dw = (xp.asarray(x, dtype=xp.float64) for x in (dq, dk, dg, db, dw))
    num_heads = q.shape[2]
    dA_log = d_dt_bias = None
    if opt.use_qk_l2norm_in_kernel:
        dq, dk = _l2_normalise_backward(xp, q, dq), _l2_normalise_backward(xp, k, dk)
    if opt.use_gate_in_kernel:
        a, u = _gate_terms(xp, g, opt.A_log, opt.dt_bias, num_heads, opt.lower_bound)
        if opt.lower_bound is None:
            d_log_a = dg * -a * _softplus(xp, u)
            dg = -a * _sigmoid(xp, u) * dg
        else:
            d_argument = opt.lower_bound * dg * _sigmoid(xp, a * u) * _sigmoid(xp, -a * u)  # of a u
            d_log_a = d_argument * a * u
            dg = d_argument * a
        if opt.A_log is not None:
            dA_log = d_log_a.sum(axis=(0, 1, 3)).reshape(num_heads, -1).sum(axis=1)
        if opt.dt_bias is not None:
            d_dt_bias = dg.sum(axis=(0, 1)).reshape(num_heads, -1, g.shape[3]).sum(axis=1).reshape(-1)
    if opt.use_gate_sigmoid_in_kernel:
        db = opt.erase_scale * _sigmoid(xp, b) * _sigmoid(xp, -b) * db
        dw = _sigmoid(xp, w) * _sigmoid(xp, -w) * dw
    return ActivationGradients(dq, dk, dg, db, dw, dA_log, d_dt_bias)


# ------------------------------------------------------------------------------------------------------------
# The whole op
# ------------------------------------------------------------------------------------------------------------


def chunk_gdn2(
    q,
    k,
    v,
    g,
    b,
    w,
    scale=None,
    initial_state=None,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    cu_seqlens=None,
    lower_bound=None,
    state_v_first=False,
    *,
    A_log=None,
    dt_bias=None,
    use_gate_sigmoid_in_kernel=False,
    erase_scale=1.0,
):
    """The op with every option: `activations`, then `chunk_forward` in chunks of 64.

    Args:
        state_v_first: initial_state, final_state and h have their last two dimensions as [V, K].
        The others are those of `activations` and `chunk_forward`.

    Returns:
        o [B, T, HV, V], final_state [N, HV, K, V] and h, the state at every chunk's start.
    """
    q, k, g, b, w = activations(
        q,
        k,
        g,
        b,
        w,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        use_gate_sigmoid_in_kernel=use_gate_sigmoid_in_kernel,
        erase_scale=erase_scale,
    )
    if state_v_first and initial_state is not None:
        initial_state = _transposed(initial_state)
    o, final_state, h = chunk_forward(
        q, k, v, g, b, w, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    if state_v_first:
        final_state, h = _transposed(final_state), _transposed(h)
    return o, final_state, h


def chunk_gdn2_backward(
    q,
    k,
    v,
    g,
    b,
    w,
    do,
    d_final_state=None,
    *,
    scale=None,
    initial_state=None,
    cu_seqlens=None,
    state_v_first=False,
    **activation_options,
) -> Gradients:
    """Gradients of sum(do * o) + sum(d_final_state * final_state) for the o and final_state of `chunk_gdn2`.

    Args:
        do: [B, T, HV, V].
        d_final_state: of final_state's shape, also with state_v_first; zero when None.
        The others are those of `chunk_gdn2`.

    Returns:
        Gradients of the raw inputs, of A_log and dt_bias where they were used, and of initial_state where it
        was given.
    """
    if state_v_first:
        initial_state = None if initial_state is None else _transposed(initial_state)
        d_final_state = None if d_final_state is None else _transposed(d_final_state)
    q_active, k_active, g_active, b_active, w_active = activations(q, k, g, b, w, **activation_options)
    inputs = (q_active, k_active, v, g_active, b_active, w_active)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    core = chunk_backward(*inputs, do, d_final_state=d_final_state, **options)
    raw = activations_backward(
        q, k, g, b, w, core.dq, core.dk, core.dg, core.db, core.dw, **activation_options
    )
    d_initial_state = None
    if initial_state is not None:
        d_initial_state = _transposed(core.d_initial_state) if state_v_first else core.d_initial_state
    return Gradients(**raw._asdict(), dv=core.dv, d_initial_state=d_initial_state)
