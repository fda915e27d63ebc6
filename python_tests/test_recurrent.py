"""fused_recurrent_gdn2: the recurrence token by token, from a state or a pool of states, and back into it."""

import cases
import compare
import pytest
import torch

from gdn2_ext import chunk_gdn2, fused_recurrent_gdn2

pytestmark = pytest.mark.recurrent

SHAPE = {"heads": 2, "value_heads": 4, "dim_k": 16, "dim_v": 32}
EVERYTHING = {**cases.EVERYTHING, "erase_scale": 2}


def decode(backend, inputs: cases.Inputs, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    options = {"output_final_state": True, **options}
    return fused_recurrent_gdn2(*inputs.tensors, **options, backend=backend.name)


def rows(inputs: cases.Inputs, which) -> cases.Inputs:
    """Some of the batch rows."""
    return cases.Inputs(*(x[which] for x in inputs.tensors), do=inputs.do[which])


def tokens(inputs: cases.Inputs, which) -> cases.Inputs:
    """Some of the tokens."""
    return cases.Inputs(*(x[:, which] for x in inputs.tensors), do=inputs.do[:, which])


# -- the recurrence ------------------------------------------------------------------------------------------


@pytest.mark.every_dtype
@pytest.mark.parametrize("regime", cases.REGIMES)
def test_the_token_form_meets_the_bar_of_every_regime(backend, regime, seed):
    inputs = backend.inputs(regime, batch=2, seqlen=100, heads=2, dim_k=64, dim_v=64, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    o, S = decode(backend, inputs, initial_state=initial_state)
    assert o.dtype == backend.dtype and S.dtype == backend.state_dtype
    backend.check({"o": o, "S": S}, backend.expected(inputs, initial_state=initial_state), regime)


@pytest.mark.parametrize("seqlen", [0, 1, 2, 3, 17, 64, 65])
@pytest.mark.parametrize("gate_heads", ["key", "value"])
def test_any_length_and_either_kind_of_gate_heads(backend, gate_heads, seqlen, seed):
    inputs = backend.inputs(batch=3, seqlen=seqlen, **SHAPE, gate_heads=gate_heads, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    o, S = decode(backend, inputs, initial_state=initial_state)
    backend.check({"o": o, "S": S}, backend.expected(inputs, initial_state=initial_state))


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_everything_in_the_kernel_at_once(backend, lower_bound, v_first, seed):
    inputs = backend.raw_inputs(batch=2, seqlen=20, **SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed, v_first=v_first)
    options = {
        "initial_state": initial_state,
        "state_v_first": v_first,
        "lower_bound": lower_bound,
        "scale": 0.7,
    }
    options |= {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, **EVERYTHING}
    o, S = decode(backend, inputs, **options)
    backend.check({"o": o, "S": S}, backend.expected(inputs, **options))


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize(
    "dim_k, dim_v", [(128, 128), (128, 256), (64, 64), (100, 40), (127, 250), (5, 3), (1, 1)]
)
def test_any_head_sizes(backend, dim_k, dim_v, v_first, seed):
    """Also rows of states that are not made of whole 16 bytes."""
    sizes = {"heads": 1, "value_heads": 2, "dim_k": dim_k, "dim_v": dim_v}
    inputs = backend.inputs("slow", batch=2, seqlen=3, **sizes, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed, v_first=v_first)
    options = {"initial_state": initial_state, "state_v_first": v_first}
    o, S = decode(backend, inputs, **options)
    backend.check({"o": o, "S": S}, backend.expected(inputs, **options))


@pytest.mark.parametrize("v_first", [False, True])
def test_token_by_token_equals_all_at_once_bit_for_bit(backend, v_first, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=5, **SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed, v_first=v_first)
    o, S = decode(backend, inputs, initial_state=initial_state, state_v_first=v_first)
    state = initial_state
    for t in range(5):
        token = tokens(inputs, slice(t, t + 1))
        o_t, state = decode(backend, token, initial_state=state, state_v_first=v_first)
        compare.assert_bitwise_equal(o_t, o[:, t : t + 1], f"o of token {t}")
    compare.assert_bitwise_equal(state, S, "the final state")


@pytest.mark.parametrize("g", [0.0, -20.0, -float("inf")])
def test_any_decay(backend, g, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=20, **SHAPE, seed=seed)
    inputs.g[..., ::2] = g
    initial_state, _ = backend.states(inputs, seed=seed)
    o, S = decode(backend, inputs, initial_state=initial_state)
    backend.check({"o": o, "S": S}, backend.expected(inputs, initial_state=initial_state))


@pytest.mark.parametrize("lengths", [cases.PACKED_LENGTHS, (1, 1, 1), (0, 0), (33,)])
def test_packed_sequences(backend, lengths, seed):
    inputs = backend.inputs("slow", seqlen=sum(lengths), **SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, number=len(lengths), seed=seed)
    cu_seqlens = cases.packed_offsets(lengths, device=backend.device)
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    o, S = decode(backend, inputs, **options)
    backend.check({"o": o, "S": S}, backend.expected(inputs, **options))
    for n, length in enumerate(lengths):
        begin = sum(lengths[:n])
        alone = tokens(inputs, slice(begin, begin + length))
        o_alone, S_alone = decode(backend, alone, initial_state=initial_state[n : n + 1])
        compare.assert_bitwise_equal(o[:, begin : begin + length], o_alone, f"o of sequence {n}")
        compare.assert_bitwise_equal(S[n : n + 1], S_alone, f"S of sequence {n}")


@pytest.mark.parametrize(
    "offsets, good", [([0, 5, 3, 9], 1), ([1, 5, 9], 0), ([0, 4, 90], 1), ([0, 4, 6], 2)]
)
def test_malformed_offsets_give_nan_from_the_first_bad_sequence_on(
    backend, offsets_on_device_only, offsets, good, seed
):
    inputs = backend.inputs("slow", seqlen=9, **SHAPE, seed=seed)
    cu_seqlens = torch.tensor(offsets, device=backend.device)
    o, S = decode(backend, inputs, cu_seqlens=cu_seqlens)
    for n in range(good):
        begin, end = offsets[n : n + 2]
        o_alone, S_alone = decode(backend, tokens(inputs, slice(begin, end)))
        compare.assert_bitwise_equal(o[:, begin:end], o_alone, f"o of sequence {n}")
        compare.assert_bitwise_equal(S[n : n + 1], S_alone, f"S of sequence {n}")
    assert o[:, offsets[good] if good else 0 :].isnan().all()
    assert S[good:].isnan().all()


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 90])
def test_a_prompt_in_chunks_and_an_answer_by_token_equal_the_whole(backend, prompt, v_first, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=96, **SHAPE, seed=seed)
    options = {"output_final_state": True, "state_v_first": v_first}
    expected = backend.expected(inputs, state_v_first=v_first)
    first, state = chunk_gdn2(*tokens(inputs, slice(0, prompt)).tensors, **options)
    outputs = [first]
    for t in range(prompt, 96):
        o, state = decode(backend, tokens(inputs, slice(t, t + 1)), initial_state=state, **options)
        outputs.append(o)
    backend.check({"o": torch.cat(outputs, dim=1), "S": state}, expected)


def test_segments_of_raw_projections_equal_the_whole(backend, seed):
    """Prefill 30 tokens, decode 1, then 3 at once, then prefill 20 more from there."""
    inputs = backend.raw_inputs(batch=2, seqlen=54, **SHAPE, seed=seed)
    options = {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, **EVERYTHING}
    expected = backend.expected(inputs, **options)
    outputs, state = [], None
    for begin, end, in_chunks in ((0, 30, True), (30, 31, False), (31, 34, False), (34, 54, True)):
        part = tokens(inputs, slice(begin, end))
        if in_chunks:
            o, state = chunk_gdn2(*part.tensors, initial_state=state, output_final_state=True, **options)
        else:
            o, state = decode(backend, part, initial_state=state, **options)
        outputs.append(o)
    backend.check({"o": torch.cat(outputs, dim=1), "S": state}, expected)


def interleaved(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def heads_before_tokens(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_a_wider_projection(x):
    return torch.stack([torch.full_like(x, float("nan")), x], dim=2)[:, :, 1]


@pytest.mark.parametrize("view", [interleaved, heads_before_tokens, part_of_a_wider_projection])
def test_views_are_read_as_they_are(backend, view, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    expected = backend.expected(inputs, initial_state=initial_state)
    viewed = cases.Inputs(*map(view, inputs.tensors), do=inputs.do)
    transposed_state = initial_state.transpose(2, 3).contiguous().transpose(2, 3)
    for state in (initial_state, transposed_state):
        o, S = decode(backend, viewed, initial_state=state)
        backend.check({"o": o, "S": S}, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_pool_may_be_a_view(backend, inplace, seed):
    """A layer's part of a cache of all layers."""
    inputs = backend.inputs("slow", batch=2, seqlen=1, **SHAPE, seed=seed)
    cache = torch.stack([new_pool(backend, seed + layer) for layer in range(3)], dim=1)
    before = cache.clone()
    indices = torch.tensor([9, 2], device=backend.device)
    o, S = decode(
        backend, inputs, initial_state=cache[:, 1], state_indices=indices, inplace_final_state=inplace
    )
    expected = backend.expected(inputs, initial_state=before[[9, 2], 1])
    backend.check({"o": o, "S": cache[[9, 2], 1] if inplace else S}, expected)
    assert_other_slots_untouched(cache[:, 1], before[:, 1], written=[9, 2] if inplace else [])
    compare.assert_bitwise_equal(cache[:, ::2], before[:, ::2], "the other layers", nan=True)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("seqlen", [1, 2])
def test_what_lies_between_the_rows_of_a_pool_is_left_alone(backend, seqlen, v_first, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=seqlen, **SHAPE, seed=seed)
    rows_of_states = new_pool(backend, seed, v_first=v_first)
    cache = torch.nn.functional.pad(rows_of_states, (0, 8, 0, 3, 0, 2), value=float("nan"))
    before = cache.clone()
    heads, outer, inner = rows_of_states.shape[1:]
    indices = torch.tensor([9, 2], device=backend.device)
    options = {"state_v_first": v_first, "state_indices": indices, "inplace_final_state": True}
    o, S = decode(backend, inputs, initial_state=cache[:, :heads, :outer, :inner], **options)
    expected = backend.expected(inputs, initial_state=rows_of_states[[9, 2]], state_v_first=v_first)
    backend.check({"o": o, "S": S[[9, 2]]}, expected)
    cache[[9, 2], :heads, :outer, :inner] = before[[9, 2], :heads, :outer, :inner]
    compare.assert_bitwise_equal(cache, before, "everything else", nan=True)


@pytest.mark.parametrize("seqlen", [1, 2])
def test_a_transposed_pool_is_written_where_it_lies(backend, seqlen, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=seqlen, **SHAPE, seed=seed)
    pool = new_pool(backend, seed, v_first=True)
    before = pool.clone()
    indices = torch.tensor([9, 2], device=backend.device)
    options = {"state_indices": indices, "inplace_final_state": True}
    o, _ = decode(backend, inputs, initial_state=pool.transpose(2, 3), **options)
    expected = backend.expected(inputs, initial_state=before[[9, 2]].transpose(2, 3))
    backend.check({"o": o, "S": pool[[9, 2]].transpose(2, 3)}, expected)
    assert_other_slots_untouched(pool, before, written=[9, 2])


# -- results -------------------------------------------------------------------------------------------------


def test_the_final_state_comes_only_when_asked_for(backend, seed):
    inputs = backend.inputs(batch=2, seqlen=3, **SHAPE, seed=seed)
    o, nothing = decode(backend, inputs, output_final_state=False)
    with_state, S = decode(backend, inputs)
    assert nothing is None
    assert S.shape == (2, 4, 16, 32)
    compare.assert_bitwise_equal(o, with_state, "o")


def test_the_output_goes_where_it_is_asked_to(backend, seed):
    inputs = backend.inputs(batch=2, seqlen=3, **SHAPE, seed=seed)
    expected, _ = decode(backend, inputs)
    out = torch.full_like(inputs.v, float("nan"))
    o, _ = decode(backend, inputs, out=out)
    assert o is out
    compare.assert_bitwise_equal(out, expected, "out")
    strided = torch.full((2, 3, 4, 64), float("nan"), dtype=backend.dtype, device=backend.device)
    o, _ = decode(backend, inputs, out=strided[..., :32])
    compare.assert_bitwise_equal(strided[..., :32], expected, "out")
    assert strided[..., 32:].isnan().all()


def test_output_and_pool_are_written_together(backend, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=1, **SHAPE, seed=seed)
    pool = new_pool(backend, seed)
    before, out = pool.clone(), torch.full_like(inputs.v, float("nan"))
    indices = torch.tensor([3, 1], device=backend.device)
    options = {"state_indices": indices, "inplace_final_state": True, "out": out}
    with torch.no_grad():
        o, S = decode(backend, inputs, initial_state=pool, **options)
    assert o is out and S is pool
    backend.check({"o": out, "S": pool[[3, 1]]}, backend.expected(inputs, initial_state=before[[3, 1]]))
    assert pool._version > 0 and out._version > 0, "autograd has to know of both writes"


def test_the_initial_state_stays_as_it_is(backend, seed):
    inputs = backend.inputs(batch=2, seqlen=3, **SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    before = initial_state.clone()
    decode(backend, inputs, initial_state=initial_state)
    compare.assert_bitwise_equal(initial_state, before, "initial_state")


@pytest.mark.parametrize("through", ["o", "final_state"])
def test_a_backward_through_it_says_what_to_use_instead(backend, through, seed):
    inputs = backend.inputs(batch=2, seqlen=3, **SHAPE, seed=seed)
    inputs.k.requires_grad_()
    o, S = decode(backend, inputs)
    with pytest.raises(
        RuntimeError, match="fused_recurrent_gdn2 is for inference and has no backward; train with chunk_gdn2"
    ):
        (o if through == "o" else S).float().sum().backward()


def test_a_backward_through_a_given_output_raises(backend, seed):
    inputs = backend.inputs(batch=2, seqlen=3, **SHAPE, seed=seed)
    inputs.k.requires_grad_()
    o, _ = decode(backend, inputs, out=torch.empty_like(inputs.v))
    with pytest.raises(RuntimeError, match="does not require grad|has no backward"):
        o.float().sum().backward()


def test_states_are_overwritten_without_gradients_alone(backend, seed):
    inputs = backend.inputs(batch=2, seqlen=3, **SHAPE, seed=seed)
    inputs.k.requires_grad_()
    pool = new_pool(backend, seed)
    before = pool.clone()
    indices = torch.tensor([0, 1], device=backend.device)
    options = {"initial_state": pool, "state_indices": indices, "inplace_final_state": True}
    with pytest.raises(ValueError, match="inplace_final_state: for inference only"):
        decode(backend, inputs, **options)
    compare.assert_bitwise_equal(pool, before, "pool", nan=True)
    with torch.no_grad():
        decode(backend, inputs, **options)
    assert not torch.equal(pool, before)


# -- a pool of states ----------------------------------------------------------------------------------------

SLOTS = 11


def new_pool(backend, seed: int, dtype: torch.dtype | None = None, v_first: bool = False) -> torch.Tensor:
    matrix = (32, 16) if v_first else (16, 32)
    return backend.normal(SLOTS, 4, *matrix, seed=seed + 7, dtype=dtype)


def poisoned(pool: torch.Tensor, used: list[int]) -> torch.Tensor:
    """The pool with NaN in every slot that is not used."""
    pool = pool.clone()
    pool[[slot for slot in range(SLOTS) if slot not in used]] = float("nan")
    return pool


def assert_other_slots_untouched(pool: torch.Tensor, before: torch.Tensor, written: list[int]) -> None:
    others = [slot for slot in range(SLOTS) if slot not in written]
    compare.assert_bitwise_equal(pool[others], before[others], "the other slots", nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_every_sequence_starts_from_its_slot(backend, index_dtype, v_first, inplace, seed):
    inputs = backend.inputs("slow", batch=3, seqlen=2, **SHAPE, seed=seed)
    slots = [7, 0, 4]
    before = poisoned(new_pool(backend, seed, v_first=v_first), slots)
    pool = before.clone()
    indices = torch.tensor(slots, dtype=index_dtype, device=backend.device)
    options = {"state_v_first": v_first}
    o, S = decode(
        backend, inputs, initial_state=pool, state_indices=indices, inplace_final_state=inplace, **options
    )
    expected = backend.expected(inputs, initial_state=before[slots], **options)
    if inplace:
        assert S is pool
        backend.check({"o": o, "S": pool[slots]}, expected)
        assert_other_slots_untouched(pool, before, written=slots)
    else:
        backend.check({"o": o, "S": S}, expected)
        compare.assert_bitwise_equal(pool, before, "the pool", nan=True)


def test_the_state_in_the_pool_is_not_returned_unless_asked_for(backend, seed):
    inputs = backend.inputs("slow", batch=1, seqlen=1, **SHAPE, seed=seed)
    pool = new_pool(backend, seed)
    before = pool.clone()
    indices = torch.tensor([3], device=backend.device)
    options = {"state_indices": indices, "inplace_final_state": True, "output_final_state": False}
    _, nothing = decode(backend, inputs, initial_state=pool, **options)
    assert nothing is None
    assert not torch.equal(pool[3], before[3]), "the pool is written to all the same"


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bad", [-1, -100, SLOTS, SLOTS + 1, 2**31 - 1])
def test_an_index_out_of_range_reads_and_writes_nothing(backend, bad, inplace, seed):
    inputs = backend.inputs("slow", batch=3, seqlen=2, **SHAPE, seed=seed)
    before = poisoned(new_pool(backend, seed), [7, 4])
    pool = before.clone()
    indices = torch.tensor([7, bad, 4], device=backend.device)
    o, S = decode(backend, inputs, initial_state=pool, state_indices=indices, inplace_final_state=inplace)
    assert not o[1].any(), "the output of a skipped sequence is not zero"
    assert inplace or not S[1].any(), "its final state is not zero"
    expected = backend.expected(rows(inputs, [0, 2]), initial_state=before[[7, 4]])
    backend.check({"o": o[[0, 2]], "S": pool[[7, 4]] if inplace else S[[0, 2]]}, expected)
    assert_other_slots_untouched(pool, before, written=[7, 4] if inplace else [])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_pool_in_bfloat16_is_read_in_float32_and_rounded_once(backend, inplace, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=5, **SHAPE, seed=seed)
    slots = [2, 9]
    before = poisoned(new_pool(backend, seed, dtype=torch.bfloat16), slots)
    pool = before.clone()
    indices = torch.tensor(slots, device=backend.device)
    o, S = decode(backend, inputs, initial_state=pool, state_indices=indices, inplace_final_state=inplace)
    unrounded_o, unrounded_S = decode(backend, inputs, initial_state=before[slots].to(backend.state_dtype))
    compare.assert_bitwise_equal(o, unrounded_o, "o")
    if inplace:
        assert S is pool and pool.dtype == torch.bfloat16
        compare.assert_bitwise_equal(pool[slots], unrounded_S.to(torch.bfloat16), "S")
        assert_other_slots_untouched(pool, before, written=slots)
    else:
        compare.assert_bitwise_equal(S, unrounded_S, "S")


@pytest.mark.parametrize("inplace", [False, True])
def test_packed_sequences_on_a_pool(backend, inplace, seed):
    lengths, slots = (3, 0, 1, 5), [6, 1, 10, 3]
    inputs = backend.inputs("slow", seqlen=sum(lengths), **SHAPE, seed=seed)
    before = poisoned(new_pool(backend, seed), slots)
    pool = before.clone()
    indices = torch.tensor(slots, device=backend.device)
    cu_seqlens = cases.packed_offsets(lengths, device=backend.device)
    options = {"state_indices": indices, "inplace_final_state": inplace, "cu_seqlens": cu_seqlens}
    o, S = decode(backend, inputs, initial_state=pool, **options)
    expected = backend.expected(inputs, initial_state=before[slots], cu_seqlens=cu_seqlens)
    backend.check({"o": o, "S": pool[slots] if inplace else S}, expected)
    assert_other_slots_untouched(pool, before, written=slots if inplace else [])


def test_malformed_packed_sequences_leave_the_pool_alone(backend, offsets_on_device_only, seed):
    inputs = backend.inputs("slow", seqlen=9, **SHAPE, seed=seed)
    pool = new_pool(backend, seed)
    before = pool.clone()
    cu_seqlens = torch.tensor([0, 4, 2, 9], device=backend.device)
    indices = torch.tensor([5, 6, 7], device=backend.device)
    o, _ = decode(
        backend,
        inputs,
        initial_state=pool,
        state_indices=indices,
        inplace_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    expected = backend.expected(tokens(inputs, slice(0, 4)), initial_state=before[5:6])
    backend.check({"o": o[:, :4], "S": pool[5:6]}, expected)
    assert o[:, 4:].isnan().all()
    assert_other_slots_untouched(pool, before, written=[5])


# -- a slot for every position: speculative decoding ---------------------------------------------------------

COLUMNS = [[3, 8, 0], [10, 5, 1]]  # of two sequences with three positions each


def states_after_each_token(backend, inputs: cases.Inputs, initial_state: torch.Tensor) -> list:
    """The reference's states after every token, by running every prefix."""
    return [
        backend.expected(tokens(inputs, slice(0, t + 1)), initial_state=initial_state)["S"]
        for t in range(inputs.q.shape[1])
    ]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("accepted", [None, [1, 1], [3, 1], [2, 3]])
def test_the_state_after_every_token_goes_to_its_slot(backend, accepted, index_dtype, seed):
    """The call starts from the state after the last accepted token of the previous one."""
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    start = [row[(count or 1) - 1] for row, count in zip(COLUMNS, accepted or [None, None], strict=True)]
    before = poisoned(new_pool(backend, seed), start)
    pool = before.clone()
    indices = torch.tensor(COLUMNS, dtype=index_dtype, device=backend.device)
    options = {"state_indices": indices, "inplace_final_state": True}
    if accepted is not None:
        options["num_accepted_tokens"] = torch.tensor(accepted, dtype=index_dtype, device=backend.device)
    o, S = decode(backend, inputs, initial_state=pool, **options)
    assert S is pool
    expected = backend.expected(inputs, initial_state=before[start])
    backend.check({"o": o}, expected)
    for t, states in enumerate(states_after_each_token(backend, inputs, before[start])):
        slots = [row[t] for row in COLUMNS]
        backend.check({"S": pool[slots]}, {"S": states}, where=f" after token {t}")
    assert_other_slots_untouched(pool, before, written=sum(COLUMNS, []))


def test_two_rounds_of_speculation_equal_one_run_of_what_was_accepted(backend, seed):
    """Draft three tokens, accept one and three of them, draft two more from there."""
    drafts = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    more = backend.inputs("slow", batch=2, seqlen=2, **SHAPE, seed=seed + 1)
    pool = new_pool(backend, seed)
    start = pool[[row[0] for row in COLUMNS]].clone()
    indices = torch.tensor(COLUMNS, device=backend.device)
    options = {"initial_state": pool, "state_indices": indices, "inplace_final_state": True}
    decode(backend, drafts, **options)
    accepted = [1, 3]
    o, _ = decode(backend, more, num_accepted_tokens=torch.tensor(accepted, device=backend.device), **options)
    for n, count in enumerate(accepted):
        kept = (
            torch.cat([x[n : n + 1, :count], y[n : n + 1]], dim=1)
            for x, y in zip(drafts.tensors, more.tensors)
        )
        whole = cases.Inputs(*kept, do=drafts.do)
        expected, _ = decode(backend, whole, initial_state=start[n : n + 1])
        # Bit for bit: the same tokens from the same state, once through the pool.
        compare.assert_bitwise_equal(o[n : n + 1], expected[:, count:], f"o of sequence {n}")


def test_without_writing_back_the_pool_is_only_read(backend, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    accepted = torch.tensor([2, 3], device=backend.device)
    before = poisoned(new_pool(backend, seed), [8, 1])
    pool = before.clone()
    indices = torch.tensor(COLUMNS, device=backend.device)
    o, S = decode(backend, inputs, initial_state=pool, state_indices=indices, num_accepted_tokens=accepted)
    backend.check({"o": o, "S": S}, backend.expected(inputs, initial_state=before[[8, 1]]))
    compare.assert_bitwise_equal(pool, before, "the pool", nan=True)


def test_more_columns_than_positions_are_allowed(backend, seed):
    """The last draft may be shorter than the table is wide, and an accepted count may point behind it."""
    inputs = backend.inputs("slow", batch=2, seqlen=1, **SHAPE, seed=seed)
    pool = new_pool(backend, seed)
    before = pool.clone()
    indices, accepted = (
        torch.tensor(COLUMNS, device=backend.device),
        torch.tensor([3, 2], device=backend.device),
    )
    o, _ = decode(
        backend, inputs, initial_state=pool, state_indices=indices, num_accepted_tokens=accepted,
        inplace_final_state=True,
    )  # fmt: skip
    expected = backend.expected(inputs, initial_state=before[[0, 5]])
    backend.check({"o": o, "S": pool[[3, 10]]}, expected)
    assert_other_slots_untouched(pool, before, written=[3, 10])


@pytest.mark.parametrize("bad", [-1, SLOTS, 2**31 - 1])
def test_a_position_out_of_range_is_computed_but_not_kept(backend, bad, seed):
    """Its own output row is zero and its state goes nowhere; the tokens behind it go on."""
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    columns = [[3, bad, 0], [10, 5, 1]]
    before = poisoned(new_pool(backend, seed), [3, 10])
    pool = before.clone()
    indices = torch.tensor(columns, device=backend.device)
    o, _ = decode(backend, inputs, initial_state=pool, state_indices=indices, inplace_final_state=True)
    expected = backend.expected(inputs, initial_state=before[[3, 10]])
    assert not o[0, 1].any()
    backend.check({"o": o[1:]}, {"o": expected["o"][1:]}, where=" of the other sequence")
    for t in (0, 2):
        backend.check({"o": o[:1, t]}, {"o": expected["o"][:1, t]}, where=f" at token {t}")
    backend.check({"S": pool[[0, 1]]}, expected)
    assert_other_slots_untouched(pool, before, written=[3, 0, 10, 5, 1])


@pytest.mark.parametrize("bad", [-1, SLOTS])
def test_a_start_out_of_range_skips_the_whole_sequence(backend, bad, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    before = poisoned(new_pool(backend, seed), [10])
    pool = before.clone()
    indices = torch.tensor([[bad, 8, 0], [10, 5, 1]], device=backend.device)
    o, _ = decode(backend, inputs, initial_state=pool, state_indices=indices, inplace_final_state=True)
    assert not o[0].any()
    expected = backend.expected(rows(inputs, [1]), initial_state=before[10:11])
    backend.check({"o": o[1:], "S": pool[1:2]}, expected)
    assert_other_slots_untouched(pool, before, written=[10, 5, 1])


@pytest.mark.parametrize("accepted", [[0, -3], [100, 4]])
def test_an_accepted_count_out_of_range_reads_no_slot_out_of_range(backend, accepted, seed):
    """It counts as the nearest one that there is."""
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    start = [row[0] if count < 1 else row[2] for row, count in zip(COLUMNS, accepted, strict=True)]
    pool = poisoned(new_pool(backend, seed), start)
    counts, indices = (
        torch.tensor(accepted, device=backend.device),
        torch.tensor(COLUMNS, device=backend.device),
    )
    o, S = decode(backend, inputs, initial_state=pool, state_indices=indices, num_accepted_tokens=counts)
    backend.check({"o": o, "S": S}, backend.expected(inputs, initial_state=pool[start]))


@pytest.mark.parametrize("lengths", [(2, 0, 3), (1, 1, 1), (3, 3, 3)])
def test_packed_sequences_with_a_slot_for_every_position(backend, lengths, seed):
    inputs = backend.inputs("slow", seqlen=sum(lengths), **SHAPE, seed=seed)
    columns = [[3, 8, 0], [10, 5, 1], [2, 9, 4]]
    start = [row[0] for row in columns]
    before = poisoned(new_pool(backend, seed), start)
    pool = before.clone()
    cu_seqlens = cases.packed_offsets(lengths, device=backend.device)
    indices = torch.tensor(columns, device=backend.device)
    options = {"state_indices": indices, "inplace_final_state": True, "cu_seqlens": cu_seqlens}
    o, _ = decode(backend, inputs, initial_state=pool, **options)
    backend.check({"o": o}, backend.expected(inputs, initial_state=before[start], cu_seqlens=cu_seqlens))
    written = []
    for n, length in enumerate(lengths):
        begin = sum(lengths[:n])
        alone = tokens(inputs, slice(begin, begin + length))
        for t, state in enumerate(states_after_each_token(backend, alone, before[start[n] : start[n] + 1])):
            slot = columns[n][t]
            backend.check({"S": pool[slot : slot + 1]}, {"S": state}, where=f" of {n} after token {t}")
            written.append(slot)
    assert_other_slots_untouched(pool, before, written=written)


# -- checked indices -----------------------------------------------------------------------------------------


def test_checked_indices_that_are_fine_pass(backend, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    pool = new_pool(backend, seed)
    for indices in ([0, SLOTS - 1], [-1, 3], COLUMNS):
        indices = torch.tensor(indices, device=backend.device)
        checked = decode(backend, inputs, initial_state=pool, state_indices=indices, check_indices=True)
        unchecked = decode(backend, inputs, initial_state=pool, state_indices=indices)
        compare.assert_bitwise_equal(checked[0], unchecked[0], "o")


@pytest.mark.parametrize(
    "indices, message",
    [
        ([4, -2], "expected slots from 0 to 10, or -1 for none, got -2 at flat index 1"),
        ([11, 0], "expected slots from 0 to 10, or -1 for none, got 11 at flat index 0"),
        ([[4, 1, 2], [0, 3, 99]], "expected slots from 0 to 10, or -1 for none, got 99 at flat index 5"),
    ],
)
def test_checked_indices_out_of_range_raise_with_the_slot(backend, indices, message, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=3, **SHAPE, seed=seed)
    pool = new_pool(backend, seed)
    before = pool.clone()
    with pytest.raises(ValueError, match=f"^state_indices: {message}$"):
        decode(
            backend, inputs, initial_state=pool, state_indices=torch.tensor(indices, device=backend.device),
            inplace_final_state=True, check_indices=True,
        )  # fmt: skip
    compare.assert_bitwise_equal(pool, before, "the pool", nan=True)
