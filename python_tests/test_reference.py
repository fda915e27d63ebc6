"""The float64 reference: against autograd, finite differences and the older rules it contains."""

from __future__ import annotations

import doctest
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import (
    BARS,
    LENGTHS,
    NEAR_PARALLEL_O_BAR,
    PACKED_LENGTHS,
    REGIMES,
    TENSORS,
    bar,
    make_inputs,
    near_parallel_keys,
    packed_offsets,
    raw_inputs,
)
from compare import assert_bitwise_equal, assert_close, relative_error

from gdn2_ext import reference

BAR = 1e-10  # relative L2 error between two float64 computations of the same thing
FINITE_DIFFERENCE_BAR = 1e-8
EXTREME_REGIMES = ("near_parallel", "erase2_with_extreme_decays")
GATE_HEADS = ("key", "value")


# ------------------------------------------------------------------------------------------------------------
# Problems in float64
# ------------------------------------------------------------------------------------------------------------

SMALL = {"batch": 2, "seqlen": 70, "heads": 2, "dim_k": 8, "dim_v": 6}


def small_inputs(regime: str, seed: int, **sizes) -> dict[str, np.ndarray]:
    """q, k, v, g, b, w and do of a regime as float64 NumPy arrays; raw with A_log and dt_bias for "raw"."""
    makers = {"raw": raw_inputs, "near_parallel": near_parallel_keys}
    options = {**SMALL, **sizes, "seed": seed, "dtype": torch.float64, "gate_dtype": torch.float64}
    if regime in makers:
        inputs = makers[regime](**options)
    else:
        inputs = make_inputs(regime.removesuffix("_with_extreme_decays"), **options)
    arrays = {name: x.double().numpy() for name, x in vars(inputs).items() if x is not None}
    if regime.endswith("_with_extreme_decays"):
        make_some_decays_extreme(arrays["g"], np.random.default_rng(seed))
    return arrays


def make_some_decays_extreme(g: np.ndarray, rng: np.random.Generator) -> None:
    """A fifth of the entries become -300 or -inf, and so do all channels of some tokens; in place."""
    g[rng.random(g.shape) < 0.1] = -300.0
    g[rng.random(g.shape) < 0.1] = -np.inf
    for token in (0, 5, 15, 16, 63, 64):  # the ends of chunks of 16 and 64 among them
        if token < g.shape[1]:
            g[:, token, 0] = rng.choice([-300.0, -np.inf])


def random_states(
    arrays: dict[str, np.ndarray], seed: int, count: int | None = None
) -> dict[str, np.ndarray]:
    """An initial state and the gradient of the final one, [count, HV, K, V]."""
    rng = np.random.default_rng(seed)
    batch, _, value_heads, dim_v = arrays["v"].shape
    shape = (batch if count is None else count, value_heads, arrays["k"].shape[3], dim_v)
    return {name: rng.standard_normal(shape) for name in ("initial_state", "d_final_state")}


