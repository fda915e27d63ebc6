"""gdn2_ext.integrations.fla: which calls of flash-linear-attention run here, and that it can be undone.

Most tests have a package `fla` made of functions with the signatures of version 0.6.0, so that they run
anywhere; those at the end take the installed one.
"""

import functools
import inspect
import logging
import sys
import threading
from types import ModuleType, SimpleNamespace

import cases
import compare
import pytest
import torch

import gdn2_ext
from gdn2_ext import ops
from gdn2_ext.integrations import fla

LOGGER = "gdn2_ext.integrations.fla"
NAMES = ("chunk_gdn2", "fused_recurrent_gdn2")
every_function = pytest.mark.parametrize("name", NAMES)
SHAPE = {"batch": 2, "seqlen": 70, "heads": 2, "dim_k": 16, "dim_v": 32}


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    """Nothing rerouted, nothing reported."""
    assert not fla.is_enabled()
    monkeypatch.setattr(fla, "_stand_ins", {})
    monkeypatch.setattr(fla, "_reported", set())
    yield
    fla.disable()


# ------------------------------------------------------------------------------------------------------------
# A package `fla` without kernels
# ------------------------------------------------------------------------------------------------------------


def make_functions(calls: list) -> dict:
    """FLA's functions. They note what they were called with and return what nobody else would."""

    def chunk_gdn2(
        q, k, v, g, b, w, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None,
        safe_gate=False, lower_bound=None, disable_recompute=False, return_intermediate_states=False,
        state_v_first=False, cp_context=None, **kwargs,
    ):  # fmt: skip
        """FLA's."""

    def fused_recurrent_gdn2(
        q, k, v, g, b, w, A_log=None, dt_bias=None, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, lower_bound=None, state_v_first=False,
        cu_seqlens=None, **kwargs,
    ):  # fmt: skip
        """FLA's."""

    def noting(function):
        @functools.wraps(function)  # as the installed ones: a decorated function takes (*args, **kwargs)
        def call(*args, **kwargs):
            calls.append((function.__name__, args, kwargs))
            return "fla", function.__name__

        return call

    functions = {"chunk_gdn2": noting(chunk_gdn2), "fused_recurrent_gdn2": noting(fused_recurrent_gdn2)}
    functions["chunk_gdn2"]._torchdynamo_disable = True  # FLA's is under torch.compiler.disable
    return functions


