"""flash-linear-attention's Gated DeltaNet-2 on the kernels of this package, its callers unchanged.

    from gdn2_ext.integrations import fla
    fla.enable()

From then on `fla.ops.gdn2.chunk_gdn2` and `fused_recurrent_gdn2` run here where the CUDA backend takes the
call, for FLA's layers and for everybody else who imported them by name. Any other call goes to FLA's own
function, as it came, and the logger "gdn2_ext.integrations.fla" says at INFO level which call and why, once a
reason. See `enable` for which calls those are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from .. import ops

_FUNCTIONS = ("chunk_gdn2", "fused_recurrent_gdn2")
_TOKENS = ("q", "k", "v", "g", "b", "w")
_THROUGH_KWARGS = ("A_log", "dt_bias")  # what FLA's chunk_gdn2 takes without declaring it
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

logger = logging.getLogger(__name__)
_lock = threading.RLock()
_enabled = False
_stand_ins: dict[
    Callable, Callable
] = {}  # by FLA's function; kept, so that every reference to one stays valid
_places: list[tuple[dict, str]] = []  # the namespaces and names in which enable() has replaced something
_reported: set[tuple[str, str]] = set()


# ------------------------------------------------------------------------------------------------------------
# Public functions
# ------------------------------------------------------------------------------------------------------------


def enable() -> None:
    """Reroutes FLA's `chunk_gdn2` and `fused_recurrent_gdn2` to gdn2_ext, in the whole process.

    Replaced are the functions in `fla.ops.gdn2`, and every name that a loaded module has for them (FLA's
    submodules and layers, the script itself); who imports them later gets what is in `fla.ops.gdn2`. Other
    references (a default argument, a `functools.partial`) keep calling FLA. Calling it twice is harmless.

    A call runs in gdn2_ext where `gdn2_ext.supports` accepts it and means in gdn2_ext what it means in FLA.
    FLA's own function gets it unchanged, and the log the reason, where

      - `supports` says no: another device, dtype, K or V than the kernels take;
      - gdn2_ext would refuse an argument (a TypeError or ValueError, before anything runs);
      - an argument that gdn2_ext or FLA does not have is given, such as `cp_context`, and is neither None nor
        its default;
      - `return_intermediate_states` is asked for, as those states are float32 here and packed differently;
      - an input of `fused_recurrent_gdn2` requires a gradient, which gdn2_ext has for `chunk_gdn2` alone.

    Results are gdn2_ext's, to the bit, and so are gradients; errors of a running kernel are not caught.
    `torch.compile` traces through to gdn2_ext's operators.

    Raises:
        ImportError: flash-linear-attention is not installed, cannot be imported, or has no `fla.ops.gdn2`.
        RuntimeError: its functions are not those of a version that this module knows. Nothing is replaced.
    """
    global _enabled
    with _lock:
        if _enabled:
            return
        module = _import_fla()
        routes = [_route(module, name) for name in _FUNCTIONS]
        for route in routes:
            stand_in = _stand_ins.setdefault(route.theirs, _make_stand_in(route))
            _places.extend(_replace(_namespaces(), route.theirs, stand_in))
        _enabled = True


def disable() -> None:
    """Puts FLA's functions back wherever a module has them, also where one has imported them meanwhile.

    What somebody else has put in their place since is left alone. References that are in no module pass every
    call on to FLA from then on. Harmless where nothing is enabled.
    """
    global _enabled
    with _lock:
        _enabled = False
        namespaces = [*_namespaces(), *(namespace for namespace, _ in _places)]
        for theirs, stand_in in _stand_ins.items():
            _replace(namespaces, stand_in, theirs)
        _places.clear()


def is_enabled() -> bool:
    """Whether FLA's functions are rerouted."""
    return _enabled


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """A context in which FLA's functions are rerouted, as by `enable`, and after which they are as before:
    rerouted if they were, else not. May be nested. For the whole process, other threads included.

    Raises:
        ImportError, RuntimeError: as `enable`, on entering.
    """
    before = _enabled
    enable()
    try:
        yield
    finally:
        (enable if before else disable)()


# ------------------------------------------------------------------------------------------------------------
# What is replaced, and where
# ------------------------------------------------------------------------------------------------------------


class _Route(NamedTuple):
    """One of FLA's functions and how its arguments are passed on."""

    name: str
    theirs: Callable
    positional: tuple[str, ...]  # its parameters, in order
    shared: frozenset[str]  # what both functions have
    flags: frozenset[str]  # which of those are true or false, or None there
    defaults: dict[str, object]  # of what only one of them has


def _import_fla() -> ModuleType:
    try:
        return importlib.import_module("fla.ops.gdn2")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "fla"
        what = "is not installed" if missing else f"{_fla_version()} has no fla.ops.gdn2 that can be imported"
        raise ImportError(
            f"gdn2_ext.integrations.fla: flash-linear-attention {what} ({error}); it needs 0.6.0 or a later "
            "version with the same functions: pip install flash-linear-attention"
        ) from error


