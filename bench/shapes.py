"""The shapes of the op's benchmarks: bfloat16, float32 g, K = V = 128."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    batch: int
    seqlen: int
    heads: int
    dim_k: int = 128
    dim_v: int = 128

    @property
    def label(self) -> str:
        return f"B{self.batch} T{self.seqlen} H{self.heads}"

    @property
    def token_heads(self) -> int:
        return self.batch * self.seqlen * self.heads


OP_SHAPES = (
    Shape(4, 4096, 16),  # the paper's 4Kx4
    Shape(8, 2048, 16),
    Shape(1, 16384, 16),
    Shape(1, 8192, 64),
    Shape(1, 8192, 8),
    Shape(1, 65536, 4),
)

# Decoding: sequences of one token, 16 heads.
DECODE_BATCHES = (1, 8, 32, 128, 256)