def make_module(monkeypatch, name: str, **members) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def remove_fla(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def package(monkeypatch):
    """`fla` as it is laid out, a module that imported a function under another name, and the calls made."""
    remove_fla(monkeypatch)
    calls = []
    functions = make_functions(calls)
    make_module(monkeypatch, "fla", __version__="0.6.0")
    make_module(monkeypatch, "fla.ops")
    make_module(monkeypatch, "fla.layers")
    chunk, recurrent = ({name: functions[name]} for name in NAMES)
    return SimpleNamespace(
        calls=calls,
        functions=functions,
        ops=make_module(monkeypatch, "fla.ops.gdn2", **functions),
        chunk=make_module(monkeypatch, "fla.ops.gdn2.chunk", **chunk),
        fused_recurrent=make_module(monkeypatch, "fla.ops.gdn2.fused_recurrent", **recurrent),
        layers=make_module(monkeypatch, "fla.layers.gdn2", **functions),
        user=make_module(monkeypatch, "somebody", attention=functions["chunk_gdn2"], other=print),
    )


def everywhere(package) -> dict[str, list]:
    """What every module has of the two functions, by name."""
    return {
        "chunk_gdn2": [
            package.ops.chunk_gdn2,
            package.chunk.chunk_gdn2,
            package.layers.chunk_gdn2,
            package.user.attention,
        ],
        "fused_recurrent_gdn2": [
            package.ops.fused_recurrent_gdn2,
            package.fused_recurrent.fused_recurrent_gdn2,
            package.layers.fused_recurrent_gdn2,
        ],
    }


def assert_untouched(package) -> None:
    for name, found in everywhere(package).items():
        assert all(function is package.functions[name] for function in found)
    assert package.user.other is print


@pytest.fixture
def supported(monkeypatch):
    """`supports` says yes to what it has checked, and what was meant for the kernels runs on the torch
    backend. The names of the functions called, one entry a call.
    """
    supports, calls = ops.supports, []

    def says_yes(*args, **kwargs):
        supports(*args, **kwargs)
        return True, ""

    def on_torch(function):
        @functools.wraps(function)
        def call(*args, backend, **kwargs):
            assert backend == "cuda"
            calls.append(function.__name__)
            return function(*args, backend="torch", **kwargs)

        return call

    monkeypatch.setattr(ops, "supports", says_yes)
    for name in NAMES:
        monkeypatch.setattr(ops, name, on_torch(getattr(ops, name)))
    return calls


@pytest.fixture
def unsupported(monkeypatch):
    """`supports` says no, for the reason in `why`."""
    answer = SimpleNamespace(why="the kernels take K up to 128, and K is 192")
    monkeypatch.setattr(ops, "supports", lambda *_, **__: (False, answer.why))
    return answer


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    return caplog


def make_inputs(seed: int, **shape) -> cases.Inputs:
    return cases.make_inputs("slow", **{**SHAPE, **shape}, seed=seed)


# ------------------------------------------------------------------------------------------------------------
# Calls that are rerouted
# ------------------------------------------------------------------------------------------------------------


@every_function
def test_every_module_that_has_the_function_calls_this_package(package, supported, name, seed):
    inputs = make_inputs(seed)
    expected, _ = getattr(gdn2_ext, name)(*inputs.tensors, backend="torch")
    with fla.enabled():
        for function in everywhere(package)[name]:
            o, final_state = function(*inputs.tensors)
            compare.assert_bitwise_equal(o, expected, "o")
            assert final_state is None
        assert package.user.other is print
    assert supported == [name] * len(everywhere(package)[name])
    assert package.calls == []
    assert_untouched(package)


@every_function
def test_arguments_arrive_by_position_and_by_name(package, supported, name, seed):
    inputs = make_inputs(seed)
    state = torch.randn(2, 2, 16, 32, generator=torch.Generator().manual_seed(seed))
    options = {"scale": 0.5, "initial_state": state, "output_final_state": True}
    expected = getattr(gdn2_ext, name)(*inputs.tensors, **options, backend="torch")
    position = (None, None) if name == "fused_recurrent_gdn2" else ()  # A_log and dt_bias come first there
    with fla.enabled():
        function = getattr(package.ops, name)
        results = [
            function(*inputs.tensors, *position, 0.5, state, True),
            function(*inputs.tensors, **options),
            function(**dict(zip("qkvgbw", inputs.tensors)), **options),
        ]
    for o, final_state in results:
        compare.assert_bitwise_equal(o, expected[0], "o")
        compare.assert_bitwise_equal(final_state, expected[1], "final state")
    assert supported == [name] * 3


@every_function
def test_the_decay_gates_parameters_arrive(package, supported, name, seed):
    inputs = cases.raw_inputs(**SHAPE, seed=seed)
    options = {"use_gate_in_kernel": True, "A_log": inputs.A_log, "dt_bias": inputs.dt_bias}
    expected, _ = getattr(gdn2_ext, name)(*inputs.tensors, **options, backend="torch")
    with fla.enabled():
        o, _ = getattr(package.layers, name)(*inputs.tensors, **options)
    compare.assert_bitwise_equal(o, expected, "o")
    assert supported == [name]


def test_gradients_are_those_of_this_package(package, supported, seed):
    inputs = make_inputs(seed)
    leaves = [x.requires_grad_() for x in inputs.tensors]
    o, _ = gdn2_ext.chunk_gdn2(*leaves, backend="torch")
    expected = torch.autograd.grad(o, leaves, inputs.do)
    with fla.enabled():
        o, _ = package.layers.chunk_gdn2(*leaves)
    actual = torch.autograd.grad(o, leaves, inputs.do)  # after disable() just as well
    for name, x, y in zip("qkvgbw", actual, expected, strict=True):
        compare.assert_bitwise_equal(x, y, f"d{name}")
    assert supported == ["chunk_gdn2"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"cp_context": None},
        {"unheard_of": None},
        {"safe_gate": True, "disable_recompute": True},
        {"return_intermediate_states": False},
        {"output_final_state": None, "use_qk_l2norm_in_kernel": None},
        {"chunk_size": 64, "erase_scale": 1.0, "backend": "auto", "sequence_split": None},
    ],
    ids=" ".join,
)
def test_arguments_that_change_nothing_are_no_reason(package, supported, harmless, seed):
    with fla.enabled():
        package.layers.chunk_gdn2(*make_inputs(seed).tensors, **harmless)
    assert supported == ["chunk_gdn2"]


