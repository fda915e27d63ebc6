"""Into how many segments the sequences of a call are cut: csrc/api/sequence_split.cpp.

By its shape and the GPU alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from . import cuda_launch

MAX_SEGMENTS = 64


class Gpu(NamedTuple):
    """What the choice knows of the GPU."""

    num_sms: int
    memory_bandwidth: int  # GB/s, by the memory's clock and bus


@functools.cache
def gpu(index: int) -> Gpu:
    """The GPU of this index. Needs the extension."""
    return Gpu(*cuda_launch._C.gpu(index))


def num_segments(
    requested: int, seqlen: int, num_sequences: int, gate_heads: int, value_heads: int, dim_k: int,
    dim_v: int, packed: bool, gpu: Gpu,
) -> int:  # fmt: skip
    """1 for sequences that stay whole. Needs the extension.

    Args:
        requested: a number of segments; 0: whatever is quickest.
        seqlen: of a dense sequence, or of all packed ones.
    """
    return requested or cuda_launch._C.num_segments(
        seqlen, num_sequences, gate_heads, value_heads, dim_k, dim_v, packed, *gpu
    )