def core(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The positional arguments q, k, v, g, b, w."""
    return [arrays[name] for name in ("q", "k", "v", "g", "b", "w")]


# ------------------------------------------------------------------------------------------------------------
# The recurrence in torch, for autograd
# ------------------------------------------------------------------------------------------------------------


def torch_activations(q, k, g, b, w, options):
    heads, groups = q.shape[2], g.shape[2] // q.shape[2]
    if options.get("use_qk_l2norm_in_kernel"):
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if options.get("use_gate_in_kernel"):
        A_log, dt_bias, lower_bound = (options.get(name) for name in ("A_log", "dt_bias", "lower_bound"))
        a = torch.ones(heads, dtype=g.dtype) if A_log is None else A_log.exp()
        a = a.repeat_interleave(groups)[:, None]
        if dt_bias is not None:
            g = g + dt_bias.view(heads, -1).repeat_interleave(groups, dim=0)
        if lower_bound is None:
            g = -a * torch.nn.functional.softplus(g)
        else:
            g = lower_bound * torch.sigmoid(a * g)
    if options.get("use_gate_sigmoid_in_kernel"):
        b, w = options.get("erase_scale", 1.0) * torch.sigmoid(b), torch.sigmoid(w)
    return q, k, g, b, w


def torch_recurrence(q, k, v, g, b, w, initial_state=None, cu_seqlens=None, scale=None, **options):
    """o and final_state, one operation after the other as in the definition of the recurrence."""
    q, k, g, b, w = torch_activations(q, k, g, b, w, options)
    batch, seqlen, value_heads, dim_v = v.shape
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if initial_state is None:
        count = batch if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = v.new_zeros(count, value_heads, q.shape[3], dim_v)
    q, k, g, b = (x.repeat_interleave(value_heads // x.shape[2], dim=2) for x in (q, k, g, b))

    def run(start, end, S):
        outputs = []
        for t in range(start, end):
            S = S * g[:, t].exp().unsqueeze(-1)
            read = torch.einsum("bhkv,bhk->bhv", S, b[:, t] * k[:, t])
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], w[:, t] * v[:, t] - read)
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
        return torch.stack(outputs, dim=1) if outputs else v[:, :0], S

    if cu_seqlens is None:
        return run(0, seqlen, initial_state)
    runs = [
        run(int(cu_seqlens[n]), int(cu_seqlens[n + 1]), initial_state[n : n + 1])
        for n in range(len(cu_seqlens) - 1)
    ]
    return torch.cat([o for o, _ in runs], dim=1), torch.cat([S for _, S in runs], dim=0)


def autograd_gradients(arrays, *, do, d_final_state, **options) -> dict[str, np.ndarray]:
    """Gradients by name, of every array among the inputs and the options."""
    leaves = {
        name: torch.tensor(x, requires_grad=True)
        for name, x in {**arrays, **options}.items()
        if isinstance(x, np.ndarray) and x.dtype == np.float64
    }
    o, final_state = torch_recurrence(**{**options, **leaves})
    loss = (o * torch.tensor(do)).sum() + (final_state * torch.tensor(d_final_state)).sum()
    names = {"A_log": "dA_log", "dt_bias": "d_dt_bias", "initial_state": "d_initial_state"}
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {names.get(name, f"d{name}"): x.numpy() for name, x in zip(leaves, gradients, strict=True)}


def assert_gradients_equal_autograd(arrays, *, do, d_final_state, **options) -> None:
    arrays = dict(zip("qkvgbw", core(arrays), strict=True))
    expected = autograd_gradients(arrays, do=do, d_final_state=d_final_state, **options)
    actual = reference.chunk_gdn2_backward(**arrays, do=do, d_final_state=d_final_state, **options)
    for name, gradient in actual._asdict().items():
        if name in expected:
            assert_close(gradient, expected[name], BAR, name)
        else:
            assert gradient is None, name


# ------------------------------------------------------------------------------------------------------------
# Forward: the chunk form is the recurrence
# ------------------------------------------------------------------------------------------------------------


def assert_chunk_form_equals_token_form(arrays, **options) -> None:
    chunk_size = options.pop("chunk_size", 64)
    expected_o, expected_state = reference.recurrence(*core(arrays), **options)
    o, final_state, _ = reference.chunk_forward(*core(arrays), **options, chunk_size=chunk_size)
    assert np.isfinite(o).all()
    assert_close(o, expected_o, BAR, "o")
    assert_close(final_state, expected_state, BAR, "final_state")


@pytest.mark.parametrize("regime", REGIMES + EXTREME_REGIMES)
def test_the_token_form_equals_the_same_steps_in_torch(regime, seed):
    arrays = small_inputs(regime, seed)
    initial_state = random_states(arrays, seed)["initial_state"]
    o, final_state = reference.recurrence(*core(arrays), scale=0.7, initial_state=initial_state)
    inputs = [torch.tensor(x) for x in core(arrays)]
    expected_o, expected_state = torch_recurrence(*inputs, torch.tensor(initial_state), scale=0.7)
    assert_close(o, expected_o, BAR, "o")
    assert_close(final_state, expected_state, BAR, "final_state")


@pytest.mark.parametrize("regime", REGIMES + EXTREME_REGIMES)
def test_the_chunk_form_equals_the_token_form(regime, seed):
    arrays = small_inputs(regime, seed, batch=1, seqlen=200, dim_k=32, dim_v=48)
    states = random_states(arrays, seed)
    assert_chunk_form_equals_token_form(arrays, initial_state=states["initial_state"])


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_the_chunk_form_equals_the_token_form_at_every_length(seqlen, seed):
    arrays = small_inputs("erase2_with_extreme_decays", seed, seqlen=seqlen)
    assert_chunk_form_equals_token_form(arrays)


@pytest.mark.parametrize("chunk_size", (1, 2, 7, 16, 32, 100))
def test_the_chunk_length_does_not_change_the_result(chunk_size, seed):
    arrays = small_inputs("erase2_with_extreme_decays", seed)
    assert_chunk_form_equals_token_form(arrays, chunk_size=chunk_size)


@pytest.mark.parametrize("gate_heads", GATE_HEADS)
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_value_heads_read_the_key_head_of_their_group(groups, gate_heads, seed):
    arrays = small_inputs("slow", seed, value_heads=2 * groups, gate_heads=gate_heads)
    o, final_state, _ = reference.chunk_forward(*core(arrays))
    for head in range(2 * groups):
        gate_head = head // groups if gate_heads == "key" else head
        heads = {
            "q": head // groups,
            "k": head // groups,
            "v": head,
            "g": gate_head,
            "b": gate_head,
            "w": head,
        }
        alone = [arrays[name][:, :, index : index + 1] for name, index in heads.items()]
        expected_o, expected_state = reference.recurrence(*alone)
        assert_close(o[:, :, head : head + 1], expected_o, BAR, f"o of value head {head}")
        assert_close(final_state[:, head : head + 1], expected_state, BAR, f"state of value head {head}")


def test_the_chunk_states_are_the_states_at_the_starts_of_the_chunks(seed):
    arrays = small_inputs("slow", seed, seqlen=150)
    initial_state = random_states(arrays, seed)["initial_state"]
    h = reference.chunk_forward(*core(arrays), initial_state=initial_state)[2]
    assert h.shape == (2, 3, 2, 8, 6)
    for chunk in range(3):
        before = [x[:, : 64 * chunk] for x in core(arrays)]
        expected = reference.recurrence(*before, initial_state=initial_state)[1]
        assert_close(h[:, chunk], expected, BAR, f"h[{chunk}]")


def test_packed_sequences_equal_separate_ones_and_empty_ones_pass_their_state_through(seed):
    offsets = packed_offsets().numpy()
    arrays = small_inputs("erase2_with_extreme_decays", seed, batch=1, seqlen=offsets[-1])
    initial_state = random_states(arrays, seed, len(PACKED_LENGTHS))["initial_state"]
    packed = reference.chunk_forward(*core(arrays), initial_state=initial_state, cu_seqlens=offsets)
    tokens = reference.recurrence(*core(arrays), initial_state=initial_state, cu_seqlens=offsets)
    states = []
    for n, length in enumerate(PACKED_LENGTHS):
        span = slice(offsets[n], offsets[n + 1])
        alone = [x[:, span] for x in core(arrays)]
        o, final_state, h = reference.chunk_forward(*alone, initial_state=initial_state[n : n + 1])
        states.append(h)
        for form, result in (("chunk", packed), ("token", tokens)):
            assert_close(result[0][:, span], o, BAR, f"o of sequence {n} in {form} form")
            assert_close(result[1][n : n + 1], final_state, BAR, f"state of sequence {n} in {form} form")
            if length == 0:
                assert_bitwise_equal(result[1][n], initial_state[n], f"state of empty sequence {n}")
    assert_close(packed[2], np.concatenate(states, axis=1), BAR, "h")


@pytest.mark.parametrize("cu_seqlens", (None, [0], [0, 0, 0]))
def test_no_tokens_at_all_is_a_problem_like_any_other(cu_seqlens, seed):
    arrays = small_inputs("slow", seed, batch=1, seqlen=0)
    count = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    states = random_states(arrays, seed, count)
    options = {"initial_state": states["initial_state"], "cu_seqlens": cu_seqlens}
    o, final_state, h = reference.chunk_gdn2(*core(arrays), **options)
    assert o.shape == (1, 0, 2, 6) and h.shape == (1, 0, 2, 8, 6)
    assert_bitwise_equal(final_state, states["initial_state"], "final_state")
    backward = reference.chunk_gdn2_backward(
        *core(arrays), arrays["do"], d_final_state=states["d_final_state"], **options
    )
    assert_bitwise_equal(backward.d_initial_state, states["d_final_state"], "d_initial_state")
    assert backward.dq.shape == arrays["q"].shape and backward.dv.shape == arrays["v"].shape


# ------------------------------------------------------------------------------------------------------------
# Backward: the analytic gradients are autograd's
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES + EXTREME_REGIMES)
def test_the_gradients_equal_autograd(regime, seed):
    arrays = small_inputs(regime, seed)
    assert_gradients_equal_autograd(arrays, do=arrays["do"], scale=0.7, **random_states(arrays, seed))


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_the_gradients_equal_autograd_at_every_length(seqlen, seed):
    arrays = small_inputs("erase2_with_extreme_decays", seed, batch=1, seqlen=seqlen)
    assert_gradients_equal_autograd(arrays, do=arrays["do"], **random_states(arrays, seed))


@pytest.mark.parametrize("gate_heads", GATE_HEADS)
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_the_gradients_of_shared_heads_are_sums_over_the_group(groups, gate_heads, seed):
    sizes = {"batch": 1, "value_heads": 2 * groups, "gate_heads": gate_heads}
    arrays = small_inputs("erase2_with_extreme_decays", seed, **sizes)
    assert_gradients_equal_autograd(arrays, do=arrays["do"], **random_states(arrays, seed))


@pytest.mark.parametrize(("dim_k", "dim_v"), ((1, 1), (3, 17), (24, 5)))
def test_the_gradients_equal_autograd_for_unequal_dimensions(dim_k, dim_v, seed):
    arrays = small_inputs("resets", seed, batch=1, dim_k=dim_k, dim_v=dim_v)
    assert_gradients_equal_autograd(arrays, do=arrays["do"], **random_states(arrays, seed))


def test_the_gradients_of_packed_sequences_equal_autograd(seed):
    offsets = packed_offsets().numpy()
    arrays = small_inputs("erase2_with_extreme_decays", seed, batch=1, seqlen=offsets[-1], value_heads=4)
    states = random_states(arrays, seed, len(PACKED_LENGTHS))
    assert_gradients_equal_autograd(arrays, do=arrays["do"], cu_seqlens=offsets, **states)


def test_an_unused_final_state_has_no_gradient_to_pass_on(seed):
    arrays = small_inputs("slow", seed)
    zeros = np.zeros_like(random_states(arrays, seed)["d_final_state"])
    for name, expected in autograd_gradients(
        dict(zip("qkvgbw", core(arrays), strict=True)), do=arrays["do"], d_final_state=zeros
    ).items():
        actual = reference.chunk_gdn2_backward(*core(arrays), arrays["do"])
        assert_close(getattr(actual, name), expected, BAR, name)


@pytest.mark.parametrize("chunk_size", (1, 2, 7, 16, 32, 100))
def test_the_chunk_length_does_not_change_the_gradients(chunk_size, seed):
    arrays = small_inputs("erase2_with_extreme_decays", seed)
    states = random_states(arrays, seed)
    expected = reference.chunk_backward(*core(arrays), arrays["do"], **states)
    actual = reference.chunk_backward(*core(arrays), arrays["do"], **states, chunk_size=chunk_size)
    for name in ("dq", "dk", "dv", "dg", "db", "dw", "d_initial_state"):
        assert_close(getattr(actual, name), getattr(expected, name), BAR, name)


def test_the_decay_gradient_keeps_its_relative_accuracy_when_every_decay_is_strong(seed):
    arrays = small_inputs("slow", seed)
    arrays["g"] -= 30.0  # every entry of dg is around 1e-13, next to other gradients around 1
    assert_gradients_equal_autograd(arrays, do=arrays["do"], **random_states(arrays, seed))


def test_the_decay_gradient_is_zero_when_every_decay_is_a_reset(seed):
    arrays = small_inputs("slow", seed)
    arrays["g"][:] = -np.inf
    gradients = reference.chunk_backward(*core(arrays), arrays["do"], **random_states(arrays, seed))
    assert not gradients.dg.any()
    assert not gradients.d_initial_state.any()
    assert all(np.isfinite(x).all() for x in gradients if x is not None)


# ------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------

# Which parameters an option takes, and the option itself.
OPTIONS = {
    "l2norm": ((), {"use_qk_l2norm_in_kernel": True}),
    "softplus": (("A_log", "dt_bias"), {"use_gate_in_kernel": True}),
    "softplus_without_bias": (("A_log",), {"use_gate_in_kernel": True}),
    "lower_bound": (("A_log", "dt_bias"), {"use_gate_in_kernel": True, "lower_bound": -5.0}),
    "lower_bound_without_A_log": (("dt_bias",), {"use_gate_in_kernel": True, "lower_bound": -5.0}),
    "lower_bound_alone": ((), {"use_gate_in_kernel": True, "lower_bound": -5.0}),
    "sigmoid": ((), {"use_gate_sigmoid_in_kernel": True}),
    "sigmoid_erase2": ((), {"use_gate_sigmoid_in_kernel": True, "erase_scale": 2.0}),
    "all": (
        ("A_log", "dt_bias"),
        {
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_gate_sigmoid_in_kernel": True,
            "erase_scale": 2.0,
        },
    ),
}


def option_problem(option: str, seed: int, **sizes):
    """Inputs that are raw where the option activates them, and the option's keyword arguments."""
    parameters, options = OPTIONS[option]
    arrays, raw = small_inputs("slow", seed, **sizes), small_inputs("raw", seed, **sizes)
    if "use_qk_l2norm_in_kernel" in options:
        arrays.update(q=raw["q"], k=raw["k"])
        arrays["q"][0, 3, 1] = arrays["k"][0, 5, 0] = 0.0
    if "use_gate_in_kernel" in options:
        arrays["g"] = raw["g"]
    if "use_gate_sigmoid_in_kernel" in options:
        arrays.update(b=raw["b"], w=raw["w"])
    return arrays, {**options, **{name: raw[name] for name in parameters}}


@pytest.mark.parametrize("gate_heads", GATE_HEADS)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_and_its_gradients_equal_autograd(option, gate_heads, seed):
    arrays, options = option_problem(option, seed, value_heads=4, gate_heads=gate_heads)
    states = random_states(arrays, seed)
    assert_gradients_equal_autograd(arrays, do=arrays["do"], **states, **options)
    as_torch = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    expected_o, expected_state = torch_recurrence(*map(torch.tensor, core(arrays)), **as_torch)
    o, final_state, _ = reference.chunk_gdn2(*core(arrays), **options)
    assert_close(o, expected_o, BAR, "o")
    assert_close(final_state, expected_state, BAR, "final_state")


def test_all_options_at_once_on_packed_sequences_equal_autograd(seed):
    offsets = packed_offsets().numpy()
    sizes = {"batch": 1, "seqlen": offsets[-1], "value_heads": 4, "gate_heads": "value"}
    arrays, options = option_problem("all", seed, **sizes)
    states = random_states(arrays, seed, len(PACKED_LENGTHS))
    assert_gradients_equal_autograd(arrays, do=arrays["do"], cu_seqlens=offsets, **states, **options)


def test_the_activations_are_finite_and_in_range_for_huge_projections():
    huge = np.array([-1e4, -800.0, 0.0, 800.0, 1e4]).reshape(1, 1, 1, 5)
    inputs, gradients = [huge] * 5, [np.ones_like(huge)] * 5
    for bound in (None, -5.0):
        options = {
            "use_gate_in_kernel": True,
            "A_log": np.zeros(1),
            "lower_bound": bound,
            "use_gate_sigmoid_in_kernel": True,
            "erase_scale": 2.0,
        }
        _, _, g, b, w = reference.activations(*inputs, **options)
        assert (g <= 0).all() and (b >= 0).all() and (b <= 2).all() and (w >= 0).all() and (w <= 1).all()
        backward = reference.activations_backward(*inputs, *gradients, **options)
        assert all(np.isfinite(x).all() for x in (g, b, w, *backward) if x is not None)


def test_state_v_first_transposes_every_state_and_nothing_else(seed):
    arrays = small_inputs("slow", seed, seqlen=100)
    states = random_states(arrays, seed)
    transposed = {name: x.swapaxes(2, 3) for name, x in states.items()}
    o, final_state, h = reference.chunk_gdn2(*core(arrays), initial_state=states["initial_state"])
    o_v, final_state_v, h_v = reference.chunk_gdn2(
        *core(arrays), initial_state=transposed["initial_state"], state_v_first=True
    )
    assert_close(o_v, o, BAR, "o")
    assert_close(final_state_v.swapaxes(2, 3), final_state, BAR, "final_state")
    assert_close(h_v.swapaxes(3, 4), h, BAR, "h")
    expected = reference.chunk_gdn2_backward(*core(arrays), arrays["do"], **states)
    actual = reference.chunk_gdn2_backward(*core(arrays), arrays["do"], **transposed, state_v_first=True)
    assert_close(actual.d_initial_state.swapaxes(2, 3), expected.d_initial_state, BAR, "d_initial_state")
    for name in ("dq", "dk", "dv", "dg", "db", "dw"):
        assert_close(getattr(actual, name), getattr(expected, name), BAR, name)


# ------------------------------------------------------------------------------------------------------------
# Finite differences, without torch
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ("activated", "raw_softplus", "raw_lower_bound"))
def test_the_gradients_equal_finite_differences_of_the_recurrence(form, seed):
    rng = np.random.default_rng(seed)
    batch, seqlen, heads, value_heads, dim_k, dim_v = 2, 20, 2, 4, 4, 3
    shapes = {
        **dict.fromkeys(("q", "k", "g", "b"), (batch, seqlen, heads, dim_k)),
        **dict.fromkeys(("v", "w"), (batch, seqlen, value_heads, dim_v)),
        "initial_state": (batch, value_heads, dim_k, dim_v),
    }
    options = {}
    if form != "activated":
        shapes.update(A_log=(heads,), dt_bias=(heads * dim_k,))
        options = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel"), True)
        options.update(use_gate_sigmoid_in_kernel=True, erase_scale=2.0)
        options["lower_bound"] = -2.0 if form == "raw_lower_bound" else None
    point = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    if form == "activated":
        point["g"] = -np.abs(point["g"])
    do, d_final_state = rng.standard_normal(shapes["v"]), rng.standard_normal(shapes["initial_state"])

    def loss(values) -> float:
        gates = {name: values[name] for name in ("A_log", "dt_bias") if name in values}
        projections = [values[name] for name in ("q", "k", "g", "b", "w")]
        q, k, g, b, w = reference.activations(*projections, **options, **gates)
        o, state = reference.recurrence(q, k, values["v"], g, b, w, initial_state=values["initial_state"])
        return float((do * o).sum() + (d_final_state * state).sum())

    gradients = reference.chunk_gdn2_backward(**point, do=do, d_final_state=d_final_state, **options)
    names = {"A_log": "dA_log", "dt_bias": "d_dt_bias", "initial_state": "d_initial_state"}
    step = 1e-4  # the error falls with its fourth power down to here, then rounding takes over
    for name, value in point.items():
        slopes, expected = [], []
        for direction in rng.standard_normal((4, *value.shape)):
            steps = {n: loss({**point, name: value + n * step * direction}) for n in (-2, -1, 1, 2)}
            expected.append((8 * (steps[1] - steps[-1]) - (steps[2] - steps[-2])) / (12 * step))
            slopes.append((getattr(gradients, names.get(name, f"d{name}")) * direction).sum())
        assert_close(np.array(slopes), np.array(expected), FINITE_DIFFERENCE_BAR, f"slopes along {name}")


