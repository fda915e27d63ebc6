"""Every shape of the contract: lengths, head sizes, batches, groups with gates per key or per value head."""

import cases
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from gdn2_ext import supports

PRIMES = (2, 3, 31, 37, 61, 67, 127, 131, 193)
LENGTHS = tuple(sorted({*cases.LENGTHS, *PRIMES, 32, 33, 128, 129}))
HEAD_SIZES = (
    (16, 16),
    (16, 192),
    (192, 16),
    (32, 96),
    (96, 32),
    (64, 64),
    (64, 128),
    (128, 64),
    (128, 128),
    (128, 256),
    (192, 192),
)
ODD_HEAD_SIZES = ((1, 1), (1, 20), (20, 1), (17, 33), (100, 60))


# What lies more than a few tokens back shows where decays are slow only.
every_pace = pytest.mark.parametrize("regime", ["slow", "uniform5"])


def check(backend, seed: int, regime: str, **shape) -> None:
    inputs = backend.inputs(regime, seed=seed, **shape)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    states = {"initial_state": initial_state, "d_final_state": d_final_state}
    results = backend.run(inputs, **states)
    parallel_keys, checked = inputs.k.shape[3] == 1, dict(results)
    if parallel_keys and regime == "slow" and backend.name == "cuda":
        # Gradients are sums of what cancels where nothing decays: in 16 bits there is no bar for them.
        checked = {name: results[name] for name in ("o", "S")}
    backend.check(checked, backend.expected(inputs, **states), parallel_keys=parallel_keys)
    assert results["o"].dtype == inputs.q.dtype
    assert results["S"].dtype == backend.state_dtype
    for name, x in zip(("dq", "dk", "dv", "dg", "db", "dw"), inputs.tensors, strict=True):
        assert (results[name].dtype, results[name].shape) == (x.dtype, x.shape), name


@every_pace
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_any_length(backend, seqlen, regime, seed):
    check(backend, seed, regime, batch=2, seqlen=seqlen, heads=2, dim_k=32, dim_v=48)


@every_pace
@pytest.mark.parametrize("dim_k, dim_v", HEAD_SIZES)
def test_any_mix_of_head_sizes(backend, dim_k, dim_v, regime, seed):
    supported, reason = supports(*backend.inputs(seqlen=1, heads=1, dim_k=dim_k, dim_v=dim_v).tensors)
    if backend.name == "cuda" and not supported:
        pytest.skip(reason)
    check(backend, seed, regime, seqlen=200, heads=2, dim_k=dim_k, dim_v=dim_v)


@every_pace
@pytest.mark.parametrize("dim_k, dim_v", ODD_HEAD_SIZES)
def test_odd_head_sizes(backend, dim_k, dim_v, regime, seed):
    check(backend, seed, regime, batch=2, seqlen=70, heads=1, dim_k=dim_k, dim_v=dim_v)


@pytest.mark.every_dtype
@pytest.mark.parametrize("gate_heads", ["key", "value"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 3])
def test_groups_of_value_heads_share_a_key_head(backend, heads, groups, gate_heads, seed):
    """Gates come per key head, or per value head: then q and k are shared by a group and the decay is not."""
    shape = {"heads": heads, "value_heads": heads * groups, "dim_k": 32, "dim_v": 16}
    check(backend, seed, "slow", batch=2, seqlen=70, gate_heads=gate_heads, **shape)


