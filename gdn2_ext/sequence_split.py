"""Into how many segments the sequences of a call are cut, by its shape alone: csrc/api/sequence_split.cpp."""

from __future__ import annotations

from . import cuda_launch

MAX_SEGMENTS = 64


def num_segments(
    requested: int, seqlen: int, num_sequences: int, gate_heads: int, value_heads: int, dim_k: int,
    dim_v: int, packed: bool, num_sms: int,
) -> int:  # fmt: skip
    """1 for sequences that stay whole. Needs the extension.

    Args:
        requested: a number of segments; 0: whatever is quickest.
        seqlen: of a dense sequence, or of all packed ones.
        num_sms: of the GPU.
    """
    return requested or cuda_launch._C.num_segments(
        seqlen, num_sequences, gate_heads, value_heads, dim_k, dim_v, packed, num_sms
    )