# ------------------------------------------------------------------------------------------------------------
# Identities
# ------------------------------------------------------------------------------------------------------------


def kimi_delta_attention_step(S, k, v, alpha, beta):
    S = alpha[:, None] * S
    return S + beta * np.outer(k, v - S.T @ k)


def gated_delta_net_step(S, k, v, alpha, beta):
    return alpha[0] * (np.eye(len(k)) - beta * np.outer(k, k)) @ S + beta * np.outer(k, v)


def delta_net_step(S, k, v, alpha, beta):
    return S - beta * np.outer(k, S.T @ k - v)


@pytest.mark.parametrize(
    ("step", "decay"),
    (
        (kimi_delta_attention_step, "per channel"),
        (gated_delta_net_step, "per token"),
        (delta_net_step, "none"),
    ),
)
def test_equal_erase_and_write_gates_give_the_older_delta_rules(step, decay, seed):
    arrays = small_inputs("uniform5", seed, batch=1, heads=1)
    q, k, v, g, b, w = core(arrays)
    beta = b[..., :1]
    b, w = np.broadcast_to(beta, b.shape), np.broadcast_to(beta, w.shape)
    g = {"per channel": g, "per token": np.broadcast_to(g[..., :1], g.shape), "none": np.zeros_like(g)}[decay]
    S = np.zeros((8, 6))
    expected = np.zeros_like(v)
    for t in range(q.shape[1]):
        S = step(S, k[0, t, 0], v[0, t, 0], np.exp(g[0, t, 0]), beta[0, t, 0, 0])
        expected[0, t, 0] = 8**-0.5 * S.T @ q[0, t, 0]
    o, final_state, _ = reference.chunk_forward(q, k, v, g, b, w)
    assert_close(o, expected, BAR, "o")
    assert_close(final_state[0, 0], S, BAR, "final_state")


