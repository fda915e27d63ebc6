"""Calls to flash-linear-attention that run in this package."""

import inspect
import logging
import sys
import types

import compare
import pytest
import torch

import gdn2_ext
from gdn2_ext import ops
from gdn2_ext.integrations import fla


def fake_chunk_gdn2(q, k, v, g, b, w, scale=None, initial_state=None, cp_context=None, **kwargs):
    return "fla", "chunk"


def fake_fused_recurrent_gdn2(q, k, v, g, b, w, A_log=None, **kwargs):
    return "fla", "recurrent"


@pytest.fixture
def fake(monkeypatch):
    """A package `fla`, and a module that imported its functions by name."""
    functions = {"chunk_gdn2": fake_chunk_gdn2, "fused_recurrent_gdn2": fake_fused_recurrent_gdn2}
    modules = {name: types.ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.gdn2", "fla.user")}
    for name in ("fla.ops.gdn2", "fla.user"):
        vars(modules[name]).update(functions)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield types.SimpleNamespace(ops=modules["fla.ops.gdn2"], user=modules["fla.user"])
    fla.disable()


@pytest.fixture
def supported(monkeypatch):
    """gdn2_ext.supports says yes, and the ops say that they were called."""
    monkeypatch.setattr(ops, "supports", lambda *_, **__: (True, ""))

    def chunk_gdn2(q, k, v, g, b, w, scale=None, A_log=None, initial_state=None, backend="auto"):
        return "gdn2_ext", scale, A_log, backend

    def fused_recurrent_gdn2(q, k, v, g, b, w, A_log=None, backend="auto"):
        return "gdn2_ext", A_log, backend

    monkeypatch.setattr(ops, "chunk_gdn2", chunk_gdn2)
    monkeypatch.setattr(ops, "fused_recurrent_gdn2", fused_recurrent_gdn2)


TOKENS = [torch.zeros(1, 2, 1, 4) for _ in range(6)]


def test_calls_are_rerouted_wherever_the_functions_were_imported(fake, supported):
    with fla.enabled():
        for module in (fake.ops, fake.user):
            assert module.chunk_gdn2(*TOKENS, 0.5) == ("gdn2_ext", 0.5, None, "cuda")
            assert module.chunk_gdn2(*TOKENS, A_log=3, cp_context=None) == ("gdn2_ext", None, 3, "cuda")
            assert module.fused_recurrent_gdn2(*TOKENS, 7) == ("gdn2_ext", 7, "cuda")
        assert inspect.signature(fake.user.chunk_gdn2) == inspect.signature(fake_chunk_gdn2)
    for module in (fake.ops, fake.user):
        assert module.chunk_gdn2 is fake_chunk_gdn2
        assert module.fused_recurrent_gdn2 is fake_fused_recurrent_gdn2


def test_modules_that_import_while_it_is_enabled_get_the_originals_back(fake, supported, monkeypatch):
    fla.enable()
    fla.enable()
    late = types.ModuleType("late")
    late.chunk = fake.ops.chunk_gdn2
    monkeypatch.setitem(sys.modules, "late", late)
    assert late.chunk(*TOKENS)[0] == "gdn2_ext"
    fla.disable()
    assert late.chunk is fake_chunk_gdn2 and not fla.is_enabled()
    fla.disable()


def test_contexts_nest(fake, supported):
    with fla.enabled():
        with fla.enabled():
            pass
        assert fake.ops.chunk_gdn2(*TOKENS)[0] == "gdn2_ext"
    assert fake.ops.chunk_gdn2 is fake_chunk_gdn2
    with pytest.raises(KeyError), fla.enabled():
        raise KeyError
    assert not fla.is_enabled()


def test_what_is_not_supported_is_left_alone_and_says_why_once(fake, caplog):
    """The tensors lie on the CPU."""
    with fla.enabled(), caplog.at_level(logging.INFO, "gdn2_ext.integrations.fla"):
        for _ in range(3):
            assert fake.user.chunk_gdn2(*TOKENS) == ("fla", "chunk")
        assert fake.user.fused_recurrent_gdn2(*TOKENS) == ("fla", "recurrent")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages[0].startswith("chunk_gdn2: left to flash-linear-attention: ")
    assert caplog.messages[1].startswith("fused_recurrent_gdn2: left to flash-linear-attention: ")


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("chunk_gdn2", {"cp_context": object()}, "cp_context is given"),
        ("chunk_gdn2", {"novelty": 1}, "novelty is given"),
        ("chunk_gdn2", {"q": torch.zeros(2)}, "q: expected"),
        ("chunk_gdn2", {"v": None}, "an argument is missing"),
        ("fused_recurrent_gdn2", {"q": TOKENS[0].clone().requires_grad_()}, "gradients are asked for"),
    ],
)
def test_reasons_to_leave_a_call_alone(fake, caplog, name, arguments, reason):
    arguments = {**dict(zip("qkvgbw", TOKENS)), **arguments}
    with fla.enabled(), caplog.at_level(logging.INFO, "gdn2_ext.integrations.fla"):
        assert getattr(fake.user, name)(**arguments)[0] == "fla"
    assert reason in caplog.messages[0]


