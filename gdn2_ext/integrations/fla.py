"""flash-linear-attention on the kernels of this package, without a change in the code that calls it.

    from gdn2_ext.integrations import fla
    fla.enable()

From then on `fla.ops.gdn2.chunk_gdn2` and `fused_recurrent_gdn2` run here where `gdn2_ext.supports` accepts
the call, also for modules that imported them by name, such as FLA's layers. Every other call goes to FLA as
before, and says so with its reason at INFO level on the logger "gdn2_ext.integrations.fla", once a reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import ops

logger = logging.getLogger(__name__)
_lock = threading.RLock()
_replaced: dict[str, tuple[Callable, Callable]] = {}  # by name: FLA's function, and what stands in for it
_reasons: set[tuple[str, str]] = set()

_TENSORS = ("q", "k", "v", "g", "b", "w")


def enable() -> None:
    """Reroutes FLA's functions. Harmless where they already are.

    Raises:
        ImportError: there is no `fla.ops.gdn2`, or not with these functions.
    """
    with _lock:
        if _replaced:
            return
        module = importlib.import_module("fla.ops.gdn2")
        for ours in (ops.chunk_gdn2, ops.fused_recurrent_gdn2):
            name = ours.__name__
            if not hasattr(module, name):
                _replaced.clear()
                raise ImportError(f"fla.ops.gdn2 has no {name}: this flash-linear-attention is not known")
            theirs = getattr(module, name)
            _replaced[name] = (theirs, _rerouted(theirs, ours))
        for theirs, stand_in in _replaced.values():
            _replace_everywhere(theirs, stand_in)


def disable() -> None:
    """Puts FLA's own functions back, also where they were imported meanwhile."""
    with _lock:
        for theirs, stand_in in _replaced.values():
            _replace_everywhere(stand_in, theirs)
        _replaced.clear()
        _reasons.clear()


def is_enabled() -> bool:
    return bool(_replaced)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Rerouted inside a `with`, and afterwards as it was before."""
    was_enabled = is_enabled()
    enable()
    try:
        yield
    finally:
        if not was_enabled:
            disable()


def _replace_everywhere(old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        members = getattr(module, "__dict__", None)
        if isinstance(members, dict):
            for name in [name for name, value in members.items() if value is old]:
                members[name] = new


def _rerouted(theirs: Callable, ours: Callable) -> Callable:
    accepted = set(inspect.signature(ours).parameters)
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def call(*args, **kwargs):
        arguments = _arguments(signature, args, kwargs)
        reason = _why_not(ours, accepted, arguments)
        if reason is None:
            known = {name: value for name, value in arguments.items() if name in accepted}
            return ours(**known, backend="cuda")
        if (ours.__name__, reason) not in _reasons:
            _reasons.add((ours.__name__, reason))
            logger.info("%s: left to flash-linear-attention: %s", ours.__name__, reason)
        return theirs(*args, **kwargs)

    return call


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a call gives, by name; those that go into **kwargs too."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def _why_not(ours: Callable, accepted: set[str], arguments: dict[str, Any]) -> str | None:
    """None where this package takes the call."""
    for name, value in arguments.items():
        if name not in accepted and value is not None and value is not False:
            return f"{name} is given"
    tensors = [arguments.get(name) for name in _TENSORS]
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        return "an argument is missing"
    if ours is ops.fused_recurrent_gdn2:
        given = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            return "gradients are asked for"
    try:
        supported, reason = ops.supports(*tensors)
    except (TypeError, ValueError) as error:
        return str(error)
    return None if supported else reason