@every_function
def test_the_function_looks_like_the_one_it_replaces(package, name):
    theirs = package.functions[name]
    with fla.enabled():
        ours = getattr(package.ops, name)
        assert ours is not theirs
        assert (ours.__name__, ours.__doc__) == (name, "FLA's.")
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert not hasattr(ours, "_torchdynamo_disable"), "torch.compile would leave it out"


@every_function
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_compiler_traces_through(package, supported, name, dynamic, seed):
    torch._dynamo.reset()
    inputs = make_inputs(seed)
    differentiable = name == "chunk_gdn2"
    leaves = [x.requires_grad_(differentiable) for x in inputs.tensors]
    expected, _ = getattr(gdn2_ext, name)(*leaves, backend="torch")

    def step(*tensors):
        return getattr(package.layers, name)(*tensors, cp_context=None)[0]

    with fla.enabled():
        o = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
    compare.assert_bitwise_equal(o, expected, "o")
    if differentiable:
        gradients = (torch.autograd.grad(x, leaves, inputs.do) for x in (o, expected))
        for tensor, x, y in zip("qkvgbw", *gradients, strict=True):
            compare.assert_bitwise_equal(x, y, f"d{tensor}")
    assert package.calls == []


# ------------------------------------------------------------------------------------------------------------
# Calls that are left alone
# ------------------------------------------------------------------------------------------------------------


@every_function
def test_what_supports_refuses_goes_to_fla_as_it_came(package, unsupported, log, name, seed):
    inputs = make_inputs(seed)
    with fla.enabled():
        result = getattr(package.layers, name)(*inputs.tensors, scale=0.5, novelty="yes")
        assert result == ("fla", name)
        assert getattr(package.layers, name)(*inputs.tensors) == ("fla", name)
    (_, args, kwargs), _ = package.calls
    assert all(x is y for x, y in zip(args, inputs.tensors, strict=True))
    assert kwargs == {"scale": 0.5, "novelty": "yes"}
    assert log.messages[1] == f"{name} goes to flash-linear-attention: {unsupported.why}"


def test_without_kernels_or_on_the_cpu_every_call_goes_to_fla(package, log, seed):
    """`supports` itself, for tensors that lie on the CPU."""
    tokens = make_inputs(seed).tensors
    with fla.enabled():
        assert package.layers.chunk_gdn2(*tokens) == ("fla", "chunk_gdn2")
    assert log.messages == [f"chunk_gdn2 goes to flash-linear-attention: {gdn2_ext.supports(*tokens)[1]}"]


def test_a_reason_is_logged_once_a_function_and_at_info(package, unsupported, log, seed):
    tokens = make_inputs(seed).tensors
    for why in ("K is 192", "K is 256", "K is 192"):
        unsupported.why = why
        for _ in range(3):
            with fla.enabled():  # turning it off and on again is no reason to say it again
                package.layers.chunk_gdn2(*tokens)
    with fla.enabled():
        package.layers.fused_recurrent_gdn2(*tokens)
    to_fla = "goes to flash-linear-attention"
    assert log.record_tuples == [
        (LOGGER, logging.INFO, f"chunk_gdn2 {to_fla}: K is 192"),
        (LOGGER, logging.INFO, f"chunk_gdn2 {to_fla}: K is 256"),
        (LOGGER, logging.INFO, f"fused_recurrent_gdn2 {to_fla}: K is 192"),
    ]
    assert len(package.calls) == 10


def test_a_reason_nobody_could_hear_is_logged_later(package, unsupported, caplog, seed):
    tokens = make_inputs(seed).tensors
    with fla.enabled():
        caplog.set_level(logging.WARNING, LOGGER)
        package.layers.chunk_gdn2(*tokens)
        assert caplog.messages == []
        caplog.set_level(logging.INFO, LOGGER)
        package.layers.chunk_gdn2(*tokens)
    assert len(caplog.messages) == 1


