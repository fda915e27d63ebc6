"""Every option of chunk_gdn2, forward and backward, against the reference; and what it must leave alone."""

import itertools
import math

import cases
import compare
import pytest
import torch

SHAPE = {"batch": 2, "seqlen": 100, "heads": 2, "dim_k": 32, "dim_v": 48}
EVERYTHING = {**cases.EVERYTHING, "erase_scale": 2.0}

# Kernels have other forms for K up to 64 and beyond, where two parts of 64 channels share a norm; and sizes
# that are no whole 16 bytes are written another way.
HEAD_SIZES = ((32, 48), (128, 128), (100, 60))
every_head_size = pytest.mark.parametrize("dim_k, dim_v", HEAD_SIZES)


def check(backend, inputs, seed, *, v_first=False, **options):
    """Raw inputs, so bars are those of layer_init, with a state and its gradient."""
    initial_state, d_final_state = backend.states(inputs, seed=seed, v_first=v_first)
    states = {"initial_state": initial_state, "d_final_state": d_final_state, "state_v_first": v_first}
    return backend.check_against_reference(inputs, **states, **options)


# -- L2 norm -------------------------------------------------------------------------------------------------


@pytest.mark.every_dtype
@every_head_size
def test_the_l2_norm_and_its_gradient(backend, dim_k, dim_v, seed):
    inputs = backend.inputs("layer_init", **{**SHAPE, "dim_k": dim_k, "dim_v": dim_v}, seed=seed)
    inputs.q.mul_(7.0)
    inputs.k.mul_(0.01)  # a thousandth of its squared norm is epsilon
    check(backend, inputs, seed, use_qk_l2norm_in_kernel=True)


@every_head_size
@pytest.mark.parametrize("rows", ["one", "every"])
@pytest.mark.parametrize("of", ["q", "k", "q and k"])
def test_zero_rows_have_a_norm_and_finite_gradients(backend, of, rows, dim_k, dim_v, seed):
    inputs = backend.inputs("layer_init", **{**SHAPE, "dim_k": dim_k, "dim_v": dim_v}, seed=seed)
    for x, name in ((inputs.q, "q"), (inputs.k, "k")):
        if name in of:
            x[:, 17 if rows == "one" else slice(None)] = 0
    results = check(backend, inputs, seed, use_qk_l2norm_in_kernel=True)
    for name, x in results.items():
        assert torch.isfinite(x).all(), name


# -- decay gate ----------------------------------------------------------------------------------------------


@pytest.mark.every_dtype
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_softplus_gate_and_its_parameters(backend, with_bias, seed):
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    options = {
        "use_gate_in_kernel": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_sigmoid_in_kernel": True,
    }
    inputs.dt_bias = inputs.dt_bias if with_bias else None
    results = check(backend, inputs, seed, **options)
    assert results["dA_log"].dtype == inputs.A_log.dtype
    assert ("d_dt_bias" in results) == with_bias


@pytest.mark.every_dtype
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_A_log", [True, False])
def test_the_bounded_gate_and_its_parameters(backend, with_A_log, with_bias, seed):
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    inputs.A_log = inputs.A_log if with_A_log else None
    inputs.dt_bias = inputs.dt_bias if with_bias else None
    options = {
        "use_gate_in_kernel": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_sigmoid_in_kernel": True,
    }
    results = check(backend, inputs, seed, lower_bound=-5.0, **options)
    assert ("dA_log" in results) == with_A_log
    assert ("d_dt_bias" in results) == with_bias


@pytest.mark.every_dtype
@every_head_size
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_the_gradient_of_the_bias_is_the_sum_of_the_gates_gradients(backend, lower_bound, dim_k, dim_v, seed):
    inputs = backend.raw_inputs(**{**SHAPE, "dim_k": dim_k, "dim_v": dim_v}, seed=seed)
    results = backend.run(inputs, **EVERYTHING, lower_bound=lower_bound)
    assert results["dg"].dtype == inputs.g.dtype
    dg = results["dg"].double().flatten(0, 1).flatten(1)
    error = (results["d_dt_bias"].double() - dg.sum(0)).abs() / dg.abs().sum(0)
    assert error.max() < 1e-6, f"{error.max():.1e} of the summands at {error.argmax()}"


