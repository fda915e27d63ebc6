"""Accuracy: o, the final state and every gradient against the float64 reference, at each regime's bar."""

import cases
import compare
import pytest
import torch

CONSTANT_DECAYS = (0.0, -1.0, -5.0, -8.0, -20.0, -100.0, -float("inf"))

# Kernels have other forms for K up to 64 and beyond, and for parts of 64 value columns.
small_and_large = pytest.mark.parametrize("dim_k, dim_v", [(32, 48), (128, 128)])


@pytest.mark.every_dtype
@pytest.mark.parametrize("regime", cases.REGIMES)
def test_every_tensor_meets_the_bar_of_its_regime(backend, regime):
    """The shape of the accuracy table, with gradients through o; on the CPU with one head and one seed."""
    seeds, heads = ((1, 2, 3), 4) if backend.device.type == "cuda" else ((1,), 1)
    for seed in seeds:
        print(f"seed = {seed}")
        inputs = backend.inputs(regime, seqlen=1024, heads=heads, seed=seed)
        backend.check_against_reference(inputs, regime)


KINDS_OF_CALLS = {
    "one head": {},
    "states with v first": {"v_first": True},
    "a group": {"value_heads": 2},
    "gates per value head": {"value_heads": 2, "gate_heads": "value"},
    "packed": {"lengths": (37, 0, 64, 1, 198)},
}


@pytest.mark.every_dtype
@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("kind", KINDS_OF_CALLS.values(), ids=KINDS_OF_CALLS)
def test_every_kind_of_call_meets_the_bar_of_its_regime(backend, kind, regime, seed):
    """With an initial state, and gradients through o and the final state."""
    kind = {"batch": 2, "seqlen": 300, **kind}
    v_first, lengths = kind.pop("v_first", False), kind.pop("lengths", None)
    options, number = {"state_v_first": v_first}, None
    if lengths is not None:
        kind |= {"batch": 1, "seqlen": sum(lengths)}
        options["cu_seqlens"], number = cases.packed_offsets(lengths, device=backend.device), len(lengths)
    inputs = backend.inputs(regime, heads=1, dim_k=128, dim_v=128, seed=seed, **kind)
    states = backend.states(inputs, seed=seed, number=number, v_first=v_first)
    options["initial_state"], options["d_final_state"] = states
    backend.check_against_reference(inputs, regime, **options)


@small_and_large
@pytest.mark.parametrize("g", CONSTANT_DECAYS)
def test_any_constant_decay_is_accurate(backend, g, dim_k, dim_v, seed):
    inputs = backend.inputs(seqlen=130, heads=2, dim_k=dim_k, dim_v=dim_v, seed=seed)
    inputs.g.fill_(g)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    backend.check_against_reference(inputs, initial_state=initial_state, d_final_state=d_final_state)


@small_and_large
@pytest.mark.parametrize("g", CONSTANT_DECAYS)
def test_any_decay_beside_a_slow_channel_is_accurate(backend, g, dim_k, dim_v, seed):
    """Half of the channels decay by g: what the fast ones lose must not cost the slow ones."""
    inputs = backend.inputs("slow", seqlen=130, heads=2, dim_k=dim_k, dim_v=dim_v, seed=seed)
    inputs.g[..., ::2] = g
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    backend.check_against_reference(inputs, initial_state=initial_state, d_final_state=d_final_state)


def test_every_decay_at_once_is_accurate(backend, seed):
    """A different constant in every channel, and another order of them in every token."""
    inputs = backend.inputs(seqlen=130, heads=2, dim_k=70, dim_v=32, seed=seed)
    values = torch.tensor(CONSTANT_DECAYS, device=backend.device).repeat(10)
    for t in range(inputs.g.shape[1]):
        inputs.g[:, t] = values.roll(t)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    backend.check_against_reference(inputs, initial_state=initial_state, d_final_state=d_final_state)


@pytest.mark.parametrize("reset_at", [0, 1, 31, 32, 63, 64, 100, 129])
def test_a_reset_of_every_channel_forgets_exactly(backend, reset_at, seed):
    """g = -inf in one token: what lies before it leaves no trace in the final state."""
    inputs = backend.inputs("slow", seqlen=130, heads=2, dim_k=32, dim_v=32, seed=seed)
    inputs.g[:, reset_at] = -float("inf")
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    backend.check_against_reference(inputs, initial_state=initial_state, d_final_state=d_final_state)
    _, final_state = backend.forward(inputs, initial_state=initial_state, output_final_state=True)
    _, without_past = backend.forward(inputs, initial_state=None, output_final_state=True)
    compare.assert_bitwise_equal(final_state, without_past, "S with and without a past before the reset")


@pytest.mark.parametrize("dim_k, dim_v", [(64, 32), (128, 128)])  # fewer channels: keys nearer to parallel
@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("b", [0.0, 1.0, 2.0])
def test_saturated_gates_are_accurate(backend, b, w, dim_k, dim_v, seed):
    inputs = backend.inputs("slow", seqlen=130, heads=2, dim_k=dim_k, dim_v=dim_v, seed=seed)
    inputs.b.fill_(b)
    inputs.w.fill_(w)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    backend.check_against_reference(inputs, initial_state=initial_state, d_final_state=d_final_state)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.0])
def test_write_gates_above_one_are_accurate(backend, w, seed):
    """Nothing in the equations needs w <= 1."""
    inputs = backend.inputs("slow", seqlen=70, heads=1, dim_k=32, dim_v=32, seed=seed)
    inputs.w[..., ::2] = w
    backend.check_against_reference(inputs)


@pytest.mark.every_dtype
@pytest.mark.parametrize("dim", [64, 128])
def test_near_parallel_keys_with_full_erase_stay_close(backend, dim):
    """The hardest keys. Their bar is for o; everything else must be finite, and exact in float64."""
    for seed in (1, 2, 3):
        print(f"seed = {seed}")
        dtypes = {"dtype": backend.dtype, "gate_dtype": backend.state_dtype, "device": backend.device}
        inputs = cases.near_parallel_keys(seqlen=256, heads=2, dim_k=dim, dim_v=dim, seed=seed, **dtypes)
        results, expected = backend.run(inputs), backend.expected(inputs)
        for name, x in results.items():
            assert torch.isfinite(x).all(), (
                f"{name}: not finite at {torch.nonzero(~torch.isfinite(x))[0].tolist()}"
            )
        compare.assert_close(results["o"], expected["o"], cases.NEAR_PARALLEL_O_BAR, "o")
        if backend.dtype == torch.float64:
            backend.check(results, expected)


@pytest.mark.every_dtype
@pytest.mark.parametrize("regime", ["slow", "uniform5"])
def test_a_decay_in_the_dtype_of_q_is_read_as_it_is(backend, regime, seed):
    """g rounded to the input dtype: the reference gets the same rounded decay."""
    inputs = backend.inputs(regime, batch=1, seqlen=130, heads=2, dim_k=64, dim_v=64, seed=seed)
    inputs.g = inputs.g.to(backend.dtype)
    results = backend.check_against_reference(inputs)
    assert results["dg"].dtype == backend.dtype


def test_zero_inputs_give_zero_outputs_and_finite_gradients(backend, seed):
    inputs = backend.inputs(seqlen=70, heads=2, dim_k=32, dim_v=32, seed=seed)
    for x in inputs.tensors:
        x.zero_()
    results = backend.run(inputs)
    for name, x in results.items():
        assert not x.any(), f"{name} is not zero"