NOT_SHARED = "its argument {} is not one that gdn2_ext and flash-linear-attention share"
STATE = torch.zeros(1)


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("chunk_gdn2", {"cp_context": object()}, NOT_SHARED.format("cp_context")),
        ("chunk_gdn2", {"unheard_of": 1}, NOT_SHARED.format("unheard_of")),
        ("chunk_gdn2", {"unheard_of": STATE}, NOT_SHARED.format("unheard_of")),
        ("chunk_gdn2", {"chunk_size": 32}, NOT_SHARED.format("chunk_size")),
        # Known here and not there: FLA's answer to it may be another.
        ("chunk_gdn2", {"use_gate_sigmoid_in_kernel": True}, NOT_SHARED.format("use_gate_sigmoid_in_kernel")),
        ("fused_recurrent_gdn2", {"safe_gate": True}, NOT_SHARED.format("safe_gate")),
        ("fused_recurrent_gdn2", {"state_indices": STATE}, NOT_SHARED.format("state_indices")),
        ("chunk_gdn2", {"return_intermediate_states": True}, "states of another form"),
        # Refused by the checks of this package.
        ("chunk_gdn2", {"initial_state": STATE}, "initial_state: expected 4 dimensions"),
        ("fused_recurrent_gdn2", {"initial_state": STATE}, "initial_state: expected 4 dimensions"),
        ("chunk_gdn2", {"A_log": STATE}, "A_log: expected None without use_gate_in_kernel"),
        ("chunk_gdn2", {"g": STATE}, "g: expected 4 dimensions"),
        ("chunk_gdn2", {"v": None}, "v: expected a torch.Tensor"),
        ("chunk_gdn2", {"scale": "large"}, "scale: expected a number"),
    ],
)
def test_other_reasons_to_leave_a_call_alone(package, supported, log, name, options, reason, seed):
    arguments = {**dict(zip("qkvgbw", make_inputs(seed).tensors)), **options}
    with fla.enabled():
        for _ in range(2):
            assert getattr(package.layers, name)(**arguments) == ("fla", name)
    assert [call[2].keys() for call in package.calls] == [arguments.keys()] * 2
    assert all(package.calls[0][2][key] is value for key, value in arguments.items())
    assert len(log.messages) == 1 and reason in log.messages[0]


def test_calls_that_fit_no_signature_raise_what_fla_raises(package, supported, log, seed):
    q, *others = make_inputs(seed).tensors
    with fla.enabled():
        for args, kwargs in (((q,), {}), ((q, *others), {"q": q}), ((q,) * 30, {})):
            assert package.ops.chunk_gdn2(*args, **kwargs) == ("fla", "chunk_gdn2")
    assert supported == [] and len(package.calls) == 3
    assert log.messages == [
        "chunk_gdn2 goes to flash-linear-attention: its arguments do not fit its signature"
    ]


def test_the_recurrent_function_with_gradients_is_left_alone(package, supported, log, seed):
    q, *others = make_inputs(seed).tensors
    q.requires_grad_()
    with fla.enabled():
        assert package.ops.fused_recurrent_gdn2(q, *others) == ("fla", "fused_recurrent_gdn2")
        with torch.no_grad():
            assert package.ops.fused_recurrent_gdn2(q, *others)[0] != "fla"
    assert supported == ["fused_recurrent_gdn2"]
    assert "requires a gradient" in log.messages[0]


def test_errors_that_differ_in_sizes_alone_are_logged_once(package, supported, log, seed):
    with fla.enabled():
        for seqlen in (70, 71, 72):
            tokens = make_inputs(seed, seqlen=seqlen).tensors
            assert package.ops.chunk_gdn2(*tokens, initial_state=torch.zeros(seqlen)) == ("fla", "chunk_gdn2")
    assert len(log.messages) == 1


def test_errors_of_a_running_kernel_are_not_hidden(package, supported, monkeypatch, seed):
    @functools.wraps(ops.chunk_gdn2)
    def fails(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ops, "chunk_gdn2", fails)
    with fla.enabled(), pytest.raises(RuntimeError, match="illegal memory access"):
        package.ops.chunk_gdn2(*make_inputs(seed).tensors)
    assert package.calls == []