@every_head_size
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("gate_heads", ["key", "value"])
def test_a_group_of_value_heads_shares_the_gates_parameters(
    backend, gate_heads, lower_bound, dim_k, dim_v, seed
):
    shape = {**SHAPE, "value_heads": 6, "gate_heads": gate_heads, "dim_k": dim_k, "dim_v": dim_v}
    inputs = backend.raw_inputs(**shape, seed=seed)
    results = check(backend, inputs, seed, **EVERYTHING, lower_bound=lower_bound)
    assert results["dA_log"].shape == (2,)
    assert results["d_dt_bias"].shape == (2 * dim_k,)


@every_head_size
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_a_very_fast_gate_has_finite_gradients(backend, lower_bound, dim_k, dim_v, seed):
    """A_log up to log 64, and raw gates far out on both sides of where softplus bends."""
    inputs = backend.raw_inputs(**{**SHAPE, "dim_k": dim_k, "dim_v": dim_v}, seed=seed)
    inputs.A_log = torch.tensor([math.log(64.0), math.log(1e-3)], device=backend.device)
    inputs.g[:, ::3] = 60.0
    inputs.g[:, 1::3] = -60.0
    results = check(backend, inputs, seed, **EVERYTHING, lower_bound=lower_bound)
    for name, x in results.items():
        assert torch.isfinite(x).all(), name


@every_head_size
@pytest.mark.parametrize("by", ["rate", "raw gate", "some raw gates"])
def test_a_very_slow_gate_has_accurate_gradients(backend, by, dim_k, dim_v, seed):
    """Decays of 1e-11 to 1e-4: alpha does not tell them any more, and dA_log is a sum of dg * g."""
    inputs = backend.raw_inputs(**{**SHAPE, "dim_k": dim_k, "dim_v": dim_v}, seed=seed)
    if by == "rate":
        inputs.A_log = torch.tensor([-6.0, -9.0], device=backend.device)
    else:  # softplus(u) is exp(u) there, and log(1 + exp(-u)) + u is nothing but rounding
        inputs.g[..., :: 1 if by == "raw gate" else 3] -= 14.0
    check(backend, inputs, seed, **EVERYTHING)


