"""The op as a node of autograd: what is saved, what is computed, what raises, what repeats bit for bit."""

import cases
import compare
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gdn2_ext import chunk_gdn2, fused_recurrent_gdn2

SHAPE = {"batch": 2, "seqlen": 100, "heads": 2, "value_heads": 4, "dim_k": 32, "dim_v": 32}
DIFFERENTIABLE = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state")


class Leaves:
    """Raw inputs as leaves that require gradients, and a call with everything in the kernel."""

    def __init__(self, backend, seed: int, requires_grad=DIFFERENTIABLE):
        inputs = backend.raw_inputs(**SHAPE, seed=seed)
        initial_state, self.d_final_state = backend.states(inputs, seed=seed)
        tensors = (*inputs.tensors, inputs.A_log, inputs.dt_bias, initial_state)
        self.backend, self.do, self.inputs = backend, inputs.do, inputs
        self.named = {
            name: x.detach().requires_grad_(name in requires_grad)
            for name, x in zip(DIFFERENTIABLE, tensors, strict=True)
        }

    def __call__(self, q, k, v, g, b, w, A_log, dt_bias, initial_state, **options):
        return chunk_gdn2(
            q, k, v, g, b, w, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state,
            output_final_state=True, **cases.EVERYTHING, **options, backend=self.backend.name,
        )  # fmt: skip

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self.named.values())

    def gradients(self) -> dict[str, torch.Tensor | None]:
        return {name: x.grad for name, x in self.named.items()}

    def clear(self) -> None:
        for x in self.tensors:
            x.grad = None

    def expected(self) -> dict:
        """The reference's gradients, by the name of the input."""
        options = {
            "initial_state": self.named["initial_state"],
            "d_final_state": self.d_final_state,
            **cases.EVERYTHING,
        }
        return self.backend.expected(self.inputs, **options)

    def check(self, gradients: dict, expected: dict) -> None:
        """Gradients by the name of the input against the reference's."""
        names = {"dt_bias": "d_dt_bias", "initial_state": "d_initial_state"}
        self.backend.check({names.get(name, f"d{name}"): x for name, x in gradients.items()}, expected)


@pytest.fixture
def leaves(backend, seed) -> Leaves:
    return Leaves(backend, seed)


def assert_same(actual: dict, expected: dict) -> None:
    for name, x in expected.items():
        compare.assert_bitwise_equal(actual[name], x, f"gradient of {name}")


# -- which gradients -----------------------------------------------------------------------------------------


def test_backward_accumulates_in_the_leaves(leaves):
    for _ in range(2):
        o, final_state = leaves(*leaves.tensors)
        torch.autograd.backward([o, final_state], [leaves.do, leaves.d_final_state])
    leaves.check({name: x / 2 for name, x in leaves.gradients().items()}, leaves.expected())


class NeededSpy(TorchDispatchMode):
    """Notes which gradients the backward operator was asked for, and how large the answers are."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.gdn2_ext.chunk_backward.default:
            needed = next(
                x for x in args if isinstance(x, (list, tuple)) and all(isinstance(y, bool) for y in x)
            )
            self.calls.append((list(needed), [x.numel() for x in result]))
        return result


@pytest.mark.parametrize(
    "wanted", [*((name,) for name in DIFFERENTIABLE), ("q", "initial_state"), DIFFERENTIABLE]
)
def test_gradients_that_nobody_asked_for_are_not_computed(backend, wanted, seed):
    leaves = Leaves(backend, seed, requires_grad=wanted)
    with NeededSpy() as spy:
        o, final_state = leaves(*leaves.tensors)
        torch.autograd.backward([o, final_state], [leaves.do, leaves.d_final_state])
    [(needed, sizes)] = spy.calls
    assert needed == [name in wanted for name in DIFFERENTIABLE]
    assert [size > 0 for size in sizes] == needed
    assert [name for name, x in leaves.gradients().items() if x is not None] == list(wanted)
    all_leaves = Leaves(backend, seed)
    torch.autograd.backward(all_leaves(*all_leaves.tensors), [leaves.do, leaves.d_final_state])
    assert_same(leaves.gradients(), {name: all_leaves.named[name].grad for name in wanted})


def test_autograd_grad_of_some_inputs(leaves):
    """All leaves require gradients, but only two are differentiated."""
    names = ("k", "A_log")
    outputs = leaves(*leaves.tensors)
    gradients = torch.autograd.grad(
        outputs, [leaves.named[name] for name in names], [leaves.do, leaves.d_final_state]
    )
    leaves.check(dict(zip(names, gradients, strict=True)), leaves.expected())


def test_a_loss_of_the_final_state_alone(backend, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    leaves = [x.detach().requires_grad_() for x in (*inputs.tensors, initial_state)]
    _, final_state = chunk_gdn2(
        *leaves[:6], initial_state=leaves[6], output_final_state=True, backend=backend.name
    )
    gradients = torch.autograd.grad(final_state, leaves, d_final_state)
    inputs.do = torch.zeros_like(inputs.do)
    expected = backend.expected(inputs, initial_state=initial_state, d_final_state=d_final_state)
    names = ("dq", "dk", "dv", "dg", "db", "dw", "d_initial_state")
    backend.check(dict(zip(names, gradients, strict=True)), expected)
    assert not gradients[0].any(), "q does not reach the final state"


def test_a_loss_of_the_output_alone_leaves_the_state_out(leaves):
    o, _ = leaves(*leaves.tensors)
    o.backward(leaves.do)
    actual = leaves.gradients()
    leaves.d_final_state = torch.zeros_like(leaves.d_final_state)
    leaves.check(actual, leaves.expected())


def test_the_final_state_is_differentiable_only_as_an_output(backend, seed):
    """Without output_final_state there is none, and o has its gradients all the same."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    q = inputs.q.requires_grad_()
    o, nothing = chunk_gdn2(*inputs.tensors, backend=backend.name)
    assert nothing is None
    (dq,) = torch.autograd.grad(o, q, inputs.do)
    backend.check({"dq": dq}, backend.expected(inputs))