@pytest.mark.parametrize("options", [{}, {"cp_context": 1}, {"initial_state": STATE}], ids=" ".join)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_goes_to_fla_too(package, log, monkeypatch, options, dynamic, seed):
    torch._dynamo.reset()

    @torch.compiler.disable
    def theirs(q, k, v, g, b, w, scale=None, initial_state=None, cp_context=None, **kwargs):
        return q * 2, None

    monkeypatch.setattr(package.ops, "chunk_gdn2", theirs)
    tokens = make_inputs(seed).tensors

    def step(*tensors):
        return package.ops.chunk_gdn2(*tensors, **options)[0]

    with fla.enabled():
        compiled = torch.compile(step, backend="aot_eager", dynamic=dynamic)
        for _ in range(3):
            compare.assert_bitwise_equal(compiled(*tokens), tokens[0] * 2, "o")
    assert len(log.messages) == 1


# ------------------------------------------------------------------------------------------------------------
# Switching it on and off
# ------------------------------------------------------------------------------------------------------------


def test_enabling_twice_is_harmless(package, supported, seed):
    fla.enable()
    once = everywhere(package)
    fla.enable()
    assert everywhere(package) == once and fla.is_enabled()
    package.layers.chunk_gdn2(*make_inputs(seed).tensors)
    assert supported == ["chunk_gdn2"]
    fla.disable()
    assert_untouched(package)
    assert not fla.is_enabled()


def test_disabling_what_is_not_enabled_is_harmless(package):
    fla.disable()
    assert_untouched(package)


def test_modules_that_imported_the_stand_in_get_the_function_back(package, monkeypatch):
    fla.enable()
    late = make_module(monkeypatch, "late", chunk_gdn2=package.ops.chunk_gdn2, again=package.ops.chunk_gdn2)
    assert late.chunk_gdn2 is not package.functions["chunk_gdn2"]
    fla.disable()
    assert late.chunk_gdn2 is late.again is package.functions["chunk_gdn2"]


def test_modules_that_are_no_longer_loaded_get_the_function_back(package, monkeypatch):
    fla.enable()
    monkeypatch.delitem(sys.modules, "somebody")
    fla.disable()
    assert_untouched(package)


def test_references_in_no_module_go_to_fla_after_disabling(package, supported, seed):
    tokens = make_inputs(seed).tensors
    fla.enable()
    held = functools.partial(package.ops.chunk_gdn2, *tokens)
    assert held()[0] != "fla"
    fla.disable()
    assert held() == ("fla", "chunk_gdn2")
    fla.enable()
    assert held()[0] != "fla"
    assert held.func is package.ops.chunk_gdn2


def test_what_somebody_else_put_there_stays(package):
    def before(*_, **__):
        return "before"

    def after(*_, **__):
        return "after"

    package.layers.chunk_gdn2 = before
    fla.enable()
    assert package.layers.chunk_gdn2 is before
    package.user.attention = after
    fla.disable()
    assert package.layers.chunk_gdn2 is before and package.user.attention is after
    assert package.ops.chunk_gdn2 is package.functions["chunk_gdn2"]


def test_members_of_sys_modules_that_are_no_modules_are_passed_over(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "nothing", None)
    monkeypatch.setitem(sys.modules, "slotted", 7)
    with fla.enabled():
        assert package.layers.chunk_gdn2 is not package.functions["chunk_gdn2"]
    assert_untouched(package)


def test_contexts_nest(package):
    with fla.enabled():
        with fla.enabled():
            assert fla.is_enabled()
        assert fla.is_enabled()
        assert package.layers.chunk_gdn2 is not package.functions["chunk_gdn2"]
    assert_untouched(package)


def test_a_context_restores_what_was_before(package):
    fla.enable()
    with fla.enabled():
        fla.disable()
        assert_untouched(package)
    assert fla.is_enabled(), "as on entering"
    assert package.layers.chunk_gdn2 is package.ops.chunk_gdn2 is not package.functions["chunk_gdn2"]
    fla.disable()
    assert_untouched(package)


def test_a_context_ends_with_an_exception_too(package):
    with pytest.raises(KeyError), fla.enabled():
        raise KeyError
    assert_untouched(package)


