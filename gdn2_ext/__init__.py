"""Gated DeltaNet-2 linear attention for PyTorch on NVIDIA Hopper."""

from .layers import GatedDeltaNet2, RecurrentCache
from .ops import chunk_gdn2, fused_recurrent_gdn2, supports

__version__ = "0.1.0.dev0"
__all__ = ["GatedDeltaNet2", "RecurrentCache", "chunk_gdn2", "fused_recurrent_gdn2", "supports"]