@pytest.mark.parametrize("gate_heads", ["key", "value"])
def test_a_group_equals_repeated_key_heads(backend, gate_heads, seed):
    """The same numbers as with q, k, g and b repeated by hand; the sums over a group may be reordered."""
    grouped = backend.inputs(
        "slow", seqlen=100, heads=2, value_heads=6, gate_heads=gate_heads, dim_k=32, dim_v=32, seed=seed
    )
    initial_state, d_final_state = backend.states(grouped, seed=seed)
    options = {"initial_state": initial_state, "d_final_state": d_final_state}

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(6 // x.shape[2], dim=2)

    single = cases.Inputs(*(repeated(x) if x.shape[2] != 6 else x for x in grouped.tensors), do=grouped.do)
    actual, expected = backend.run(grouped, **options), backend.run(single, **options)
    for name in ("dq", "dk", "dg", "db"):
        heads = actual[name].shape[2]
        expected[name] = expected[name].double().unflatten(2, (heads, -1)).sum(3)
    backend.check(actual, expected)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_rows_are_separate_sequences(backend, batch, seed):
    check(backend, seed, "slow", batch=batch, seqlen=65, heads=2, dim_k=16, dim_v=32)


def test_an_empty_sequence_passes_its_state_and_its_gradient_through(backend, seed):
    inputs = backend.inputs(batch=3, seqlen=0, heads=2, dim_k=16, dim_v=32, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    results = backend.run(inputs, initial_state=initial_state, d_final_state=d_final_state)
    assert results["o"].shape == (3, 0, 2, 32)
    assert torch.equal(results["S"], initial_state)
    assert torch.equal(results["d_initial_state"], d_final_state)


def test_an_empty_batch_gives_empty_results(backend, seed):
    """What a data-parallel worker without samples calls the op with."""
    inputs = backend.inputs(batch=0, seqlen=70, heads=2, dim_k=16, dim_v=32, seed=seed)
    results = backend.run(inputs)
    assert results["o"].shape == (0, 70, 2, 32)
    assert results["S"].shape == (0, 2, 16, 32)
    for name, x in zip(("dq", "dk", "dv", "dg", "db", "dw"), inputs.tensors, strict=True):
        assert results[name].shape == x.shape, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "seqlen, dim_k, dim_v", [(700, 16, 16), (130, 64, 128), (130, 128, 192), (130, 128, 256)]
)
def test_many_heads_and_chunks_are_all_computed(backend, seqlen, dim_k, dim_v, seed):
    """More heads and chunks than can be compared everywhere: the last head against the reference."""
    shape = {"batch": 2, "seqlen": seqlen, "heads": 40, "dim_k": dim_k, "dim_v": dim_v}
    inputs = backend.inputs("slow", **shape, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    results = backend.run(inputs, initial_state=initial_state, d_final_state=d_final_state)
    last = cases.Inputs(*(x[1:, :, 39:] for x in inputs.tensors), do=inputs.do[1:, :, 39:])
    states = {"initial_state": initial_state[1:, 39:], "d_final_state": d_final_state[1:, 39:]}
    results = {
        name: x[1:, 39:] if name in ("S", "d_initial_state") else x[1:, :, 39:] for name, x in results.items()
    }
    backend.check(results, backend.expected(last, **states))


# Shapes and options that nobody thought of. With few channels all keys are nearly parallel, which the chunk
# form answers with a loss of accuracy: float64 has enough of it to spare, 16-bit inputs get more channels.
CALLS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "seqlen": st.integers(0, 140),
        "heads": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "dim_k": st.integers(1, 40),
        "dim_v": st.integers(1, 40),
        "gate_heads": st.sampled_from(["key", "value"]),
        "regime": st.sampled_from(cases.REGIMES),
        "seed": st.integers(0, 10_000),
    }
)


def drawn_inputs(backend, call: dict) -> cases.Inputs:
    call = {**call, "value_heads": call["heads"] * call["groups"]}
    if backend.name == "cuda":
        call["dim_k"] += 15
    return backend.inputs(**{name: value for name, value in call.items() if name != "groups"})


@pytest.mark.most_exact_dtype
@hypothesis.given(
    call=CALLS, with_state=st.booleans(), v_first=st.booleans(), scale=st.none() | st.floats(0.1, 2.0)
)
def test_any_dense_call_agrees_with_the_reference(backend, call, with_state, v_first, scale):
    inputs = drawn_inputs(backend, call)
    options = {"scale": scale, "state_v_first": v_first}
    if with_state:
        options["initial_state"], options["d_final_state"] = backend.states(
            inputs, seed=call["seed"], v_first=v_first
        )
    backend.check_against_reference(inputs, **options)


@pytest.mark.most_exact_dtype
@hypothesis.given(
    call=CALLS, lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5), wide=st.booleans()
)
def test_any_packed_call_agrees_with_the_reference(backend, call, lengths, wide):
    inputs = drawn_inputs(backend, {**call, "batch": 1, "seqlen": sum(lengths)})
    dtype = torch.int64 if wide else torch.int32
    initial_state, d_final_state = backend.states(inputs, number=len(lengths), seed=call["seed"])
    backend.check_against_reference(
        inputs,
        initial_state=initial_state,
        d_final_state=d_final_state,
        cu_seqlens=cases.packed_offsets(lengths, dtype=dtype, device=backend.device),
    )
