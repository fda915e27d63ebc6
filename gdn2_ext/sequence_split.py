"""Into how many segments the sequences of a call are cut, by its shape alone.

Segments are walked side by side (docs/kernels.md), which pays where the walks of whole sequences leave most
of the GPU without work. It costs a second walk, of all segments but the last, that makes their affine maps.
"""

from __future__ import annotations

import functools

_CHUNK, _COLUMNS = 64, 64  # tokens of a chunk, value columns of a walk
MAX_SEGMENTS = 64

# In microseconds on an H200: a chunk and head of prepare, times SMs; a chunk of a walk, alone and for every
# walk that shares the memory with it; and how a walk begins.
_PREPARE = 5.8
_SCAN, _SCAN_SHARED = 1.08, 0.0143
_MAPS, _MAPS_SHARED = 0.86, 0.0086
_BEGIN = 5.0
_STATE = 1.5  # every segment's first state
_BESIDE = 1.25  # what prepare and the walk cost each other


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
    if requested > 0:
        return requested
    length = seqlen // max(num_sequences, 1) if packed else seqlen
    chunks = (length + _CHUNK - 1) // _CHUNK
    walks = num_sequences * value_heads * ((dim_v + _COLUMNS - 1) // _COLUMNS)
    matrices = num_sequences * gate_heads * ((dim_k + _COLUMNS - 1) // _COLUMNS)
    prepare = _PREPARE * num_sequences * chunks * gate_heads

    def walk(number: int, segments: int, chunk: float, shared: float) -> float:
        waves = -(-number // num_sms)
        return _BEGIN + waves * -(-chunks // segments) * max(chunk, shared * min(number, num_sms))

    def microseconds(segments: int) -> float:
        scan = walk(segments * walks, segments, _SCAN, _SCAN_SHARED)
        if segments > 1:
            # The first segment starts in one state only.
            number = (segments - 1) * walks + (segments - 2) * matrices
            maps = walk(number, segments, _MAPS, _MAPS_SHARED)
            return prepare / num_sms + maps + _BEGIN + _STATE * (segments - 1) + scan
        one_after_the_other = prepare / num_sms + scan
        if packed or 2 * walks > num_sms:
            return one_after_the_other
        beside = _BESIDE * max(prepare / (num_sms - walks), scan)  # csrc/api/chunk_forward.cpp
        return min(one_after_the_other, beside)

    # As many as there is room for, or fewer. Where it would save less than a tenth, none.
    best = min(range(1, min(MAX_SEGMENTS, max(chunks, 1)) + 1), key=microseconds)
    return best if microseconds(best) < 0.9 * microseconds(1) else 1