def test_without_flash_linear_attention_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.gdn2", types.ModuleType("fla.ops.gdn2"))
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    with pytest.raises(ImportError, match="fla.ops.gdn2 has no chunk_gdn2"):
        fla.enable()
    assert not fla.is_enabled()
    monkeypatch.setitem(sys.modules, "fla.ops.gdn2", None)
    with pytest.raises(ImportError):
        fla.enable()


# -- the installed package -----------------------------------------------------------------------------------


@pytest.fixture
def installed():
    return pytest.importorskip("fla.ops.gdn2", reason="flash-linear-attention is not installed")


def test_the_installed_functions_take_what_is_passed_on(installed):
    for ours in (gdn2_ext.chunk_gdn2, gdn2_ext.fused_recurrent_gdn2):
        theirs = set(inspect.signature(getattr(installed, ours.__name__)).parameters)
        assert theirs - set(inspect.signature(ours).parameters) <= {"cp_context", "kwargs"}


@pytest.mark.gpu
def test_a_rerouted_call_is_ours_to_the_bit(hopper, installed, seed):
    inputs = hopper.inputs(seqlen=100, heads=2, dim_k=64, dim_v=64, seed=seed)
    leaves = [x.requires_grad_() for x in inputs.tensors]
    expected, _ = gdn2_ext.chunk_gdn2(*leaves, backend="cuda")
    gradients = torch.autograd.grad(expected, leaves, inputs.do)
    with fla.enabled():
        o, _ = installed.chunk_gdn2(*leaves)
        with torch.no_grad():
            step, _ = installed.fused_recurrent_gdn2(*leaves)
    compare.assert_bitwise_equal(o, expected, "o")
    for name, x, y in zip("qkvgbw", torch.autograd.grad(o, leaves, inputs.do), gradients):
        compare.assert_bitwise_equal(x, y, f"d{name}")
    compare.assert_close(step, o.detach(), hopper.bar("o"), "o, token by token")


@pytest.mark.gpu
def test_the_layer_of_fla_trains_on_our_kernels(hopper, installed, monkeypatch, seed):
    layer = pytest.importorskip("fla.layers").GatedDeltaNet2(128, head_dim=64, num_heads=2)
    layer = layer.to(hopper.device, hopper.dtype)
    x = hopper.normal(2, 100, 128, seed=seed, dtype=hopper.dtype)
    expected = layer(x)[0]
    calls = []
    chunk = ops.chunk_gdn2
    counted = lambda *args, **kwargs: calls.append(1) or chunk(*args, **kwargs)  # noqa: E731
    counted.__name__, counted.__signature__ = "chunk_gdn2", inspect.signature(chunk)
    monkeypatch.setattr(ops, "chunk_gdn2", counted)
    with fla.enabled():
        o = layer(x)[0]
        o.float().square().sum().backward()
    assert calls
    compare.assert_close(o.detach(), expected.detach(), 2e-2, "o")
    assert all(p.grad.isfinite().all() for p in layer.parameters())