def test_a_loss_that_needs_no_gradient_of_the_op_runs_no_backward(leaves):
    with NeededSpy() as spy:
        o, _ = leaves(*leaves.tensors)
        x = torch.ones(3, device=o.device, requires_grad=True)
        (x.sum() + o.detach().float().sum()).backward()
    assert not spy.calls
    assert all(x is None for x in leaves.gradients().values())


# -- what is kept --------------------------------------------------------------------------------------------


def test_between_forward_and_backward_the_inputs_and_one_more_tensor_are_kept(leaves):
    """A - I and P of every chunk and head, 64 x 64 or ten blocks of 16 x 16 each, and of the kernels norms of
    the rows of q and k; no state: those are computed again.
    """
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        leaves(*leaves.tensors)
    inputs = {x.data_ptr() for x in leaves.tensors}
    others = [x for x in kept if x.data_ptr() not in inputs]
    chunks = 2 * SHAPE["batch"]
    # As many floats as elements of A - I or P.
    shape = (chunks * 2 * (2560 + 2 * 64),) if leaves.backend.name == "cuda" else (2, chunks, 2, 64, 64)
    assert [tuple(x.shape) for x in others] == [shape]
    assert len(kept) - len(others) == len(DIFFERENTIABLE)


def test_without_gradients_nothing_is_kept(leaves):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.no_grad():
            o, final_state = leaves(*leaves.tensors)
        detached, _ = leaves(*(x.detach() for x in leaves.tensors))
    assert not kept
    assert not (o.requires_grad or final_state.requires_grad or detached.requires_grad)


def test_inference_mode_gives_the_same_output(leaves):
    o, final_state = leaves(*leaves.tensors)
    with torch.inference_mode():
        inferred, inferred_state = leaves(*leaves.tensors)
    compare.assert_bitwise_equal(inferred, o, "o")
    compare.assert_bitwise_equal(inferred_state, final_state, "S")


# -- again and again -----------------------------------------------------------------------------------------