@pytest.mark.parametrize("decay", ("per channel", "per token"))
def test_nothing_erased_and_all_written_is_gated_linear_attention(decay, seed):
    """With one decay per token, this is Mamba-2's state space duality: o = (L * (Q K^T)) V."""
    arrays = small_inputs("slow", seed, batch=1, heads=1)
    q, k, v, g, b, w = core(arrays)
    if decay == "per token":
        g = np.broadcast_to(g[..., :1], g.shape)
    G = np.cumsum(g[0, :, 0], axis=0)  # [T, K]
    if decay == "per channel":
        scores = (q[0, :, 0] * np.exp(G)) @ (k[0, :, 0] * np.exp(-G)).T
    else:
        scores = np.exp(G[:, None, 0] - G[None, :, 0]) * (q[0, :, 0] @ k[0, :, 0].T)
    expected = 8**-0.5 * np.tril(scores) @ v[0, :, 0]
    o, _, _ = reference.chunk_forward(q, k, v, g, np.zeros_like(b), np.ones_like(w))
    assert_close(o[0, :, 0], expected, BAR, "o")


def test_a_sequence_split_anywhere_continues_from_the_state_handed_over(seed):
    arrays = small_inputs("erase2_with_extreme_decays", seed)
    expected_o, expected_state, _ = reference.chunk_forward(*core(arrays))
    for split in range(arrays["q"].shape[1] + 1):
        first = [x[:, :split] for x in core(arrays)]
        second = [x[:, split:] for x in core(arrays)]
        for form in (reference.recurrence, reference.chunk_forward):
            o_first, state, *_ = form(*first)
            o_second, state, *_ = form(*second, initial_state=state)
            o = np.concatenate([o_first, o_second], axis=1)
            assert_close(o, expected_o, BAR, f"o split at {split}")
            assert_close(state, expected_state, BAR, f"final_state split at {split}")


