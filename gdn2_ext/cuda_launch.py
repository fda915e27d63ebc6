"""How calls reach the kernels: tensors as the extension reads them, and when torch.library is not needed.

The checks of ops.py and the dispatcher take tens of microseconds of the host, a kernel a few. Plain tensors
that nobody watches are read and checked by the extension itself (csrc/api/python_tensors.h).
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_C, WHY_NO_EXTENSION = None, None
try:
    _C = importlib.import_module("gdn2_ext._C")
except ModuleNotFoundError:
    WHY_NO_EXTENSION = "gdn2_ext was built without its kernels (GDN2_CUDA=OFF)"
except ImportError as error:
    WHY_NO_EXTENSION = f"the kernels of gdn2_ext could not be loaded: {error}"

# PyTorch 2.10 and newer: the extension reads tensors by itself, and makes them by these functions.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
READ_TENSORS = None if _EXCHANGE is None else (_EXCHANGE, Tensor, torch.nn.Parameter)
_new_float32 = functools.partial(Tensor.new_empty, dtype=torch.float32)
MAKE_TENSORS = (torch.empty_like, Tensor.new_empty, _new_float32)
# Kind of csrc/api/python_tensors.h
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3, torch.int64: 4}


def as_tuple(x: Tensor | None) -> tuple | None:
    """A tensor for an extension that does not read it by itself."""
    return None if x is None else (x.data_ptr(), tuple(x.shape), x.stride(), _KINDS[x.dtype], x.get_device())


def nobody_traces() -> bool:
    """Whether the kernels may be launched without going through torch.library, as far as the surroundings are
    concerned: nobody compiles, traces, transforms or watches operators.
    """
    return not (
        is_compiling()
        or _get_tracing_state()
        or peek_interpreter_stack()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or forward_ad._current_level >= 0
    )


def nobody_watches() -> bool:
    """`nobody_traces`, and nobody casts either."""
    return nobody_traces() and not torch.is_autocast_enabled("cuda")


def are_plain(tensors) -> bool:
    """Whether tensors need torch.library: none is of a subclass, and none is differentiated."""
    graph = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in (Tensor, torch.nn.Parameter) or (graph and x.requires_grad)):
            return False
    return True
