"""Byte floors: the fewest bytes that the op can move, each input read once and each output written once.

Per token and head, 16-bit tensors and float32 g (K = V = 128: 2048 forward, 3840 backward):

    forward    read q, k, b [K] and v, w [V]: 2 (3 K + 2 V); read g: 4 K; write o: 2 V
    backward   read the same and do: 2 (3 K + 3 V) + 4 K; write dq, dk, db, dv, dw: 2 (3 K + 2 V); dg: 4 K
    decode     as forward, and one state of K V elements read and written: 2 * 65536 in float32
"""

from __future__ import annotations

from .shapes import Shape


def forward_bytes(shape: Shape) -> int:
    per_token_head = 2 * (3 * shape.dim_k + 2 * shape.dim_v) + 4 * shape.dim_k + 2 * shape.dim_v
    return per_token_head * shape.token_heads


def backward_bytes(shape: Shape) -> int:
    read = 2 * (3 * shape.dim_k + 3 * shape.dim_v) + 4 * shape.dim_k
    written = 2 * (3 * shape.dim_k + 2 * shape.dim_v) + 4 * shape.dim_k
    return (read + written) * shape.token_heads


def decode_state_bytes(shape: Shape, element_bytes: int) -> int:
    """The states alone, of one step of every sequence."""
    return 2 * shape.batch * shape.heads * shape.dim_k * shape.dim_v * element_bytes


def decode_bytes(shape: Shape, element_bytes: int) -> int:
    return decode_state_bytes(shape, element_bytes) + forward_bytes(shape)