@pytest.mark.parametrize("in_dtype_of_q", [False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("raw", [float("inf"), -float("inf"), 1e3])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_an_infinite_raw_gate_has_finite_gradients(backend, lower_bound, raw, first, in_dtype_of_q, seed):
    """softplus(inf) resets the state, sigmoid(inf) is the bound: constants, with gradients of 0.

    softplus(1e3) does too, and dA_log multiplies by it what rounding leaves of those.
    """
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    if in_dtype_of_q:
        inputs.g = inputs.g.to(backend.dtype)
    inputs.g[:, first::5, :, first::2] = raw
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    options = {
        "lower_bound": lower_bound,
        "initial_state": initial_state,
        "d_final_state": d_final_state,
        **EVERYTHING,
    }
    results = backend.run(inputs, **options)
    inputs.g.clamp_(-1e4, 1e4)  # the same decays, from raw gates that the reference can multiply by zero
    backend.check(results, backend.expected(inputs, **options))


def test_a_saturated_gate_equals_the_activated_one(backend, seed):
    """g, b and w activated by the caller in float64 give what the op makes of the raw ones."""
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    actual, _ = backend.forward(inputs, **EVERYTHING)
    expected = backend.expected(inputs, **EVERYTHING)
    compare.assert_close(actual, expected["o"], backend.bar("o"), "o")


# -- gate sigmoids -------------------------------------------------------------------------------------------


@pytest.mark.every_dtype
@pytest.mark.parametrize("erase_scale", [1.0, 2.0])
def test_the_gate_sigmoids_and_their_gradients(backend, erase_scale, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    raw = backend.raw_inputs(**SHAPE, seed=seed)
    inputs.b, inputs.w = raw.b * 2, raw.w * 2
    check(backend, inputs, seed, use_gate_sigmoid_in_kernel=True, erase_scale=erase_scale)


def test_saturated_sigmoids_are_finite(backend, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    for x in (inputs.b, inputs.w):
        x[:, ::3], x[:, 1::3], x[:, 2::3] = 90.0, -90.0, 0.0
    results = check(backend, inputs, seed, use_gate_sigmoid_in_kernel=True, erase_scale=2)
    assert not results["db"][:, ::3].any(), "the gate is flat there"


# -- all of them ---------------------------------------------------------------------------------------------


@pytest.mark.every_dtype
@every_head_size
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("v_first", [False, True])
def test_everything_in_the_kernel_at_once(backend, v_first, lower_bound, dim_k, dim_v, seed):
    shape = {**SHAPE, "value_heads": 4, "dim_k": dim_k, "dim_v": dim_v}
    inputs = backend.raw_inputs(**shape, seed=seed)
    check(backend, inputs, seed, v_first=v_first, lower_bound=lower_bound, **EVERYTHING, scale=0.5)


@pytest.mark.parametrize("dim_k", [32, 100])
@pytest.mark.parametrize("gate, lower_bound", [(False, None), (True, None), (True, -5.0)])
@pytest.mark.parametrize("norm, sigmoid", list(itertools.product([False, True], repeat=2)))
def test_every_combination_of_activations(backend, norm, sigmoid, gate, lower_bound, dim_k, seed):
    shape = {**SHAPE, "seqlen": 70, "dim_k": dim_k}
    inputs, raw = backend.inputs("layer_init", **shape, seed=seed), backend.raw_inputs(**shape, seed=seed)
    if norm:
        inputs.q, inputs.k = raw.q, raw.k
    if gate:
        inputs.g, inputs.A_log, inputs.dt_bias = raw.g, raw.A_log, raw.dt_bias
    if sigmoid:
        inputs.b, inputs.w = raw.b, raw.w
    options = {
        "use_qk_l2norm_in_kernel": norm,
        "use_gate_in_kernel": gate,
        "use_gate_sigmoid_in_kernel": sigmoid,
        "lower_bound": lower_bound,
    }
    check(backend, inputs, seed, **options)


@pytest.mark.most_exact_dtype
def test_parameters_stay_float32_beside_float64_inputs(backend, seed):
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    inputs.A_log, inputs.dt_bias = inputs.A_log.float(), inputs.dt_bias.float()
    results, expected = backend.run(inputs, **EVERYTHING), backend.expected(inputs, **EVERYTHING)
    for name in ("dA_log", "d_dt_bias"):
        assert results[name].dtype == torch.float32
        expected[name] = compare.to_float64(expected[name]).astype("float32")
    backend.check(results, expected)


def test_a_raw_gate_in_the_dtype_of_q(backend, seed):
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    inputs.g = inputs.g.to(backend.dtype)
    assert check(backend, inputs, seed, **EVERYTHING)["dg"].dtype == backend.dtype


# -- scale, states, and options that change nothing ----------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 0.03, -2.0, 0.0])
def test_the_scale_multiplies_the_output(backend, scale, normalize, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    check(backend, inputs, seed, scale=scale, use_qk_l2norm_in_kernel=normalize)


def test_the_default_scale_is_one_over_the_root_of_the_key_size(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    default, given = backend.run(inputs), backend.run(inputs, scale=SHAPE["dim_k"] ** -0.5)
    for name, x in default.items():
        compare.assert_bitwise_equal(x, given[name], name)


@pytest.mark.every_dtype
def test_states_with_v_first_are_the_transposed_ones(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    k_first = backend.run(inputs, initial_state=initial_state, d_final_state=d_final_state)
    v_first = backend.run(
        inputs,
        initial_state=initial_state.transpose(2, 3).contiguous(),
        d_final_state=d_final_state.transpose(2, 3).contiguous(),
        state_v_first=True,
    )
    for name, x in v_first.items():
        expected = k_first[name].transpose(2, 3) if name in ("S", "d_initial_state") else k_first[name]
        compare.assert_close(x, expected, backend.bar(name), name)


def test_the_final_state_comes_only_when_asked_for(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    o, nothing = backend.forward(inputs)
    assert nothing is None
    with_state, final_state = backend.forward(inputs, output_final_state=True)
    assert final_state.shape == (2, 2, 32, 48)
    assert final_state.is_contiguous()
    compare.assert_bitwise_equal(o, with_state, "o with and without the final state")


def test_safe_gate_changes_nothing(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    plain, safe = backend.run(inputs), backend.run(inputs, safe_gate=True)
    for name, x in plain.items():
        compare.assert_bitwise_equal(x, safe[name], name)


def test_a_lower_bound_without_the_gate_changes_nothing(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    plain, bounded = backend.run(inputs), backend.run(inputs, lower_bound=-1e-3)
    for name, x in plain.items():
        compare.assert_bitwise_equal(x, bounded[name], name)


@pytest.mark.parametrize("seqlen", [0, 1, 200])
@pytest.mark.parametrize("kind", ["plain", "everything", "split", "packed"])
def test_keeping_more_for_the_backward_changes_no_bit(backend, kind, seqlen, seed):
    shape = {**SHAPE, "seqlen": seqlen, "value_heads": 4}
    options = {"state_v_first": kind == "plain"}
    if kind == "everything":
        inputs = backend.raw_inputs(**shape, seed=seed)
        options |= EVERYTHING
    else:
        inputs = backend.inputs("slow", **{**shape, "batch": 1 if kind == "packed" else 2}, seed=seed)
    if kind == "split":
        options["sequence_split"] = 3
    if kind == "packed":
        lengths = (seqlen // 2, 0, seqlen - seqlen // 2)
        options["cu_seqlens"] = cases.packed_offsets(lengths, device=backend.device)
    states = backend.states(
        inputs, number=3 if kind == "packed" else None, seed=seed, v_first=kind == "plain"
    )
    options |= {"initial_state": states[0], "d_final_state": states[1]}
    again, kept = backend.run(inputs, **options), backend.run(inputs, disable_recompute=True, **options)
    for name, x in again.items():
        compare.assert_bitwise_equal(x, kept[name], name)


@pytest.mark.parametrize("sequence_split", [None, 1, 2, 7])
def test_any_sequence_split_is_exact(backend, sequence_split, seed):
    inputs = backend.inputs("slow", seqlen=300, heads=2, dim_k=32, dim_v=32, seed=seed)
    check(backend, inputs, seed, sequence_split=sequence_split)


# -- states at the chunks' starts ----------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [0, 1, 64, 65, 200])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dim_k, dim_v", [(16, 32), (100, 130)])
def test_the_states_at_every_chunks_start(backend, dim_k, dim_v, v_first, seqlen, seed):
    shape = {"seqlen": seqlen, "heads": 2, "value_heads": 4, "dim_k": dim_k, "dim_v": dim_v}
    inputs = backend.inputs("slow", batch=2, **shape, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed, v_first=v_first)
    options = {"initial_state": initial_state, "state_v_first": v_first}
    o, final_state, h = backend.forward(
        inputs, return_intermediate_states=True, output_final_state=True, **options
    )
    assert h.dtype == backend.state_dtype
    backend.check({"o": o, "S": final_state, "h": h}, backend.expected(inputs, **options))
    if seqlen > 0:
        compare.assert_bitwise_equal(h[:, 0], initial_state, "the first chunk's state")


def test_intermediate_states_are_for_inference_only(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    with pytest.raises(
        ValueError, match="return_intermediate_states: for inference only, but an input requires grad"
    ):
        backend.run(inputs, return_intermediate_states=True)
    inputs.q.requires_grad_()
    o, final_state, h = backend.forward(inputs, return_intermediate_states=True)  # under no_grad
    assert final_state is None
    assert h.shape == (2, 2, 2, 32, 48)
    assert not (o.requires_grad or h.requires_grad)


# -- many heads ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.every_dtype
@pytest.mark.parametrize("v_first", [False, True])
def test_everything_at_once_with_more_value_columns_than_fit_one_by_one(hopper, v_first, seed):
    """Where walks of 64 value columns would not run all at once, two of them share a CTA."""
    shape = {"batch": 2, "seqlen": 70, "heads": 10, "value_heads": 20, "dim_k": 128, "dim_v": 256}
    inputs = hopper.raw_inputs(**shape, seed=seed)
    check(hopper, inputs, seed, v_first=v_first, lower_bound=-0.02, **EVERYTHING)
