"""Into how many segments the sequences of a call are cut, by its shape alone.

Segments are walked side by side (docs/kernels.md), which pays where the walks of whole sequences leave most
of the GPU without work. It costs a second walk, of all segments but the last, that makes their affine maps.
"""

from __future__ import annotations

import functools

_CHUNK, _COLUMNS = 64, 64  # tokens of a chunk, value columns of a walk
MAX_SEGMENTS = 64

# In microseconds on an H200: a chunk of a walk, alone and for every walk that shares the memory with it.
_SCAN, _SCAN_SHARED = 1.1, 0.018
_MAPS, _MAPS_SHARED = 0.95, 0.012
_LAUNCHES, _STATE = 10.0, 3.0  # of the two kernels more, and of every segment's first state


@functools.lru_cache(maxsize=4096)
def num_segments(
    requested: int, seqlen: int, num_sequences: int, gate_heads: int, value_heads: int, dim_k: int,
    dim_v: int, packed: bool, num_sms: int,
) -> int:  # fmt: skip
    """1 for sequences that stay whole.

    Args:
        requested: a number of segments; 0: whatever is quickest.
        seqlen: of a dense sequence, or of all packed ones.
        num_sms: of the GPU.
    """
    length = seqlen // max(num_sequences, 1) if packed else seqlen
    chunks = (length + _CHUNK - 1) // _CHUNK
    if requested > 0:
        return requested
    walks = num_sequences * value_heads * ((dim_v + _COLUMNS - 1) // _COLUMNS)
    matrices = num_sequences * gate_heads * ((dim_k + _COLUMNS - 1) // _COLUMNS)

    def microseconds(segments: int) -> float:
        def walk(number: int, chunk: float, shared: float) -> float:
            waves = -(-number // num_sms)
            return waves * -(-chunks // segments) * max(chunk, shared * min(number, num_sms))

        time = walk(segments * walks, _SCAN, _SCAN_SHARED)
        if segments > 1:
            maps = (segments - 1) * walks + (
                segments - 2
            ) * matrices  # the first segment starts in one state only
            time += walk(maps, _MAPS, _MAPS_SHARED) + _LAUNCHES + _STATE * (segments - 1)
        return time

    # As many as there is room for, or fewer. Where it would save less than a tenth, none.
    best = min(range(1, min(MAX_SEGMENTS, max(chunks, 1)) + 1), key=microseconds)
    return best if microseconds(best) < 0.9 * microseconds(1) else 1
