"""Never a wrong result for a layout: views of every kind, of every input and of the incoming gradients."""

import cases
import compare
import pytest
import torch

SHAPE = {"batch": 2, "seqlen": 70, "heads": 2, "value_heads": 4, "dim_k": 32, "dim_v": 32}
TOKENS = ("q", "k", "v", "g", "b", "w", "do")


def heads_before_tokens(x):
    """[B, T, H, D] as a view of memory in the order [B, H, T, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_before_tokens(x):
    """The channels are not next to each other."""
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def tokens_before_batch(x):
    """[T, B, H, D], as sequence-first models have it."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def part_of_a_wider_projection(x):
    """As q is in a fused q-k-v projection: rows lie further apart than they are long."""
    wider = torch.full((*x.shape[:2], 3, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
    wider[:, :, 1] = x
    return wider[:, :, 1]


def every_other_channel(x):
    wider = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wider[..., ::2] = x
    return wider[..., ::2]


def every_other_token(x):
    longer = torch.full(
        (x.shape[0], 2 * x.shape[1], *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device
    )
    longer[:, 1::2] = x
    return longer[:, 1::2]


def one_element_into_its_memory(x):
    """Not aligned to anything but its element."""
    memory = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


VIEWS = (
    heads_before_tokens,
    channels_before_tokens,
    tokens_before_batch,
    part_of_a_wider_projection,
    every_other_channel,
    every_other_token,
    one_element_into_its_memory,
)
every_view = pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        compare.assert_bitwise_equal(x, expected[name], name)


@every_view
@pytest.mark.parametrize("name", TOKENS)
def test_a_view_of_one_tensor_is_read_as_it_is(backend, name, view, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    expected = backend.run(inputs)
    contiguous = getattr(inputs, name)
    setattr(inputs, name, view(contiguous))
    assert torch.equal(getattr(inputs, name), contiguous)
    assert_same(backend.run(inputs), expected)


@every_view
def test_views_of_all_tensors_at_once_are_read_as_they_are(backend, view, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    expected = backend.run(inputs)
    assert_same(backend.run(cases.Inputs(*map(view, inputs.tensors), do=view(inputs.do))), expected)


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
@pytest.mark.parametrize("name", TOKENS)
def test_an_expanded_tensor_is_read_as_it_is(backend, name, dimension, seed):
    """Stride 0, in every dimension."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    x = getattr(inputs, name)
    expanded = x.narrow(dimension, 0, 1).expand(x.shape)
    setattr(inputs, name, expanded.clone(memory_format=torch.contiguous_format))
    expected = backend.run(inputs)
    setattr(inputs, name, expanded)
    assert expanded.stride(dimension) == 0
    assert_same(backend.run(inputs), expected)


def test_a_gradient_that_is_one_number_is_read_as_it_is(backend, seed):
    """What o.sum().backward() sends: a scalar expanded in every dimension."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    inputs.do = torch.ones_like(inputs.do)
    expected = backend.run(inputs)
    inputs.do = torch.ones((), dtype=backend.dtype, device=backend.device).expand(inputs.do.shape)
    assert_same(backend.run(inputs), expected)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("of", ["initial_state", "d_final_state"])
def test_states_may_be_views(backend, of, v_first, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    options = dict(
        zip(
            ("initial_state", "d_final_state"),
            backend.states(inputs, seed=seed, v_first=v_first),
            strict=True,
        )
    )
    expected = backend.run(inputs, state_v_first=v_first, **options)
    contiguous = options[of]
    views = {
        "transposed matrices": contiguous.transpose(2, 3).contiguous().transpose(2, 3),
        "transposed heads": contiguous.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": contiguous.repeat_interleave(2, dim=0)[::2],
        "one element into its memory": one_element_into_its_memory(contiguous),
    }
    for view in views.values():
        assert_same(backend.run(inputs, state_v_first=v_first, **{**options, of: view}), expected)


def test_an_expanded_state_is_read_as_it_is(backend, seed):
    """One learned initial state for every sequence."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    initial_state = backend.states(inputs, seed=seed)[0][:1]
    expected = backend.run(inputs, initial_state=initial_state.repeat(2, 1, 1, 1))
    assert_same(backend.run(inputs, initial_state=initial_state.expand(2, -1, -1, -1)), expected)


def test_gate_parameters_may_be_views(backend, seed):
    """With norms and sigmoids, for without them states grow until they are not finite."""
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    expected = backend.run(inputs, **cases.EVERYTHING)
    inputs.A_log = inputs.A_log.repeat_interleave(2)[::2]
    inputs.dt_bias = inputs.dt_bias.view(2, 32).t().contiguous().t().as_strided((64,), (1,)).clone()
    inputs.dt_bias = torch.stack(
        [expected["d_dt_bias"], backend.raw_inputs(**SHAPE, seed=seed).dt_bias], dim=1
    )[:, 1]
    assert not inputs.A_log.is_contiguous() and not inputs.dt_bias.is_contiguous()
    assert_same(backend.run(inputs, **cases.EVERYTHING), expected)


def test_offsets_may_be_a_view(backend, seed):
    inputs = backend.inputs("slow", **{**SHAPE, "batch": 1}, seed=seed)
    cu_seqlens = torch.tensor([0, 30, 70], device=backend.device)
    expected = backend.run(inputs, cu_seqlens=cu_seqlens)
    assert_same(backend.run(inputs, cu_seqlens=cu_seqlens.repeat_interleave(3)[::3]), expected)


@every_view
def test_packed_tokens_may_be_views(backend, view, seed):
    inputs = backend.inputs("slow", **{**SHAPE, "batch": 1}, seed=seed)
    options = {"cu_seqlens": torch.tensor([0, 13, 13, 70], device=backend.device)}
    expected = backend.run(inputs, **options)
    assert_same(
        backend.run(cases.Inputs(*map(view, inputs.tensors), do=view(inputs.do)), **options), expected
    )


def test_no_input_is_written_to(backend, seed):
    inputs = backend.raw_inputs(**SHAPE, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    tensors = [*inputs.tensors, inputs.do, inputs.A_log, inputs.dt_bias, initial_state, d_final_state]
    copies = [x.clone() for x in tensors]
    everything = {
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_gate_sigmoid_in_kernel": True,
    }
    backend.run(inputs, initial_state=initial_state, d_final_state=d_final_state, **everything)
    for x, copy in zip(tensors, copies, strict=True):
        compare.assert_bitwise_equal(x, copy, "an input")


def test_results_share_no_memory_with_the_inputs(backend, seed):
    """Also where a result equals an input: the state of an empty sequence, and its gradient."""
    inputs = backend.inputs(batch=2, seqlen=0, heads=2, dim_k=16, dim_v=16, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    results = backend.run(inputs, initial_state=initial_state, d_final_state=d_final_state)
    assert results["S"].data_ptr() != initial_state.data_ptr()
    assert results["d_initial_state"].data_ptr() != d_final_state.data_ptr()
