"""Gated DeltaNet-2 linear attention for PyTorch on NVIDIA Hopper."""

from .ops import chunk_gdn2, fused_recurrent_gdn2, supports

__version__ = "0.1.0.dev0"
__all__ = ["chunk_gdn2", "fused_recurrent_gdn2", "supports"]
