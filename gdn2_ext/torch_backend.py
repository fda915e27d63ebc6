"""The portable backend: PyTorch operations on any device, in any float dtype, for any K and V.

The chunk form of the recurrence with its analytic backward. Nothing loops over tokens (but `recurrent`, which
is the token form); one loop runs over chunks, because the state does. Everything else is batched over chunks
and heads.

Symbols are those of the paper (arXiv 2605.22791) and of docs/numerics.md: with S the state at a chunk's
start,

    X = Z - (gamma*E) S      R = A X      O = scale (gamma*q) S + P R      S' = Diag(gamma[C-1]) S + Kt^T R

where E = b*k, Z = w*v, A = (I+T)^-1, and T, P hold the decayed products of E and q with k inside the chunk.

Chunked tensors are [steps, lanes, C, width]: `steps` is what the state walks along, `lanes` is what runs
side by side. A dense call has a step for every chunk and a lane for every batch element and head. A packed
one has a step for every chunk slot of the packed tokens and a lane for every head; the state of the slot's
sequence is fetched and put back at every step. Value heads that share a key head are side by side in the
width: everything here is linear in the columns of v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
L2_NORM_EPS = 1e-6


class GateOptions(NamedTuple):
    """What the op applies to raw projections before the recurrence."""

    use_qk_l2norm: bool
    use_gate: bool
    lower_bound: float | None
    use_gate_sigmoid: bool
    erase_scale: float


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state and of all arithmetic: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------
# Raw projections to q, k, g, b, w and back
# ------------------------------------------------------------------------------------------------------------


def _decay_rate(A_log: Tensor | None, gate_heads: int, dtype: torch.dtype) -> Tensor | float:
    """a = exp(A_log) as [gate_heads, 1]; 1 without A_log."""
    if A_log is None:
        return 1.0
    a = A_log.to(dtype).exp()
    return a.repeat_interleave(gate_heads // a.shape[0]).unsqueeze(-1)


def _biased(g_raw: Tensor, dt_bias: Tensor | None, num_heads: int) -> Tensor:
    """u = g_raw + dt_bias, [B, T, gate_heads, K]."""
    if dt_bias is None:
        return g_raw
    gate_heads, dim_k = g_raw.shape[-2:]
    bias = dt_bias.to(g_raw.dtype).view(num_heads, dim_k)
    return g_raw + bias.repeat_interleave(gate_heads // num_heads, dim=0)


def _l2_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / n with n = sqrt(sum x^2 + eps), and n."""
    norm = (x.square().sum(-1, keepdim=True) + L2_NORM_EPS).sqrt()
    return x / norm, norm