@pytest.mark.parametrize("split", (1, 31, 64, 69))
def test_the_gradients_of_a_split_sequence_are_those_of_the_whole(split, seed):
    arrays = small_inputs("erase2_with_extreme_decays", seed)
    states = random_states(arrays, seed)
    whole = reference.chunk_backward(*core(arrays), arrays["do"], **states)
    first = [x[:, :split] for x in (*core(arrays), arrays["do"])]
    second = [x[:, split:] for x in (*core(arrays), arrays["do"])]
    handed_over = reference.recurrence(*first[:6], initial_state=states["initial_state"])[1]
    later = reference.chunk_backward(
        *second, initial_state=handed_over, d_final_state=states["d_final_state"]
    )
    earlier = reference.chunk_backward(
        *first, initial_state=states["initial_state"], d_final_state=later.d_initial_state
    )
    for name in ("dq", "dk", "dv", "dg", "db", "dw"):
        joined = np.concatenate([getattr(earlier, name), getattr(later, name)], axis=1)
        assert_close(joined, getattr(whole, name), BAR, name)
    assert_close(earlier.d_initial_state, whole.d_initial_state, BAR, "d_initial_state")


@pytest.mark.parametrize("form", (reference.recurrence, reference.chunk_forward))
def test_later_tokens_do_not_change_a_bit_of_earlier_outputs(form, seed):
    arrays = small_inputs("layer_init", seed)
    others = small_inputs("uniform5", seed + 1)
    expected = form(*core(arrays))[0]
    for t in (1, 16, 33, 63, 64, 69):
        changed = [
            np.concatenate([x[:, :t], y[:, t:]], axis=1)
            for x, y in zip(core(arrays), core(others), strict=True)
        ]
        o = form(*changed)[0]
        assert_bitwise_equal(o[:, :t], expected[:, :t], f"o before {t}")
        assert relative_error(o[:, t:], expected[:, t:]) > 0.1


