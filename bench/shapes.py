"""The shapes of the op's benchmarks: bfloat16, float32 g, K = V = 128."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    batch: int
    seqlen: int
    heads: int
    dim_k: int = 128
    dim_v: int = 128
    lengths: tuple[int, ...] | None = None  # of sequences packed in one row

    @property
    def label(self) -> str:
        first = f"B{self.batch}" if self.lengths is None else f"{len(self.lengths)} packed"
        dims = "" if self.dim_k == 128 else f" D{self.dim_k}"
        return f"{first} T{self.seqlen} H{self.heads}{dims}"

    @property
    def token_heads(self) -> int:
        return self.batch * self.seqlen * self.heads


PACKED = (37, 113, 201, 256, 402, 512, 640, 777, 900, 1024, 1155, 1300, 1500, 1801, 2766, 3000)

OP_SHAPES = (
    Shape(4, 4096, 16),  # the paper's 4Kx4
    Shape(8, 2048, 16),
    Shape(1, 16384, 16),
    Shape(1, 8192, 64),
    Shape(1, 8192, 8),
    Shape(1, 65536, 4),
    Shape(1, 131072, 2),
    Shape(1, sum(PACKED), 16, lengths=PACKED),
)

# Decoding: sequences of one token, 16 heads.
DECODE_BATCHES = (1, 8, 32, 128, 256)