def _l2_norm_backward(dy: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    return (dy - y * (y * dy).sum(-1, keepdim=True)) / norm


class Activated(NamedTuple):
    """q, k, g, b, w as the recurrence reads them, and what their backward needs."""

    q: Tensor
    k: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


def activate(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    options: GateOptions,
) -> Activated:
    """Raw projections to the recurrence's inputs, in the compute dtype (shapes unchanged)."""
    dtype = compute_dtype(q.dtype)
    num_heads = q.shape[2]
    q, k, g, b, w = (x.to(dtype) for x in (q, k, g, b, w))
    q_norm = k_norm = None
    if options.use_qk_l2norm:
        q, q_norm = _l2_norm(q)
        k, k_norm = _l2_norm(k)
    if options.use_gate:
        u = _biased(g, dt_bias, num_heads)
        a = _decay_rate(A_log, g.shape[2], dtype)
        if options.lower_bound is None:
            g = -a * torch.logaddexp(u, torch.zeros((), dtype=dtype, device=u.device))
        else:
            g = options.lower_bound * torch.sigmoid(a * u)
    if options.use_gate_sigmoid:
        b = options.erase_scale * torch.sigmoid(b)
        w = torch.sigmoid(w)
    return Activated(q, k, g, b, w, q_norm, k_norm)


def _decay_gate_backward(
    dg: Tensor,
    g: Tensor,
    g_raw: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    num_heads: int,
    options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of g_raw, A_log and dt_bias. Where g is -inf nothing moves, and 0 * inf is kept out."""
    dtype = dg.dtype
    u = _biased(g_raw.to(dtype), dt_bias, num_heads)
    a = _decay_rate(A_log, g.shape[2], dtype)
    if options.lower_bound is None:
        du = -a * torch.sigmoid(u) * dg
        d_log_a = torch.where(torch.isinf(g), torch.zeros_like(g), dg * g)
    else:
        s = torch.sigmoid(a * u)
        slope = options.lower_bound * s * (1 - s) * dg
        du = a * slope
        d_log_a = torch.where(slope == 0, torch.zeros_like(g), slope * a * u)
    gate_heads, dim_k = g.shape[-2:]
    per_head = (num_heads, gate_heads // num_heads)
    dA_log = None if A_log is None else d_log_a.sum((0, 1, 3)).view(per_head).sum(1)
    d_dt_bias = None if dt_bias is None else du.sum((0, 1)).view(*per_head, dim_k).sum(1).flatten()
    return du, dA_log, d_dt_bias


# ------------------------------------------------------------------------------------------------------------
# Tokens to chunks and back
# ------------------------------------------------------------------------------------------------------------


def num_chunk_slots(batch: int, seqlen: int, num_sequences: int, packed: bool) -> int:
    """How many chunk slots a call has. Packed: sequence n owns the slots cu_seqlens[n] // 64 + n and
    following, which needs no prefix sum over lengths, so that nothing is read back from the device; a few
    slots stay empty.
    """
    if packed:
        return seqlen // CHUNK + num_sequences
    return batch * ((seqlen + CHUNK - 1) // CHUNK)


class DenseTokens:
    """[B, T] tokens as chunks: one step per chunk, a lane per batch element and head."""

    def __init__(self, batch: int, seqlen: int):
        self.batch, self.seqlen = batch, seqlen
        self.steps = num_chunk_slots(1, seqlen, 1, packed=False)

    def to_chunks(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [steps, B*H, C, D], the last chunk padded with zeros."""
        heads, width = x.shape[2:]
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.steps * CHUNK - self.seqlen))
        x = x.view(self.batch, self.steps, CHUNK, heads, width).permute(1, 0, 3, 2, 4)
        return x.reshape(self.steps, self.batch * heads, CHUNK, width).contiguous()

    def from_chunks(self, x: Tensor) -> Tensor:
        """[steps, B*H, C, D] -> [B, T, H, D]."""
        heads, width = x.shape[1] // self.batch, x.shape[3]
        x = x.view(self.steps, self.batch, heads, CHUNK, width).permute(1, 0, 3, 2, 4)
        return x.reshape(self.batch, self.steps * CHUNK, heads, width)[:, : self.seqlen]

    def slots_first(self, x: Tensor) -> Tensor:
        """[steps, B*H, ...] -> [B*steps, H, ...], the order in which tensors per chunk leave the op."""
        heads = x.shape[1] // self.batch
        x = x.view(self.steps, self.batch, heads, *x.shape[2:])
        return x.transpose(0, 1).reshape(self.batch * self.steps, heads, *x.shape[3:])

    def steps_first(self, x: Tensor) -> Tensor:
        """The inverse of `slots_first`."""
        heads = x.shape[1]
        x = x.view(self.batch, self.steps, heads, *x.shape[2:])
        return x.transpose(0, 1).reshape(self.steps, self.batch * heads, *x.shape[3:])

    def states(self, x: Tensor) -> Tensor:
        """[B, H, K, V] -> [rows, lanes, K, V]: one row that holds every lane's state."""
        return x.reshape(1, -1, *x.shape[2:]).clone(memory_format=torch.contiguous_format)

    def from_states(self, x: Tensor) -> Tensor:
        return x.view(self.batch, -1, *x.shape[2:])

    def state_row(self, step: int) -> Tensor | None:
        """Which row of the states belongs to this step: always the only one."""
        return None