def test_two_runs_agree_bit_for_bit(backend, seed):
    inputs = backend.raw_inputs(batch=2, seqlen=200, heads=2, value_heads=4, dim_k=64, dim_v=64, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    options = {"initial_state": initial_state, "d_final_state": d_final_state, **cases.EVERYTHING}
    runs = [backend.run(inputs, **options, poisoned=False) for _ in range(3)]
    for again in runs[1:]:
        for name, x in runs[0].items():
            compare.assert_bitwise_equal(again[name], x, name)


def test_a_retained_graph_gives_the_same_gradients_twice(leaves):
    o, final_state = leaves(*leaves.tensors)
    outputs, incoming = [o, final_state], [leaves.do, leaves.d_final_state]
    first = torch.autograd.grad(outputs, leaves.tensors, incoming, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves.tensors, incoming)
    assert_same(dict(zip(DIFFERENTIABLE, second, strict=True)), dict(zip(DIFFERENTIABLE, first, strict=True)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(outputs, leaves.tensors, incoming)


def test_a_changed_input_is_noticed_before_the_backward(leaves):
    o, _ = leaves(*leaves.tensors)
    with torch.no_grad():
        leaves.named["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.backward(leaves.do)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(leaves, use_reentrant):
    o, final_state = leaves(*leaves.tensors)
    torch.autograd.backward([o, final_state], [leaves.do, leaves.d_final_state])
    expected = leaves.gradients()
    leaves.clear()
    o, final_state = checkpoint(leaves, *leaves.tensors, use_reentrant=use_reentrant)
    torch.autograd.backward([o, final_state], [leaves.do, leaves.d_final_state])
    assert_same(leaves.gradients(), expected)


def test_a_double_backward_says_that_there_is_none(leaves):
    o, _ = leaves(*leaves.tensors)
    (dk,) = torch.autograd.grad(o, leaves.named["k"], leaves.do, create_graph=True)
    with pytest.raises(RuntimeError, match="chunk_gdn2 has no second derivative"):
        dk.float().sum().backward()


def test_an_operator_called_without_saving_has_no_backward(backend, seed):
    """Only through torch.ops: chunk_gdn2 saves whenever an input requires a gradient."""
    inputs = backend.inputs(**SHAPE, seed=seed)
    inputs.q.requires_grad_()
    options = (0.25, False, False, None, False, 1.0, False)
    o, *_ = torch.ops.gdn2_ext.chunk_forward(
        *inputs.tensors, None, None, None, None, *options, True, None, False, False, 0, backend.name
    )
    with pytest.raises(RuntimeError, match="save_for_backward=False: it has no backward"):
        o.backward(inputs.do)


def test_a_final_state_that_was_not_asked_for_has_no_gradient(backend, seed):
    """The operator returns an empty tensor then, and a loss may include its sum."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    expected = backend.run(inputs, scale=0.25)
    inputs.q.requires_grad_()
    options = (0.25, False, False, None, False, 1.0, False)
    o, final_state, *_ = torch.ops.gdn2_ext.chunk_forward(
        *inputs.tensors, None, None, None, None, *options, False, None, True, False, 0, backend.name
    )
    assert final_state.numel() == 0
    (dq,) = torch.autograd.grad(
        [o, final_state.sum()], inputs.q, [inputs.do, torch.ones_like(final_state.sum())]
    )
    compare.assert_bitwise_equal(dq, expected["dq"], "dq")


def test_calls_in_a_chain_share_a_graph(backend, seed):
    """Two layers, the second fed with the output of the first, against each other's references."""
    inputs = backend.inputs("slow", **{**SHAPE, "value_heads": 2}, seed=seed)
    leaf = inputs.v.requires_grad_()
    first, _ = chunk_gdn2(*inputs.tensors, backend=backend.name)
    second_inputs = cases.Inputs(inputs.q, inputs.k, first, inputs.g, inputs.b, inputs.w, do=inputs.do)
    second, _ = chunk_gdn2(*second_inputs.tensors, backend=backend.name)
    (dv,) = torch.autograd.grad(second, leaf, inputs.do)
    d_first = torch.from_numpy(compare.to_float64(backend.expected(second_inputs)["dv"])).to(dv)
    expected = backend.expected(cases.Inputs(*inputs.tensors, do=d_first))["dv"]
    # The op is linear in v: the two layers' errors add up.
    compare.assert_close(dv, expected, 2 * backend.bar("dv"), "dv through two layers")


# -- autocast ------------------------------------------------------------------------------------------------


class InputSpy(TorchDispatchMode):
    """Notes the dtypes that the forward operator gets its tensors in."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.gdn2_ext.chunk_forward.default:
            self.dtypes += [x.dtype for x in args[:9]]
        return function(*args, **(kwargs or {}))


def autocast_inputs(backend, dtype: torch.dtype, seed: int) -> tuple[cases.Inputs, cases.Inputs]:
    """float32 inputs, and what autocast to dtype should make of them."""
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    inputs = cases.Inputs(
        *(x.float() for x in inputs.tensors), inputs.do.to(dtype), inputs.A_log, inputs.dt_bias
    )
    q, k, v, b, w = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.b, inputs.w))
    return inputs, cases.Inputs(q, k, v, inputs.g, b, w, inputs.do, inputs.A_log, inputs.dt_bias)


def test_autocast_casts_q_k_v_b_w_together_and_nothing_else(backend, seed):
    inputs, _ = autocast_inputs(backend, torch.bfloat16, seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    with torch.autocast(backend.device.type, torch.bfloat16), InputSpy() as spy:
        backend.run(inputs, initial_state=initial_state, **cases.EVERYTHING)
    names = dict(zip(DIFFERENTIABLE, spy.dtypes, strict=True))
    assert names == {name: torch.bfloat16 if name in "qkvbw" else torch.float32 for name in DIFFERENTIABLE}


@pytest.mark.parametrize("backward", ["inside autocast", "outside autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_the_call_on_rounded_tensors(backend, dtype, backward, seed):
    """Bit for bit: what the op computes in float32 stays there, and leaves get gradients of their dtype."""
    inputs, rounded = autocast_inputs(backend, dtype, seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    expected = backend.run(
        rounded, initial_state=initial_state, d_final_state=d_final_state, **cases.EVERYTHING
    )
    tensors = (*inputs.tensors, inputs.A_log, inputs.dt_bias, initial_state)
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.autocast(backend.device.type, dtype):
        o, final_state = chunk_gdn2(
            *leaves[:6], A_log=leaves[6], dt_bias=leaves[7], initial_state=leaves[8],
            output_final_state=True, **cases.EVERYTHING, backend=backend.name,
        )  # fmt: skip
    with torch.autocast(backend.device.type, dtype, enabled=backward == "inside autocast"):
        gradients = torch.autograd.grad([o, final_state], leaves, [inputs.do, d_final_state])
    names = ("dq", "dk", "dv", "dg", "db", "dw", "dA_log", "d_dt_bias", "d_initial_state")
    assert o.dtype == dtype
    compare.assert_bitwise_equal(o, expected["o"], "o")
    compare.assert_bitwise_equal(final_state, expected["S"], "S")
    for name, x in zip(names, gradients, strict=True):
        assert x.dtype == torch.float32, name
        compare.assert_bitwise_equal(x, expected[name].float(), name)


@pytest.mark.recurrent
def test_decoding_under_autocast_equals_the_call_on_rounded_tensors(backend, seed):
    inputs, rounded = autocast_inputs(backend, torch.bfloat16, seed)
    options = {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, **cases.EVERYTHING, "backend": backend.name}
    expected, expected_state = fused_recurrent_gdn2(*rounded.tensors, output_final_state=True, **options)
    with torch.autocast(backend.device.type, torch.bfloat16):
        o, final_state = fused_recurrent_gdn2(*inputs.tensors, output_final_state=True, **options)
    compare.assert_bitwise_equal(o, expected, "o")
    compare.assert_bitwise_equal(final_state, expected_state, "S")


def test_autocast_leaves_float64_alone(backend, seed):
    inputs = cases.make_inputs(
        "slow", **SHAPE, dtype=torch.float64, gate_dtype=torch.float64, device=backend.device, seed=seed
    )
    with torch.autocast(backend.device.type, torch.bfloat16):
        o, _ = chunk_gdn2(*inputs.tensors, backend="torch")
    assert o.dtype == torch.float64


def test_autocast_names_a_bad_input_all_the_same(backend):
    with (
        torch.autocast(backend.device.type, torch.bfloat16),
        pytest.raises(TypeError, match="^q: expected a torch.Tensor"),
    ):
        chunk_gdn2([1.0], None, None, None, None, None)


# -- against autograd ----------------------------------------------------------------------------------------


@pytest.mark.most_exact_dtype
def test_gradients_agree_with_finite_differences(backend, seed):
    """Independent of every analytic backward: torch's own check, on a small call with everything in it."""
    if backend.dtype != torch.float64:
        pytest.skip(f"finite differences need float64, the {backend.name} backend has {backend.dtype}")
    shape = {"batch": 1, "seqlen": 67, "heads": 1, "value_heads": 2, "dim_k": 2, "dim_v": 2}
    inputs = backend.raw_inputs(**shape, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    tensors = (*inputs.tensors, inputs.A_log, inputs.dt_bias, initial_state)
    leaves = [x.detach().requires_grad_() for x in tensors]

    def call(*x):
        return chunk_gdn2(
            *x[:6],
            A_log=x[6],
            dt_bias=x[7],
            initial_state=x[8],
            output_final_state=True,
            **cases.EVERYTHING,
            backend="torch",
        )

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
