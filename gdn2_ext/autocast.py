"""Dtypes under torch.autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x as linears take it: in the dtype of autocast where it is on; float64 and integers stay.

    Cast before several linears take it, and not by each of them, it is read and written once.
    """
    device_type = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    return x