class PackedTokens:
    """Packed sequences as chunks: one step per chunk slot, a lane per head. Nothing is read back.

    Offsets count up to the first that is out of order or out of range; sequences from there on are malformed,
    and their rows and states are NaN, as are rows that no sequence owns.
    """

    def __init__(self, cu_seqlens: Tensor, seqlen: int):
        self.seqlen = seqlen
        self.num_sequences = cu_seqlens.shape[0] - 1
        self.steps = num_chunk_slots(1, seqlen, self.num_sequences, packed=True)
        device = cu_seqlens.device
        cu = cu_seqlens.to(torch.int64)
        begin, end = cu[:-1], cu[1:]
        ordered = (begin <= end) & (end <= seqlen) & (cu[0] == 0)
        self.well_formed = ordered.to(torch.int64).cumprod(0).bool()
        begin = torch.where(self.well_formed, begin, seqlen)
        end = torch.where(self.well_formed, end, seqlen)

        first_slot = begin // CHUNK + torch.arange(self.num_sequences, device=device)
        slot = torch.arange(self.steps, device=device)
        self.sequence = (torch.searchsorted(first_slot, slot, right=True) - 1).clamp(min=0)
        row = begin[self.sequence] + (slot - first_slot[self.sequence]) * CHUNK
        row = row.unsqueeze(-1) + torch.arange(CHUNK, device=device)
        self.inside = (row < end[self.sequence].unsqueeze(-1)) & self.well_formed[self.sequence].unsqueeze(-1)
        self.token = row.clamp(max=max(seqlen - 1, 0)).flatten()

        token = torch.arange(seqlen, device=device)
        owner = torch.searchsorted(end, token, right=True).clamp(max=self.num_sequences - 1)
        self.owner, self.owned = owner, self.well_formed[owner] & (token < end[owner])
        self.position = token - begin[owner]
        slot_of_token = first_slot[owner] + self.position // CHUNK
        self.chunk_row = (slot_of_token * CHUNK + self.position % CHUNK).clamp(0, self.steps * CHUNK - 1)
        self._rows = list(self.sequence.split(1))
        self._first_slot, self._num_chunks = first_slot, (end - begin + CHUNK - 1) // CHUNK

    def to_chunks(self, x: Tensor) -> Tensor:
        """[1, T, H, D] -> [steps, H, C, D]; rows outside the sequence are zero whatever lies there."""
        heads, width = x.shape[2:]
        if self.seqlen == 0:
            return x.new_zeros(self.steps, heads, CHUNK, width)
        x = x[0].index_select(0, self.token).view(self.steps, CHUNK, heads, width)
        x = torch.where(self.inside[..., None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        return x.transpose(1, 2).contiguous()

    def from_chunks(self, x: Tensor) -> Tensor:
        """[steps, H, C, D] -> [1, T, H, D]; NaN in rows that no sequence owns."""
        heads, width = x.shape[1], x.shape[3]
        x = x.transpose(1, 2).reshape(self.steps * CHUNK, heads, width).index_select(0, self.chunk_row)
        return torch.where(
            self.owned[:, None, None], x, torch.full((), torch.nan, dtype=x.dtype, device=x.device)
        )[None]

    def slots_first(self, x: Tensor) -> Tensor:
        return x

    def steps_first(self, x: Tensor) -> Tensor:
        return x

    def states(self, x: Tensor) -> Tensor:
        """[N, H, K, V] as it is: a row per sequence."""
        return x.clone(memory_format=torch.contiguous_format)

    def from_states(self, x: Tensor) -> Tensor:
        return torch.where(self.well_formed[:, None, None, None], x, torch.full_like(x, torch.nan))

    def state_row(self, step: int) -> Tensor | None:
        return self._rows[step]

    def in_sequence_order(self, x: Tensor, num_chunks: int) -> Tensor:
        """[steps, ...] -> [num_chunks, ...]: the chunks of every sequence one after the other, zeros behind
        the last.
        """
        last = self._num_chunks.cumsum(0)
        index = torch.arange(num_chunks, device=x.device)
        owner = torch.searchsorted(last, index, right=True).clamp(max=self.num_sequences - 1)
        slot = self._first_slot[owner] + index - (last - self._num_chunks)[owner]
        x = x.index_select(0, slot.clamp(0, self.steps - 1))
        used = (index < last[-1]).view(-1, *[1] * (x.dim() - 1))
        return torch.where(used, x, torch.zeros_like(x))


def _load_state(states: Tensor, row: Tensor | None) -> Tensor:
    return states[0] if row is None else states.index_select(0, row)[0]


def _store_state(states: Tensor, row: Tensor | None, S: Tensor) -> None:
    if row is None:
        states[0] = S
    else:
        states.index_copy_(0, row, S.unsqueeze(0))


# ------------------------------------------------------------------------------------------------------------
# Inside a chunk: decay factors, T, P, A
# ------------------------------------------------------------------------------------------------------------


class _DecayLevels:
    """The factors of exp(G[r]-G[s]) for halves of growing size, all in [0, 1], as products of alpha.

    Iterating gives, for h = 1, 2, ..., C/2, (h, D of the later halves, U of the earlier halves), [..., C/2h,
    h, K]: a row r of a later and a row s of the earlier half of the same pair have exp(G[r]-G[s]) = D[r]
    U[s]. Afterwards `gamma` is exp(G) and `tail` is exp(G[C-1]-G), [..., C, K]. Exact for any g <= 0, -inf
    included, and never looking at a row after r.
    """

    def __init__(self, g: Tensor):
        self.alpha = g.exp()

    def __iter__(self):
        shape = self.alpha.shape
        D = torch.ones_like(self.alpha)
        U = torch.cat([self.alpha[..., 1:, :], torch.ones_like(self.alpha[..., :1, :])], dim=-2)
        h = 1
        while h < CHUNK:
            pairs = (*shape[:-2], CHUNK // (2 * h), 2, h, shape[-1])
            D_pairs, U_pairs = D.view(pairs), U.view(pairs)
            D_later, U_earlier = D_pairs[..., 1, :, :], U_pairs[..., 0, :, :]
            yield h, D_later, U_earlier
            over_earlier = U_earlier[..., :1, :].clone()
            D_later.mul_(over_earlier)
            U_earlier.mul_(U_pairs[..., 1, :1, :])
            h *= 2
        self.gamma, self.tail = D * self.alpha[..., :1, :], U


def _halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later half of every pair of h-row blocks of [..., C, K]: views [.., C/2h, h, K]."""
    pairs = x.view(*x.shape[:-2], CHUNK // (2 * h), 2, h, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _pair_blocks(M: Tensor, h: int) -> Tensor:
    """The blocks (later half, earlier half) of every pair as a view [..., h, h, C/2h] of M [..., C, C]."""
    num_pairs = CHUNK // (2 * h)
    blocks = M.view(*M.shape[:-2], num_pairs, 2 * h, num_pairs, 2 * h).diagonal(dim1=-4, dim2=-2)
    return blocks[..., h:, :h, :]


class _Factors(NamedTuple):
    """What the scan reads, per chunk: [steps, lanes, C, K], and gamma_last [steps, lanes, K, 1]."""

    gamma: Tensor
    tail: Tensor
    gamma_E: Tensor
    gamma_q: Tensor
    Kt: Tensor
    gamma_last: Tensor


def _factors(levels: _DecayLevels, q_scaled: Tensor, k: Tensor, E: Tensor) -> _Factors:
    gamma, tail = levels.gamma, levels.tail
    return _Factors(
        gamma, tail, gamma * E, gamma * q_scaled, tail * k, gamma[..., -1, :].unsqueeze(-1).contiguous()
    )


def _prepare(q_scaled: Tensor, k: Tensor, g: Tensor, E: Tensor) -> tuple[_Factors, Tensor, Tensor]:
    """The factors, A - I and P of every chunk. q_scaled holds scale * q."""
    T = g.new_zeros(*g.shape[:-1], CHUNK)
    P = torch.zeros_like(T)
    levels = _DecayLevels(g)
    for h, D_later, U_earlier in levels:
        k_earlier = _halves(k, h)[0] * U_earlier
        rows = torch.cat([_halves(E, h)[1] * D_later, _halves(q_scaled, h)[1] * D_later], dim=-2)
        products = rows @ k_earlier.transpose(-1, -2) if h > 1 else (rows * k_earlier).sum(-1, keepdim=True)
        T_blocks, P_blocks = products.movedim(-3, -1).split(h, dim=-3)
        _pair_blocks(T, h).copy_(T_blocks)
        _pair_blocks(P, h).copy_(P_blocks)
    P.diagonal(dim1=-2, dim2=-1).copy_((q_scaled * k).sum(-1))
    identity = torch.eye(CHUNK, dtype=g.dtype, device=g.device)
    A = torch.linalg.solve_triangular(T + identity, identity.expand_as(T), upper=False, unitriangular=True)
    return _factors(levels, q_scaled, k, E), (A - identity).contiguous(), P


def _pairs_backward(
    dP: Tensor, dT: Tensor, q_scaled: Tensor, k: Tensor, g: Tensor, E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pairs(dP) and pairs(dT) of the chunk backward: gradients of q_scaled, E, k and g from P and T."""
    d_diagonal = dP.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq, dE, dk, dg = d_diagonal * k, torch.zeros_like(E), d_diagonal * q_scaled, torch.zeros_like(g)
    for h, D_later, U_earlier in _DecayLevels(g):
        k_earlier = _halves(k, h)[0] * U_earlier
        E_later, q_later = _halves(E, h)[1] * D_later, _halves(q_scaled, h)[1] * D_later
        M = torch.cat([_pair_blocks(dT, h), _pair_blocks(dP, h)], dim=-3).movedim(-1, -3)
        dE_later, dq_later = (M @ k_earlier).split(h, dim=-2)
        _halves(dE, h)[1].addcmul_(dE_later, D_later)
        _halves(dq, h)[1].addcmul_(dq_later, D_later)
        dk_earlier = M.transpose(-1, -2) @ torch.cat([E_later, q_later], dim=-2)
        _halves(dk, h)[0].addcmul_(dk_earlier, U_earlier)
        # alpha[i] is in the pair (r, s) for s < i <= r: in the later half up to r, in the earlier after s.
        # Summed like this no pair has to cancel, and dg is exact relative to its own size for any decay.
        _halves(dg, h)[1].add_(_sum_from(E_later * dE_later + q_later * dq_later))
        if h > 1:
            _halves(dg, h)[0][..., 1:, :].add_(_sum_to(k_earlier * dk_earlier)[..., :-1, :])
    return dq, dE, dk, dg


def _sum_from(x: Tensor) -> Tensor:
    """y[i] = sum of x[r] over the rows r >= i of [..., rows, K], in an order that depends on i alone."""
    h = 1
    while h < x.shape[-2]:
        x = torch.cat([x[..., :-h, :] + x[..., h:, :], x[..., -h:, :]], dim=-2)
        h *= 2
    return x


def _sum_to(x: Tensor) -> Tensor:
    """y[i] = sum of x[r] over the rows r <= i."""
    return _sum_from(x.flip(-2)).flip(-2)


# ------------------------------------------------------------------------------------------------------------
# The chunk form, forward and backward
# ------------------------------------------------------------------------------------------------------------


class _Call:
    """The inputs of one call as chunks, in the compute dtype, and the way back."""

    def __init__(self, q, k, v, g, b, w, A_log, dt_bias, cu_seqlens, scale: float, options: GateOptions):
        self.batch, self.seqlen, self.num_heads, self.dim_k = q.shape
        self.num_value_heads, self.dim_v = v.shape[2:]
        self.dtype = compute_dtype(q.dtype)
        # With g and b per value head, q and k are read per group and every value head is a lane of its own.
        self.lane_heads = g.shape[2]
        self.scale = scale
        self.activated = activate(q, k, g, b, w, A_log, dt_bias, options)
        if cu_seqlens is None:
            self.tokens = DenseTokens(self.batch, self.seqlen)
        else:
            self.tokens = PackedTokens(cu_seqlens, self.seqlen)
        self.v = self.values_to_chunks(v.to(self.dtype))
        self.w = self.values_to_chunks(self.activated.w)
        self.q_scaled = self.keys_to_chunks(self.activated.q) * scale
        self.k = self.keys_to_chunks(self.activated.k)
        self.g = self.tokens.to_chunks(self.activated.g)
        self.b = self.tokens.to_chunks(self.activated.b)
        self.E, self.Z = self.b * self.k, self.w * self.v

    def keys_to_chunks(self, x: Tensor) -> Tensor:
        if self.lane_heads != self.num_heads:
            x = x.repeat_interleave(self.lane_heads // self.num_heads, dim=2)
        return self.tokens.to_chunks(x)

    def keys_from_chunks(self, x: Tensor) -> Tensor:
        x = self.tokens.from_chunks(x)
        if self.lane_heads == self.num_heads:
            return x
        return x.unflatten(2, (self.num_heads, -1)).sum(3)

    def values_to_chunks(self, x: Tensor) -> Tensor:
        return self.tokens.to_chunks(x.reshape(self.batch, self.seqlen, self.lane_heads, self.group_width))

    def values_from_chunks(self, x: Tensor) -> Tensor:
        return self.tokens.from_chunks(x).reshape(self.batch, self.seqlen, self.num_value_heads, self.dim_v)

    @property
    def group_width(self) -> int:
        return self.num_value_heads // self.lane_heads * self.dim_v

    def group_states(self, x: Tensor) -> Tensor:
        """[N, HV, K, V] -> [N, lane heads, K, group width]."""
        x = x.to(self.dtype).unflatten(1, (self.lane_heads, -1)).transpose(2, 3)
        return x.flatten(3)

    def ungroup_states(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, self.dim_v)).transpose(2, 3)
        return x.flatten(1, 2)

    def states_in(self, state: Tensor | None, state_v_first: bool) -> Tensor:
        """The state tensor of the contract, or zeros, as [rows, lanes, K, group width]."""
        if state is None:
            n = self.batch if isinstance(self.tokens, DenseTokens) else self.tokens.num_sequences
            state = self.q_scaled.new_zeros(n, self.num_value_heads, self.dim_k, self.dim_v)
        elif state_v_first:
            state = state.transpose(2, 3)
        return self.tokens.states(self.group_states(state))

    def states_out(self, states: Tensor, state_v_first: bool) -> Tensor:
        state = self.ungroup_states(self.tokens.from_states(states))
        return (state.transpose(2, 3) if state_v_first else state).contiguous()


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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """o, final_state (or None), states at the chunks' starts (or None), and with keep A - I and P in one
    tensor [2, slots, lane heads, C, C] (or None).

    num_state_chunks: how many chunk states to return (per sequence for a dense call, in all for a packed
    one); None returns none.
    """
    call = _Call(q, k, v, g, b, w, A_log, dt_bias, cu_seqlens, scale, options)
    factors, A_minus_I, P = _prepare(call.q_scaled, call.k, call.g, call.E)
    states = call.states_in(initial_state, state_v_first)
    O = torch.empty_like(call.Z)
    h = None if num_state_chunks is None else call.Z.new_empty(call.tokens.steps, *states.shape[1:])
    for step in range(call.tokens.steps):
        row = call.tokens.state_row(step)
        S = _load_state(states, row)
        if h is not None:
            h[step] = S
        S, R = _scan_step(factors, A_minus_I, call.Z, S, step)
        torch.bmm(factors.gamma_q[step], S.start, out=O[step])
        O[step].baddbmm_(P[step], R)
        _store_state(states, row, S.end)
    o = call.values_from_chunks(O).to(q.dtype).contiguous()
    if h is not None:
        h = _states_at_chunks(call, h, num_state_chunks, state_v_first)
    final_state = call.states_out(states, state_v_first) if output_final_state else None
    kept = torch.stack([call.tokens.slots_first(x) for x in (A_minus_I, P)]) if keep else None
    return o, final_state, h, kept


class _Step(NamedTuple):
    start: Tensor
    end: Tensor


def _scan_step(factors: _Factors, A_minus_I: Tensor, Z: Tensor, S: Tensor, step: int) -> tuple[_Step, Tensor]:
    """X = Z - (gamma*E) S, R = A X, S' = Diag(gamma[C-1]) S + Kt^T R."""
    X = torch.baddbmm(Z[step], factors.gamma_E[step], S, alpha=-1)
    R = torch.baddbmm(X, A_minus_I[step], X)
    S_end = torch.baddbmm(factors.gamma_last[step] * S, factors.Kt[step].transpose(1, 2), R)
    return _Step(S, S_end), R


def _states_at_chunks(call: _Call, h: Tensor, num_state_chunks: int, state_v_first: bool) -> Tensor:
    """[steps, lanes, K, group width] -> [B, chunks, HV, K, V] (or V, K), the shape the op returns."""
    if isinstance(call.tokens, PackedTokens):
        h = call.tokens.in_sequence_order(h, num_state_chunks)
    h = call.ungroup_states(call.tokens.slots_first(h))
    h = h.unflatten(0, (call.batch, num_state_chunks))
    return (h.transpose(-1, -2) if state_v_first else h).contiguous()


class Gradients(NamedTuple):
    """Gradients of the op's inputs, in the inputs' dtypes; None where there is no such input."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    db: Tensor
    dw: Tensor
    dA_log: Tensor | None
    d_dt_bias: Tensor | None
    d_initial_state: Tensor | None


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
) -> Gradients:
    """The analytic chunk backward; kept comes from `chunk_forward`, states are recomputed."""
    call = _Call(q, k, v, g, b, w, A_log, dt_bias, cu_seqlens, scale, options)
    A_minus_I, P = (call.tokens.steps_first(x) for x in kept.to(call.dtype).unbind())
    dO = call.values_to_chunks(do.to(call.dtype))

    levels = _DecayLevels(call.g)
    for _ in levels:
        pass
    factors = _factors(levels, call.q_scaled, call.k, call.E)
    S_all, R = _recompute(call, factors, A_minus_I, call.states_in(initial_state, state_v_first))
    d_states = call.states_in(d_final_state, state_v_first)
    dS_all, dX = _reverse_scan(call, factors, A_minus_I, P, dO, d_states)

    # dP = tril(dO R^T), dT = -tril(dX R^T, -1)
    dP = torch.tril(dO @ R.transpose(-1, -2))
    dT = torch.tril(dX @ R.transpose(-1, -2), -1).neg_()
    dq, dE, dk, dg = _pairs_backward(dP, dT, call.q_scaled, call.k, call.g, call.E)
    # dq is the gradient of scale * q here; dk is dk_ of the equations, without b*dE.
    dq_state = factors.gamma * (dO @ S_all.transpose(-1, -2))
    dE_state = factors.gamma * (dX @ S_all.transpose(-1, -2))
    dk_state = factors.tail * (R @ dS_all.transpose(-1, -2))

    # Reads of S by tokens r >= i, the state that is carried through, and writes to S' by tokens s < i.
    reads = call.q_scaled * dq_state - call.E * dE_state
    reads[..., -1, :] += factors.gamma_last.squeeze(-1) * (S_all * dS_all).sum(-1)
    dg += _sum_from(reads)
    dg[..., 1:, :] += _sum_to(call.k * dk_state)[..., :-1, :]
    dq += dq_state
    dE -= dE_state
    dk += dk_state
    db = call.k * dE
    dk.addcmul_(call.b, dE)
    dv, dw = call.w * dX, call.v * dX

    return _gradients_of_raw_inputs(
        call,
        (q, k, v, g, b, w, A_log, dt_bias),
        options,
        dq=call.keys_from_chunks(dq) * scale,
        dk=call.keys_from_chunks(dk),
        dv=call.values_from_chunks(dv),
        dg=call.tokens.from_chunks(dg),
        db=call.tokens.from_chunks(db),
        dw=call.values_from_chunks(dw),
        d_initial_state=None if initial_state is None else call.states_out(d_states, state_v_first),
    )


def _recompute(call: _Call, factors: _Factors, A_minus_I: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """S at every chunk's start [steps, lanes, K, width] and R [steps, lanes, C, width]."""
    S_all = call.Z.new_empty(call.tokens.steps, *states.shape[1:])
    R_all = torch.empty_like(call.Z)
    for step in range(call.tokens.steps):
        row = call.tokens.state_row(step)
        S_all[step] = _load_state(states, row)
        S, R_all[step] = _scan_step(factors, A_minus_I, call.Z, S_all[step], step)
        _store_state(states, row, S.end)
    return S_all, R_all


def _reverse_scan(
    call: _Call, factors: _Factors, A_minus_I: Tensor, P: Tensor, dO: Tensor, d_states: Tensor
) -> tuple[Tensor, Tensor]:
    """dS' (gradient of the state after each chunk) and dX of every chunk; d_states ends as d initial_state.

    dR = P^T dO + Kt dS'      dX = A^T dR
    dS = Diag(gamma[C-1]) dS' + scale (gamma*q)^T dO - (gamma*E)^T dX
    """
    dS_all = call.Z.new_empty(call.tokens.steps, *d_states.shape[1:])
    dX_all = torch.empty_like(call.Z)
    P_dO = P.transpose(-1, -2) @ dO
    for step in reversed(range(call.tokens.steps)):
        row = call.tokens.state_row(step)
        dS_all[step] = _load_state(d_states, row)
        dR = torch.baddbmm(P_dO[step], factors.Kt[step], dS_all[step])
        torch.baddbmm(dR, A_minus_I[step].transpose(1, 2), dR, out=dX_all[step])
        dS = torch.baddbmm(
            factors.gamma_last[step] * dS_all[step], factors.gamma_q[step].transpose(1, 2), dO[step]
        )
        dS.baddbmm_(factors.gamma_E[step].transpose(1, 2), dX_all[step], alpha=-1)
        _store_state(d_states, row, dS)
    return dS_all, dX_all


def _gradients_of_raw_inputs(call: _Call, inputs, options: GateOptions, **d: Tensor | None) -> Gradients:
    """Through the norms, gates and sigmoids, and back to the inputs' dtypes."""
    q, k, v, g, b, w, A_log, dt_bias = inputs
    x = call.activated
    d["dA_log"] = d["d_dt_bias"] = None
    if options.use_qk_l2norm:
        d["dq"] = _l2_norm_backward(d["dq"], x.q, x.q_norm)
        d["dk"] = _l2_norm_backward(d["dk"], x.k, x.k_norm)
    if options.use_gate:
        d["dg"], d["dA_log"], d["d_dt_bias"] = _decay_gate_backward(
            d["dg"], x.g, g, A_log, dt_bias, call.num_heads, options
        )
    if options.use_gate_sigmoid:
        d["db"] = d["db"] * x.b * (1 - x.b / options.erase_scale)
        d["dw"] = d["dw"] * x.w * (1 - x.w)
    for name, tensor in zip(("dq", "dk", "dv", "dg", "db", "dw", "dA_log", "d_dt_bias"), inputs):
        if d[name] is not None:
            d[name] = d[name].to(tensor.dtype)
    return Gradients(**d)


# ------------------------------------------------------------------------------------------------------------
# The token form
# ------------------------------------------------------------------------------------------------------------


class StatePool(NamedTuple):
    """Where a decode call keeps its states: slots of a pool [num_slots, HV, K, V], picked by index.

    indices is [N] (one slot per sequence) or [N, T] (a slot per position: the state after that token goes
    there, and the call starts from the slot of the last accepted position). A slot out of range is never
    touched.
    """

    states: Tensor
    indices: Tensor
    num_accepted_tokens: Tensor | None

    def valid(self, slot: Tensor) -> Tensor:
        return (slot >= 0) & (slot < self.states.shape[0])

    def start_slots(self) -> Tensor:
        """[N], the slot that every sequence starts from."""
        if self.indices.dim() == 1:
            return self.indices
        if self.num_accepted_tokens is None:
            return self.indices[:, 0]
        position = (self.num_accepted_tokens.to(torch.int64) - 1).clamp(0, self.indices.shape[1] - 1)
        return self.indices.gather(1, position.unsqueeze(1)).squeeze(1)

    def read(self, slots: Tensor) -> Tensor:
        return self.states.index_select(0, slots.clamp(0, self.states.shape[0] - 1))

    def write(self, slots: Tensor, keep: Tensor, values: Tensor) -> None:
        """states[slots[n]] = values[n] where keep[n], one after the other: equal slots cannot race."""
        for slot, kept, value in zip(slots.split(1), keep.split(1), values.to(self.states.dtype).split(1)):
            safe = slot.clamp(0, self.states.shape[0] - 1)
            old = self.states.index_select(0, safe)
            self.states.index_copy_(0, safe, torch.where(kept[:, None, None, None], value, old))


def token_step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: S [..., K, V], q (scaled) k g b [..., K], v w [..., V] -> the new S, and o [..., V].

    Decay S; read r = S^T (b*k); S += k (w*v - r)^T; read o = S^T q.
    """
    S = g.exp().unsqueeze(-1) * S
    r = ((b * k).unsqueeze(-2) @ S).squeeze(-2)
    S = S + k.unsqueeze(-1) * (w * v - r).unsqueeze(-2)
    return S, (q.unsqueeze(-2) @ S).squeeze(-2)


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
) -> tuple[Tensor, Tensor | None]:
    """o and the final state [N, HV, K, V] (or V, K), or None; with inplace_final_state the pool is written.

    The final state of a sequence without a slot to start from is zero.
    """
    batch, seqlen, _, dim_k = q.shape
    heads, dim_v = v.shape[2:]
    dtype = compute_dtype(q.dtype)
    x = activate(q, k, g, b, w, A_log, dt_bias, options)

    def per_value_head(t: Tensor) -> Tensor:
        return t.repeat_interleave(heads // t.shape[2], dim=2)

    columns = [per_value_head(x.q) * scale, per_value_head(x.k), v.to(dtype)]
    columns += [per_value_head(x.g), per_value_head(x.b), x.w]
    packed = None if cu_seqlens is None else PackedTokens(cu_seqlens, seqlen)
    num_sequences = batch if packed is None else packed.num_sequences

    pool = None
    skipped = torch.zeros(num_sequences, dtype=torch.bool, device=q.device)
    if state_indices is not None:
        pool = StatePool(initial_state, state_indices.to(torch.int64), num_accepted_tokens)
        start = pool.start_slots()
        skipped = ~pool.valid(start)
        states = torch.where(
            skipped[:, None, None, None], torch.zeros((), dtype=dtype, device=q.device), pool.read(start)
        )
    elif initial_state is not None:
        states = initial_state
    else:
        shape = (dim_v, dim_k) if state_v_first else (dim_k, dim_v)
        states = v.new_zeros(num_sequences, heads, *shape, dtype=dtype)
    states = states.to(dtype)
    states = (states.transpose(2, 3) if state_v_first else states).clone()
    slot_per_position = pool is not None and pool.indices.dim() == 2

    def stored(S: Tensor) -> Tensor:
        return S.transpose(-1, -2) if state_v_first else S

    o = v.new_empty(batch, seqlen, heads, dim_v, dtype=dtype)
    for t in range(seqlen):
        if packed is None:
            states, o_t = token_step(states, *(c[:, t] for c in columns))
            zero_row = skipped
            if slot_per_position:
                slots = pool.indices[:, t]
                zero_row = zero_row | ~pool.valid(slots)
                if inplace_final_state:
                    pool.write(slots, ~zero_row, stored(states))
            o[:, t] = torch.where(zero_row[:, None, None], torch.zeros_like(o_t), o_t)
        else:
            n, owned = packed.owner[t : t + 1], packed.owned[t : t + 1]
            S_old = states.index_select(0, n)
            S, o_t = token_step(S_old, *(c[:, t] for c in columns))
            S = torch.where(owned[:, None, None, None], S, S_old)
            states.index_copy_(0, n, S)
            zero_row = skipped[n]
            if slot_per_position:
                column = packed.position[t : t + 1]
                slots = pool.indices[n, column.clamp(0, pool.indices.shape[1] - 1)]
                zero_row = zero_row | ~pool.valid(slots) | (column >= pool.indices.shape[1])
                if inplace_final_state:
                    pool.write(slots, owned & ~zero_row, stored(S))
            o_t = torch.where(zero_row[:, None, None], torch.zeros_like(o_t), o_t)
            o[:, t] = torch.where(owned[:, None, None], o_t, torch.full_like(o_t, torch.nan))
    if inplace_final_state and not slot_per_position:
        keep = ~skipped if packed is None else ~skipped & packed.well_formed
        pool.write(pool.indices, keep, stored(states))
    o = o.to(q.dtype)
    if not output_final_state:
        return o, None
    states = torch.where(skipped[:, None, None, None], torch.zeros_like(states), states)
    if packed is not None:
        states = packed.from_states(states)
    return o, stored(states).contiguous()