def _fla_version() -> str:
    return str(getattr(sys.modules.get("fla"), "__version__", "(unknown version)"))


def _route(module: ModuleType, name: str) -> _Route:
    def unknown(why: str) -> RuntimeError:
        return RuntimeError(
            f"gdn2_ext.integrations.fla: flash-linear-attention {_fla_version()} is not a version it knows "
            f"(0.6.0 is): fla.ops.gdn2.{name} {why}"
        )

    theirs = getattr(module, name, None)
    if not callable(theirs):
        raise unknown("does not exist")
    parameters = inspect.signature(theirs).parameters
    positional = tuple(n for n, parameter in parameters.items() if parameter.kind in _NAMED)
    if positional[: len(_TOKENS)] != _TOKENS:
        raise unknown(f"begins with {', '.join(positional[: len(_TOKENS)])}, not {', '.join(_TOKENS)}")
    has = {n for n, p in parameters.items() if p.kind in (*_NAMED, inspect.Parameter.KEYWORD_ONLY)}
    ours = inspect.signature(getattr(ops, name)).parameters
    shared = frozenset(has & set(ours))
    for n in sorted(shared):
        if parameters[n].default != ours[n].default:
            raise unknown(f"has {n} = {parameters[n].default} by default, not {ours[n].default}")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        shared |= frozenset(_THROUGH_KWARGS)
    defaults = {n: ours[n].default for n in ours if n not in shared}
    defaults |= {n: parameters[n].default for n in has if n not in shared}
    flags = frozenset(n for n in shared if isinstance(ours[n].default, bool))
    return _Route(name, theirs, positional, shared, flags, defaults)


def _namespaces() -> list[dict]:
    """Those of all loaded modules."""
    namespaces = (getattr(module, "__dict__", None) for module in list(sys.modules.values()))
    return [namespace for namespace in namespaces if isinstance(namespace, dict)]


def _replace(namespaces: list[dict], old: Callable, new: Callable) -> list[tuple[dict, str]]:
    """Every name for `old` becomes one for `new`. Returns which those were."""
    places = []
    for namespace in namespaces:
        for name, value in list(namespace.items()):
            if value is old:
                namespace[name] = new
                places.append((namespace, name))
    return places


# ------------------------------------------------------------------------------------------------------------
# One call
# ------------------------------------------------------------------------------------------------------------


def _make_stand_in(route: _Route) -> Callable:
    # Without their __dict__: in it torch.compile would find that FLA's function is not to be traced.
    @functools.wraps(route.theirs, updated=())
    def stand_in(*args, **kwargs):
        if not _enabled:
            return route.theirs(*args, **kwargs)
        arguments, reason = _arguments(route, args, kwargs)
        refused = False
        if reason is None:
            try:
                taken, reason = ops.supports(**arguments)
                if taken:
                    return getattr(ops, route.name)(**arguments, backend="cuda")
            except (TypeError, ValueError) as error:  # raised before anything has run
                reason, refused = str(error), True
        _report(route.name, reason, refused)
        return route.theirs(*args, **kwargs)

    return stand_in


def _arguments(route: _Route, args: tuple, kwargs: dict) -> tuple[dict[str, object], str | None]:
    """The call's arguments for gdn2_ext's function, and why it cannot have them, if so."""
    given = dict(zip(route.positional, args))
    misfit = len(args) > len(route.positional) or any(name in given for name in kwargs)
    given.update(kwargs)
    if misfit or any(name not in given for name in _TOKENS):
        return {}, "its arguments do not fit its signature"
    arguments = {}
    for name, value in given.items():
        if name in route.shared:
            arguments[name] = False if value is None and name in route.flags else value
        elif not (value is None or _is_default(value, route.defaults.get(name))):
            return {}, f"its argument {name} is not one that gdn2_ext and flash-linear-attention share"
    if arguments.get("return_intermediate_states"):
        return {}, "return_intermediate_states gives states of another form in gdn2_ext"
    if route.name == "fused_recurrent_gdn2" and torch.is_grad_enabled():
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments.values()):
            return {}, "an input requires a gradient, and gdn2_ext has none for fused_recurrent_gdn2"
    return arguments, None


def _is_default(value: object, default: object) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)


@torch.compiler.assume_constant_result  # while a graph is traced: once, and no part of it
def _report(name: str, reason: str, refused: bool) -> None:
    """Log that a call goes to FLA, at most once a reason.

    refused: the reason is the text of an error, which names sizes; two that differ in numbers alone are one.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    said = (name, re.sub(r"\d+", "0", reason) if refused else reason)
    if said not in _reported:
        _reported.add(said)
        logger.info("%s goes to flash-linear-attention: %s", name, reason)