def test_threads_may_switch_at_the_same_time(package):
    def switch():
        for _ in range(20):
            fla.enable()
            fla.disable()

    threads = [threading.Thread(target=switch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not fla.is_enabled()
    assert_untouched(package)


# ------------------------------------------------------------------------------------------------------------
# No FLA, or another one
# ------------------------------------------------------------------------------------------------------------


def test_without_fla_the_error_says_what_to_install(monkeypatch):
    class NothingToFind:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "fla":
                raise ModuleNotFoundError("No module named 'fla'", name="fla")

    remove_fla(monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [NothingToFind, *sys.meta_path])
    with pytest.raises(ImportError, match="is not installed .*pip install flash-linear-attention"):
        fla.enable()
    with pytest.raises(ImportError), fla.enabled():
        pass
    assert not fla.is_enabled()


def test_an_fla_without_gdn2_is_named(monkeypatch):
    remove_fla(monkeypatch)
    make_module(monkeypatch, "fla", __version__="0.3.2", __path__=[])
    make_module(monkeypatch, "fla.ops", __path__=[])
    with pytest.raises(ImportError, match=r"flash-linear-attention 0\.3\.2 has no fla\.ops\.gdn2"):
        fla.enable()
    assert not fla.is_enabled()


def begins_otherwise(q, k, v, beta, **kwargs):
    pass


def has_another_default(q, k, v, g, b, w, A_log=None, scale=1.0, **kwargs):
    pass


@pytest.mark.parametrize(
    "replacement, why",
    [
        (None, "fused_recurrent_gdn2 does not exist"),
        (begins_otherwise, "begins with q, k, v, beta, not q, k, v, g, b, w"),
        (has_another_default, r"has scale = 1\.0 by default, not None"),
    ],
)
def test_functions_that_are_not_known_are_not_replaced(package, replacement, why):
    package.ops.fused_recurrent_gdn2 = replacement
    with pytest.raises(RuntimeError, match=rf"flash-linear-attention 0\.6\.0 is not a version.*{why}"):
        fla.enable()
    assert not fla.is_enabled()
    package.ops.fused_recurrent_gdn2 = package.functions["fused_recurrent_gdn2"]
    assert_untouched(package)


# ------------------------------------------------------------------------------------------------------------
# The installed package
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed():
    return pytest.importorskip(
        "fla.ops.gdn2", reason="flash-linear-attention is not installed", exc_type=ImportError
    )


@every_function
def test_the_installed_functions_have_the_signatures_of_these_tests(installed, name):
    actual = inspect.signature(getattr(installed, name)).parameters.values()
    expected = inspect.signature(make_functions([])[name]).parameters.values()
    assert [(p.name, p.kind, p.default) for p in actual] == [(p.name, p.kind, p.default) for p in expected]


def test_the_installed_functions_are_replaced_and_put_back(installed):
    layers = pytest.importorskip("fla.layers.gdn2", exc_type=ImportError)
    modules = [installed, layers, sys.modules["fla.ops.gdn2.chunk"]]
    before = [dict(vars(module)) for module in modules]
    with fla.enabled():
        for module in modules:
            assert module.chunk_gdn2.__module__ == "fla.ops.gdn2.chunk"
            assert module.chunk_gdn2 is not before[0]["chunk_gdn2"]
            assert module.chunk_gdn2 is installed.chunk_gdn2
        assert layers.fused_recurrent_gdn2 is installed.fused_recurrent_gdn2
        assert layers.fused_recurrent_gdn2 is not before[0]["fused_recurrent_gdn2"]
    for module, members in zip(modules, before):
        assert vars(module).keys() == members.keys()
        assert all(vars(module)[name] is value for name, value in members.items())


@pytest.fixture
def theirs(installed, monkeypatch) -> list[str]:
    """The names of FLA's own functions that get called, one entry a call."""
    calls = []

    def counted(function):
        @functools.wraps(function, updated=())
        def call(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    for name in NAMES:
        function = getattr(installed, name)
        replacement = counted(function)
        for module in [module for key, module in sys.modules.items() if key.startswith("fla.")]:
            if vars(module).get(name) is function:
                monkeypatch.setattr(module, name, replacement)
    return calls


@pytest.fixture
def own(monkeypatch) -> list[str]:
    """The names of this package's functions that get called, once each: torch.compile guards on the list."""
    calls = []

    def counted(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if function.__name__ not in calls:
                calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    for name in NAMES:
        monkeypatch.setattr(ops, name, counted(getattr(ops, name)))
    return calls


def leaves_of(inputs: cases.Inputs) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() for x in inputs.tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_a_rerouted_call_is_this_packages_to_the_bit(hopper, installed, theirs, dim, seed):
    inputs = hopper.inputs("layer_init", batch=2, seqlen=200, heads=2, dim_k=dim, dim_v=dim, seed=seed)
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    leaves = leaves_of(inputs)
    expected = gdn2_ext.chunk_gdn2(*leaves, **options, backend="cuda")
    with fla.enabled():
        actual = installed.chunk_gdn2(*leaves, **options)
        with torch.no_grad():
            token_by_token = installed.fused_recurrent_gdn2(*leaves, **options)
    assert theirs == []
    for name, x, y in zip(("o", "final state"), actual, expected, strict=True):
        compare.assert_bitwise_equal(x, y, name)
    gradients = (torch.autograd.grad(o, leaves, inputs.do) for o, _ in (actual, expected))
    for name, x, y in zip("qkvgbw", *gradients, strict=True):
        compare.assert_bitwise_equal(x, y, f"d{name}")
    again = gdn2_ext.fused_recurrent_gdn2(*inputs.tensors, **options, backend="cuda")
    for name, x, y in zip(("o", "final state"), token_by_token, again, strict=True):
        compare.assert_bitwise_equal(x, y, f"{name}, token by token")


@pytest.mark.gpu
@pytest.mark.usefixtures("quick_triton")
def test_a_call_that_the_kernels_do_not_take_runs_in_fla(hopper, installed, theirs, own, log, seed):
    inputs = hopper.inputs("layer_init", seqlen=200, heads=2, dim_k=192, dim_v=64, seed=seed)
    reason = gdn2_ext.supports(*inputs.tensors)[1]
    assert "K up to 128" in reason
    with torch.no_grad(), fla.enabled():
        o, _ = installed.chunk_gdn2(*inputs.tensors)
    assert theirs == ["chunk_gdn2"] and own == []
    messages = [message for logger, _, message in log.record_tuples if logger == LOGGER]
    assert messages == [f"chunk_gdn2 goes to flash-linear-attention: {reason}"]
    expected, _ = gdn2_ext.chunk_gdn2(*(x.float() for x in inputs.tensors), backend="torch")
    compare.assert_close(o, expected.double(), 2e-2, "o")


def make_layer(hopper, seed: int):
    layers = pytest.importorskip("fla.layers", exc_type=ImportError)
    torch.manual_seed(seed)
    layer = layers.GatedDeltaNet2(128, head_dim=64, num_heads=2, layer_idx=0)
    x = hopper.normal(2, 100, 128, seed=seed, dtype=hopper.dtype)
    return layer.to(hopper.device, hopper.dtype), x


@pytest.mark.gpu
@pytest.mark.usefixtures("quick_triton")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flas_layer_trains_on_these_kernels(hopper, installed, theirs, own, compiled, seed):
    torch._dynamo.reset()
    layer, x = make_layer(hopper, seed)
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    expected = layer(x)[0].detach()
    assert theirs == ["chunk_gdn2"] and own == []
    losses = []
    with fla.enabled():
        for step in range(10):
            o = call(x)[0]
            if step == 0:
                compare.assert_close(o.detach(), expected.double(), 3e-2, "o")
            loss = (o.float() - 1).square().mean()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert theirs == own == ["chunk_gdn2"]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.usefixtures("quick_triton")
def test_flas_layer_decodes_on_these_kernels(hopper, installed, theirs, own, seed):
    layer, x = make_layer(hopper, seed)
    layer.eval()
    with torch.no_grad():
        expected = layer(x[:, :20])[0]
        with fla.enabled():
            o = layer(x[:, :20])[0]
    assert theirs == own == ["fused_recurrent_gdn2"]
    compare.assert_close(o, expected.double(), 3e-2, "o")