# ------------------------------------------------------------------------------------------------------------
# The module
# ------------------------------------------------------------------------------------------------------------


def test_importing_the_reference_needs_numpy_alone():
    program = f"""
import importlib.util, sys
sys.modules["torch"] = sys.modules["cupy"] = None  # importing either fails
spec = importlib.util.spec_from_file_location("reference", {reference.__file__!r})
module = importlib.util.module_from_spec(spec)
sys.modules["reference"] = module
spec.loader.exec_module(module)
import numpy as np
x = np.ones((1, 3, 1, 2))
module.chunk_gdn2_backward(x, x, x, -x, x, x, x)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(reference)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"q": np.zeros((1, 8, 2))}, "4 dimensions"),
        ({"k": np.zeros((1, 8, 2, 5))}, "k must have shape"),
        ({"v": np.zeros((1, 8, 3, 6))}, "multiple"),
        ({"g": np.zeros((1, 8, 3, 8))}, "g must have shape"),
        ({"b": np.zeros((1, 8, 2, 8))}, "b must have shape"),  # g per value head, b per key head
        ({"w": np.zeros((1, 7, 4, 6))}, "w must have shape"),
        ({"do": np.zeros((1, 8, 4, 5))}, "do must have"),
        ({"initial_state": np.zeros((1, 4, 6, 8))}, "initial_state must have shape"),
        ({"d_final_state": np.zeros((1, 4, 6, 8))}, "d_final_state must have shape"),
        ({"cu_seqlens": [0, 7]}, "cu_seqlens must rise"),
        ({"cu_seqlens": [0, 5, 3, 8]}, "cu_seqlens must rise"),
        ({"cu_seqlens": [1, 8]}, "cu_seqlens must rise"),
        ({"use_gate_in_kernel": True}, "needs A_log"),
        ({"use_gate_in_kernel": True, "A_log": np.zeros(4)}, "A_log must have shape"),
        (
            {"use_gate_in_kernel": True, "A_log": np.zeros(2), "dt_bias": np.zeros(8)},
            "dt_bias must have shape",
        ),
    ),
)
def test_an_input_of_the_wrong_shape_is_named(change, message, seed):
    arrays = small_inputs("slow", seed, batch=1, seqlen=8, value_heads=4, gate_heads="value")
    with pytest.raises(ValueError, match=message):
        reference.chunk_gdn2_backward(**{**arrays, **change})


def test_packed_sequences_need_a_batch_of_one(seed):
    arrays = small_inputs("slow", seed, batch=2, seqlen=8)
    with pytest.raises(ValueError, match="batch of 1"):
        reference.recurrence(*core(arrays), cu_seqlens=[0, 8])


@pytest.mark.gpu
def test_cupy_arrays_give_the_numpy_result(seed):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.is_available():
        pytest.skip("CuPy finds no GPU")
    offsets = packed_offsets().numpy()
    sizes = {"batch": 1, "seqlen": offsets[-1], "value_heads": 4, "gate_heads": "value"}
    arrays, options = option_problem("all", seed, **sizes)
    states = random_states(arrays, seed, len(PACKED_LENGTHS))

    def on_gpu(x):
        return cupy.asarray(x) if isinstance(x, np.ndarray) else x

    gpu_options = {name: on_gpu(x) for name, x in {**options, "cu_seqlens": offsets}.items()}
    options["cu_seqlens"] = offsets
    inputs, gpu_inputs = core(arrays), [on_gpu(x) for x in core(arrays)]

    expected = reference.chunk_gdn2(*inputs, initial_state=states["initial_state"], **options)
    actual = reference.chunk_gdn2(*gpu_inputs, initial_state=on_gpu(states["initial_state"]), **gpu_options)
    for name, x, y in zip(("o", "final_state", "h"), actual, expected, strict=True):
        assert isinstance(x, cupy.ndarray)
        assert_close(x, y, BAR, name)

    expected = reference.chunk_gdn2_backward(*inputs, arrays["do"], **states, **options)
    gpu_states = {name: on_gpu(x) for name, x in states.items()}
    actual = reference.chunk_gdn2_backward(*gpu_inputs, on_gpu(arrays["do"]), **gpu_states, **gpu_options)
    for name, x in actual._asdict().items():
        assert isinstance(x, cupy.ndarray)
        assert_close(x, getattr(expected, name), BAR, name)

    active = small_inputs("erase2_with_extreme_decays", seed)
    expected = reference.recurrence(*core(active))
    actual = reference.recurrence(*map(on_gpu, core(active)))
    for name, x, y in zip(("o", "final_state"), actual, expected, strict=True):
        assert_close(x, y, BAR, name)


# ------------------------------------------------------------------------------------------------------------
# What the other tests measure with
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_heads", GATE_HEADS)
@pytest.mark.parametrize("regime", (*REGIMES, "near_parallel"))
def test_the_inputs_of_a_regime_are_what_it_says(regime, gate_heads, seed):
    arrays = small_inputs(regime, seed, seqlen=500, value_heads=4, gate_heads=gate_heads)
    _, _, _, g, b, w = core(arrays)
    assert g.shape == b.shape == (2, 500, 2 if gate_heads == "key" else 4, 8)
    assert arrays["do"].shape == arrays["v"].shape == w.shape == (2, 500, 4, 6)
    for name in ("q", "k"):
        assert_close((arrays[name] ** 2).sum(-1), np.ones((2, 500, 2)), BAR, f"squared norm of {name}")
    slowest = {"slow": 0.02, "uniform5": 5, "resets": 100, "erase2": 0.02, "layer_init": 200}.get(
        regime, 1e-3
    )
    assert g.min() >= -slowest and g.max() <= 0 and w.min() >= 0 and w.max() <= 1
    if regime in ("correlated", "near_parallel"):
        assert (b == {"correlated": 0.98, "near_parallel": 2.0}[regime]).all()
        cosines = np.einsum("bthk,bshk->bhts", arrays["k"], arrays["k"])
        assert cosines.min() > 0.8
    else:
        assert b.min() >= 0 and 0.99 < b.max() / (2 if regime == "erase2" else 1) <= 1
    if regime == "resets":
        assert 0.02 < (g == -100).mean() < 0.04 and g[g != -100].min() >= -0.05


def test_the_inputs_depend_on_the_seed_and_are_rounded_to_the_dtype(seed):
    sizes = {"seqlen": 10, "dim_k": 8, "dim_v": 8}
    exact = make_inputs("slow", seed=seed, dtype=torch.float64, gate_dtype=torch.float64, **sizes)
    rounded = make_inputs("slow", seed=seed, dtype=torch.bfloat16, **sizes)
    other = make_inputs("slow", seed=seed + 1, dtype=torch.bfloat16, **sizes)
    assert rounded.g.dtype == torch.float32
    for name, x, y, z in zip("qkvgbw", exact.tensors, rounded.tensors, other.tensors, strict=True):
        assert_bitwise_equal(y, x.to(y.dtype), name)
        assert relative_error(z, y) > 0.1


def test_a_regime_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="regime must be one of"):
        make_inputs("fast")


def test_raw_inputs_have_the_gate_parameters_of_a_layer_at_initialisation(seed):
    inputs = raw_inputs(seqlen=4, heads=3, value_heads=6, gate_heads="value", dtype=torch.bfloat16, seed=seed)
    assert inputs.g.shape == inputs.b.shape == (1, 4, 6, 128)
    assert inputs.A_log.shape == (3,) and inputs.dt_bias.shape == (3 * 128,)
    assert inputs.A_log.dtype == inputs.dt_bias.dtype == inputs.g.dtype == torch.float32
    A, step = inputs.A_log.exp(), torch.nn.functional.softplus(inputs.dt_bias)
    assert A.min() >= 1 and A.max() <= 16 and step.min() >= 0.999e-3 and step.max() <= 0.1001


def test_the_bars_follow_the_dtype():
    assert set(TENSORS) == {"o", "S", "dq", "dk", "dv", "dg", "db", "dw"}
    assert bar("correlated", "db", torch.bfloat16) == pytest.approx(1.15 * BARS["correlated"]["db"])
    assert bar("uniform5", "S", torch.bfloat16) == 4.5e-3
    assert bar("correlated", "db", torch.float16) == pytest.approx(1.15 * 0.0136 / 4)
    assert bar("slow", "o", torch.float32) == 1e-5 and bar("slow", "o", torch.float64) == 1e-10
    assert NEAR_PARALLEL_O_BAR == 3e-2


def test_a_relative_error_is_measured_in_float64_and_against_zero_is_the_norm():
    assert relative_error(torch.tensor([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(np.array([3.0, 4.0]), np.zeros(2)) == 5.0
    assert relative_error(np.zeros((0, 2)), np.zeros((0, 2))) == 0.0
    assert relative_error(torch.ones(2, dtype=torch.bfloat16), np.ones(2)) == 0.0
    assert np.isnan(relative_error(np.array([np.nan]), np.array([1.0])))


def test_a_failing_comparison_says_what_and_where():
    expected = torch.ones(2, 3)
    actual = expected.clone()
    actual[1, 2] = 1.5
    with pytest.raises(AssertionError, match=r"dq: .* 2\.041e-01 .* 1\.000e-03; .*\[1, 2\].*1\.5.*1\.0"):
        assert_close(actual, expected, 1e-3, "dq")
    with pytest.raises(AssertionError, match=r"dq: 1 of 6 .*\[1, 2\].*1\.5.*1\.0"):
        assert_bitwise_equal(actual, expected, "dq")
    with pytest.raises(AssertionError, match=r"dq: shape"):
        assert_close(actual[0], expected, 1e-3, "dq")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_comparison_wants_nan_and_infinity_at_equal_places(value):
    clean = torch.ones(2, 3)
    spoilt = clean.clone()
    spoilt[0, 1] = value
    assert_close(spoilt, spoilt, 0.0, "x")
    assert_bitwise_equal(spoilt, spoilt.clone(), "x", nan=True)
    for actual, expected in ((spoilt, clean), (clean, spoilt)):
        with pytest.raises(AssertionError, match=r"x: 1 of 6 .*\[0, 1\]"):
            assert_close(actual, expected, 1e9, "x")
        with pytest.raises(AssertionError, match=r"x: 1 of 6 .*\[0, 1\]"):
            assert_bitwise_equal(actual, expected, "x")


def test_nan_is_equal_to_itself_where_it_is_expected_only():
    missing = torch.tensor([1.0, float("nan")])
    with pytest.raises(AssertionError, match=r"x: 1 of 2 .* NaN in both.*\[1\]"):
        assert_bitwise_equal(missing, missing.clone(), "x")


def test_a_comparison_tells_the_two_infinities_apart():
    infinity = torch.tensor([1.0, float("inf")])
    with pytest.raises(AssertionError, match=r"x: 1 of 2 .*\[1\]"):
        assert_close(-infinity, infinity, 1e9, "x")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16))
def test_a_bitwise_comparison_sees_the_last_bit_and_the_sign_of_zero(dtype):
    x = torch.tensor([1.0, 0.0], dtype=dtype)
    assert_bitwise_equal(x, x.clone(), "x")
    one_more = torch.tensor([1.0 + torch.finfo(dtype).eps, 0.0], dtype=dtype)
    negative_zero = torch.tensor([1.0, -0.0], dtype=dtype)
    for other in (one_more, negative_zero):
        with pytest.raises(AssertionError, match="1 of 2 elements differ in their bits"):
            assert_bitwise_equal(x, other, "x")
    with pytest.raises(AssertionError, match="dtype"):
        assert_bitwise_equal(x, x.to(torch.float32 if dtype == torch.float64 else torch.float64), "x")
