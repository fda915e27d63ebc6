"""Dtypes under torch.autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x as linears take it: in the dtype of autocast where it is on; float64 and integers stay.

    Cast before several linears take it, and not by each of them, it is read and written once. Their gradients
    of it are then summed in that dtype, and not in the dtype that x had.
    """
    if x.is_floating_point() and x.dtype != torch.float64 and _is_on(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # asked of meta, it raises
