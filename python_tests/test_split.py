"""Sequences cut into segments: when, and that nothing but time changes."""

import contextlib
import itertools

import cases
import compare
import pytest
import torch
from torch.overrides import TorchFunctionMode

import gdn2_ext
from gdn2_ext import cuda_backend, cuda_launch
from gdn2_ext.sequence_split import MAX_SEGMENTS, Gpu, gpu, num_segments

H200 = Gpu(num_sms=132, memory_bandwidth=4916)
H100 = Gpu(num_sms=132, memory_bandwidth=3352)
needs_extension = pytest.mark.skipif(
    cuda_launch._C is None, reason="needs an install with kernels (GDN2_CUDA=ON)"
)


def automatic(seqlen: int, heads: int, sequences: int = 1, gpu: Gpu = H200, **changes) -> int:
    call = {
        "requested": 0, "seqlen": seqlen, "num_sequences": sequences, "gate_heads": heads,
        "value_heads": heads, "dim_k": 128, "dim_v": 128, "packed": False, "gpu": gpu,
    }  # fmt: skip
    return num_segments(**call | changes)


class Watched(TorchFunctionMode):
    """Calls go by torch.library."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


# -- the choice ----------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(
    ("seqlen", "heads", "fewest", "most"),
    [
        (1536, 4, 4, 6), (2048, 1, 6, 8), (2048, 4, 5, 6), (2048, 8, 4, 5), (4096, 4, 6, 9), (4096, 8, 5, 5),
        (8192, 1, 10, 14), (8192, 4, 8, 9), (8192, 8, 5, 5), (8192, 10, 4, 4), (32768, 1, 20, 28),
        (32768, 2, 16, 18), (65536, 4, 9, 9), (65536, 8, 5, 5), (65536, 10, 4, 4), (131072, 1, 32, 34),
        (131072, 2, 18, 18), (131072, 4, 8, 9),
    ],
)  # fmt: skip
def test_few_heads_and_long_sequences_are_split(seqlen, heads, fewest, most):
    """Into as many segments as were within 3.2% of the quickest on an H100 (docs/kernels.md)."""
    assert fewest <= automatic(seqlen, heads, gpu=H100) <= most


@needs_extension
def test_quicker_memory_allows_for_more_walks_at_a_time():
    assert 4 <= automatic(8192, 8) <= 6
    assert 3 <= automatic(2048, 4) <= 8
    assert 7 <= automatic(65536, 4) <= 10
    assert 14 <= automatic(131072, 2) <= 20
    assert automatic(2048, 4, gpu=H100) < automatic(2048, 4)
    assert automatic(32768, 1, gpu=H100) < automatic(32768, 1)


@needs_extension
@pytest.mark.parametrize(
    ("seqlen", "heads", "sequences"),
    [(4096, 16, 4), (2048, 16, 8), (8192, 64, 1), (16384, 16, 1), (8192, 16, 2), (1024, 4, 1), (64, 4, 1)],
)
def test_what_fills_the_chip_or_is_short_is_not(seqlen, heads, sequences):
    assert automatic(seqlen, heads, sequences) == 1


@needs_extension
def test_the_number_is_bounded_and_what_was_asked_for_is_given():
    assert automatic(1 << 24, 1) <= MAX_SEGMENTS
    assert automatic(0, 1) == 1
    assert automatic(128, 1, gpu=Gpu(1000, 4916)) <= 2
    assert [automatic(64, 64, requested=n) for n in (1, 2, 64)] == [1, 2, 64]


@needs_extension
def test_packed_sequences_count_as_long_as_the_average():
    assert automatic(65536, 1, 2, packed=True) == automatic(32768, 1, 2) > 4
    assert automatic(131072, 2, 4, packed=True) == automatic(32768, 2, 4) > 2


def beside(seqlen: int, heads: int, batch: int = 1, dim: int = 128, packed: bool = False) -> int:
    """On how many SMs prepare runs beside scan."""
    return cuda_launch._C.sms_beside_scan(seqlen, batch, heads, heads, dim, dim, packed, *H200)


BESIDE = [
    (2, 1145, 8, 64),
    (2, 1145, 8, 128),
    (3, 1501, 5, 128),
    (1, 2500, 16, 128),
]  # batch, seqlen, heads, dim


@needs_extension
def test_prepare_runs_beside_walks_that_leave_it_sms():
    for batch, seqlen, heads, dim in BESIDE:
        walks = batch * heads * dim // 64
        sms = min(H200.num_sms - walks, 16 + 4 * batch * heads)
        assert beside(seqlen, heads, batch, dim) == sms > 0, (batch, seqlen, heads, dim)
    assert beside(8192, 40) == beside(0, 8) == beside(8192, 16, packed=True) == beside(256, 1) == 0


@needs_extension
@pytest.mark.parametrize("segments", [1, 2, 3, 5, 16, 64])
@pytest.mark.parametrize("order", ["up", "down", "inwards", "outwards"])
def test_every_chunk_is_taken_once(order, segments):
    """And what a walk begins with comes first or last, of every segment of full length."""
    for batch, chunks in itertools.product((1, 2, 3), (1, 2, 7, 16, 20, 33)):
        slots = cuda_launch._C.chunk_order(batch, chunks, segments, order, False)
        assert sorted(slots) == list(range(batch * chunks))
        length = -(-chunks // segments)
        full = [b * chunks + s * length for b in range(batch) for s in range(chunks // length)]
        last = slots[batch * chunks - batch * (chunks % length) - len(full) :][: len(full)]
        first = slots[batch * (chunks % length) :][: len(full)]
        if order in ("down", "outwards"):
            assert last == full, (batch, chunks)
        else:
            assert first == full, (batch, chunks)


@needs_extension
@pytest.mark.parametrize("order", ["up", "down", "inwards", "outwards"])
def test_a_grid_of_whole_sequences_has_the_order_of_chunks_in_a_row(order):
    for batch, chunks in itertools.product((1, 2, 3), (1, 2, 7, 16, 33)):
        grid, in_a_row = (cuda_launch._C.chunk_order(batch, chunks, 1, order, x) for x in (True, False))
        assert grid == in_a_row, (batch, chunks)


# -- the results ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("split", [2, 3, 16, 64])
def test_split_sequences_meet_the_bar_of_their_regime(hopper, regime, split, seed):
    """17 chunks, so that segments are unequal, and for 64 mostly empty."""
    inputs = hopper.inputs(regime, seqlen=1050, heads=2, seed=seed)
    hopper.check_against_reference(inputs, regime, sequence_split=split)


@pytest.mark.gpu
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize(
    ("dim_k", "dim_v"), [(128, 128), (64, 256), (128, 192), (72, 256), (48, 40), (80, 33), (64, 7)]
)
@pytest.mark.parametrize("split", [2, 3, 7])
def test_states_groups_and_sizes(hopper, split, dim_k, dim_v, v_first, seed):
    sizes = {"heads": 2, "value_heads": 4, "dim_k": dim_k, "dim_v": dim_v}
    inputs = hopper.inputs("slow", batch=2, seqlen=500, seed=seed, **sizes)
    initial_state, d_final_state = hopper.states(inputs, seed=seed, v_first=v_first)
    hopper.check_against_reference(
        inputs,
        initial_state=initial_state,
        d_final_state=d_final_state,
        state_v_first=v_first,
        sequence_split=split,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("asked", ["nothing", "norms", "everything"])
@pytest.mark.parametrize(("batch", "seqlen", "heads", "dim"), BESIDE)
def test_prepare_beside_scan_changes_no_bit(hopper, batch, seqlen, heads, dim, asked, seed):
    """With the states of all chunks to write, prepare runs first."""
    sizes = {"batch": batch, "seqlen": seqlen, "heads": heads, "dim_k": dim, "dim_v": dim}
    raw = asked == "everything"
    inputs = hopper.raw_inputs(**sizes, seed=seed) if raw else hopper.inputs("slow", **sizes, seed=seed)
    options = {"sequence_split": 1, "output_final_state": True, "use_qk_l2norm_in_kernel": asked != "nothing"}
    if raw:
        options |= {"use_gate_in_kernel": True, "use_gate_sigmoid_in_kernel": True}
    o, S = hopper.forward(inputs, **options)
    first, first_S, _ = hopper.forward(inputs, **options, return_intermediate_states=True)
    compare.assert_bitwise_equal(o, first, "o")
    compare.assert_bitwise_equal(S, first_S, "S")
    compare.assert_close(o, hopper.expected(inputs, **options)["o"], hopper.bar("o"), "o")


@pytest.mark.gpu
@pytest.mark.parametrize("split", [2, 4, 6])
def test_tiles_that_are_kept_change_no_bit_of_a_split_call(hopper, split, monkeypatch, seed):
    """All, some and none of the segments are walked forwards beside the reverse walks from zero (132 SMs)."""
    inputs = hopper.inputs("slow", seqlen=700, heads=12, dim_k=128, dim_v=128, seed=seed)
    kept = hopper.check_against_reference(inputs, "slow", sequence_split=split)
    monkeypatch.setattr(cuda_backend._Sizes, "keeps_tiles", lambda self, num_segments, asked: asked)
    with Watched():
        made_again = hopper.run(inputs, sequence_split=split)
    asked_for = hopper.run(inputs, sequence_split=split, disable_recompute=True)
    assert kept.keys() == made_again.keys() == asked_for.keys()
    for name, x in kept.items():
        compare.assert_bitwise_equal(made_again[name], x, name)
        compare.assert_bitwise_equal(asked_for[name], x, name)


@pytest.mark.gpu
def test_tiles_that_are_made_again_change_no_bit_of_a_split_call(hopper, seed):
    """More than are kept unasked."""
    inputs = hopper.inputs("slow", seqlen=4096, heads=13, dim_k=64, dim_v=64, seed=seed)
    made_again, kept = (
        hopper.run(inputs, sequence_split=4, disable_recompute=keep) for keep in (False, True)
    )
    for name, x in kept.items():
        compare.assert_bitwise_equal(made_again[name], x, name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "split", "keeps"), [(12, 4, True), (13, 4, False), (4, 2, True), (4, None, True), (4, 1, False)]
)
@pytest.mark.parametrize("watched", [False, True])
def test_tiles_of_a_split_are_kept_where_they_are_few(hopper, heads, split, keeps, watched, seed):
    """Of 64 chunks a head: no more than 800."""
    inputs = hopper.inputs("slow", seqlen=4096, heads=heads, dim_k=64, dim_v=64, seed=seed)

    def saved(**options) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            leaves = [x.detach().requires_grad_() for x in inputs.tensors]
            with Watched() if watched else contextlib.nullcontext():
                gdn2_ext.chunk_gdn2(*leaves, sequence_split=split, backend="cuda", **options)
        return sum(sizes)

    assert (saved() == saved(disable_recompute=True)) is keeps


@pytest.mark.gpu
@pytest.mark.parametrize("watched", [False, True])
def test_a_backward_of_segments_may_run_again(hopper, watched, seed):
    """In memory where the flags of the first time still stand."""
    inputs = hopper.inputs("slow", seqlen=1500, heads=2, seed=seed)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors]
    with Watched() if watched else contextlib.nullcontext():
        o, _ = gdn2_ext.chunk_gdn2(*leaves, sequence_split=8, backend="cuda")
        first, *others = (torch.autograd.grad(o, leaves, inputs.do, retain_graph=True) for _ in range(20))
    for n, again in enumerate(others):
        for x, y in zip(again, first, strict=True):
            compare.assert_bitwise_equal(x, y, f"gradient of time {n + 2}")


@pytest.mark.gpu
@pytest.mark.parametrize("dim_k", [48, 128])
@pytest.mark.parametrize("split", [2, 16, 64])
def test_borders_keep_more_of_states_than_16_bit_elements_would(hopper, dim_k, split, seed):
    """Without keys and values states only decay, and nothing but the borders of segments rounds them."""
    inputs = hopper.inputs("slow", seqlen=1050, heads=2, dim_k=dim_k, dim_v=40, seed=seed)
    for x in (inputs.k, inputs.v, inputs.do):
        x.zero_()
    initial_state, d_final_state = hopper.states(inputs, seed=seed)
    whole, cut = (
        hopper.run(inputs, initial_state=initial_state, d_final_state=d_final_state, sequence_split=n)
        for n in (1, split)
    )
    for name in ("S", "d_initial_state"):
        compare.assert_close(cut[name], whole[name], 1e-4, name)


# Of sequences of 512 tokens in segments of 128.
FORGETFUL = {
    "the last": (127, 255, 383), "the first": (128, 256, 384), "both": (127, 128, 255, 256, 383, 384),
    "all of a segment": tuple(range(128, 256)), "all of the last segment": tuple(range(384, 512)),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("step", [1, 2], ids=["all channels", "every other channel"])
@pytest.mark.parametrize("tokens", FORGETFUL.values(), ids=FORGETFUL)
def test_states_that_are_forgotten_at_the_borders_of_segments(hopper, tokens, step, seed):
    """Decays of -inf in one head; the other one's states, and half of this one's, pass all borders."""
    inputs = hopper.inputs("slow", seqlen=512, heads=2, seed=seed)
    for token in tokens:
        inputs.g[:, token, 0, ::step] = -float("inf")
    initial_state, d_final_state = hopper.states(inputs, seed=seed)
    states = {"initial_state": initial_state, "d_final_state": d_final_state}
    hopper.check_against_reference(inputs, "slow", sequence_split=4, **states)


@pytest.mark.gpu
@pytest.mark.every_dtype
@pytest.mark.parametrize(("gate_heads", "v_first"), [("key", False), ("value", True)])
@pytest.mark.parametrize(("dim_k", "dim_v"), [(128, 128), (64, 192), (100, 60)])
def test_everything_at_once_in_segments(hopper, dim_k, dim_v, gate_heads, v_first, seed):
    """Packed groups with norms and all gates inside, of decays so slow that states pass many segments."""
    sizes = {"heads": 2, "value_heads": 4, "gate_heads": gate_heads, "dim_k": dim_k, "dim_v": dim_v}
    lengths = cases.LONG_PACKED_LENGTHS
    inputs = hopper.raw_inputs(seqlen=sum(lengths), **sizes, seed=seed)
    initial_state, d_final_state = hopper.states(inputs, seed=seed, number=len(lengths), v_first=v_first)
    options = {
        "initial_state": initial_state, "d_final_state": d_final_state, "state_v_first": v_first,
        "cu_seqlens": cases.packed_offsets(lengths, device=hopper.device),
        **cases.EVERYTHING, "lower_bound": -0.02, "erase_scale": 2.0,
    }  # fmt: skip
    expected = hopper.expected(inputs, **options)
    for split in (2, 8, 64):
        results, again, kept = (
            hopper.run(inputs, sequence_split=split, disable_recompute=keep, **options)
            for keep in (False, False, True)
        )
        hopper.check(results, expected, where=f" in {split}")
        for name, x in results.items():
            compare.assert_bitwise_equal(again[name], x, f"{name} in {split}, again")
            compare.assert_bitwise_equal(kept[name], x, f"{name} in {split}, with tiles kept")


@pytest.mark.gpu
def test_what_is_chosen_is_what_can_be_asked_for(hopper, seed):
    inputs = hopper.inputs("slow", seqlen=4096, heads=1, seed=seed)
    segments = automatic(4096, 1, gpu=gpu(hopper.device.index))
    assert segments > 1
    asked = hopper.run(inputs, sequence_split=segments)
    for name, x in hopper.run(inputs).items():
        compare.assert_bitwise_equal(x, asked[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [3, 8])
def test_gradients_of_some_inputs_alone(hopper, split, seed):
    """Whoever needs only that of the initial state has nothing recomputed."""
    inputs = hopper.inputs("slow", seqlen=700, heads=2, seed=seed)
    initial_state, d_final_state = hopper.states(inputs, seed=seed)
    leaves = [x.clone().requires_grad_() for x in (*inputs.tensors, initial_state)]

    def gradients(needed: list[torch.Tensor]):
        o, S = gdn2_ext.chunk_gdn2(
            *leaves[:6],
            initial_state=leaves[6],
            output_final_state=True,
            sequence_split=split,
            backend="cuda",
        )
        return torch.autograd.grad([o, S], needed, [inputs.do, d_final_state])

    everything = gradients(leaves)
    for n, (name, leaf) in enumerate(zip((*"qkvgbw", "initial state"), leaves, strict=True)):
        for x in leaves:
            x.requires_grad_(x is leaf)
        compare.assert_bitwise_equal(gradients([leaf])[0], everything[n], name)


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit_and_whole_ones_nearly(hopper, seed):
    inputs = hopper.inputs("layer_init", seqlen=2000, heads=2, seed=seed)
    runs = [hopper.run(inputs, sequence_split=8, poisoned=False) for _ in range(2)]
    whole = hopper.run(inputs, sequence_split=1)
    for name, x in runs[0].items():
        compare.assert_bitwise_equal(runs[1][name], x, name)
        compare.assert_close(x, whole[name], 2 * hopper.bar(name, "layer_init"), name)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [255, 256, 257, 600])
def test_later_tokens_change_no_bit_of_earlier_outputs(hopper, t, seed):
    """And tokens behind the last that is asked about have no gradient. In segments of 256 tokens."""
    inputs = hopper.inputs("slow", seqlen=1024, heads=2, seed=seed)
    o, _ = hopper.forward(inputs, sequence_split=4)
    changed, _ = hopper.forward(cases.with_another_future(inputs, t, seed + 1), sequence_split=4)
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed[:, t:], o[:, t:])
    compare.assert_bitwise_equal(changed[:, :t], o[:, :t], "o")
    do = inputs.do.clone()
    do[:, t:] = 0
    results = hopper.run(inputs, do=do, sequence_split=4)
    for name in ("dq", "dk", "dv", "dg", "db", "dw"):
        assert not results[name][:, t:].any(), name


@pytest.mark.gpu
@pytest.mark.parametrize("dim_v", [128, 256])
def test_walks_that_wait_do_not_keep_others_from_running(hopper, dim_v, seed):
    """More walks than there are SMs make what others wait for, forwards and in reverse."""
    inputs = hopper.inputs("layer_init", seqlen=64 * 64, heads=12, dim_v=dim_v, seed=seed)
    cut, whole = (hopper.run(inputs, sequence_split=n, poisoned=False) for n in (64, 1))
    for name, x in cut.items():
        compare.assert_close(x, whole[name], 2 * hopper.bar(name, "layer_init"), name)


@pytest.mark.gpu
@pytest.mark.every_dtype
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize(("dim_k", "dim_v"), [(128, 128), (128, 256), (72, 192)])
@pytest.mark.parametrize("lengths", [None, (0, 1, 300, 64, 335)], ids=["dense", "packed"])
def test_states_of_all_chunks_come_out_of_segments_too(hopper, lengths, dim_k, dim_v, v_first, seed):
    sizes = {"seqlen": 700, "heads": 1, "value_heads": 2, "dim_k": dim_k, "dim_v": dim_v}
    inputs = hopper.inputs("slow", batch=2 if lengths is None else 1, **sizes, seed=seed)
    number = None if lengths is None else len(lengths)
    initial_state, _ = hopper.states(inputs, seed=seed, number=number, v_first=v_first)
    options = {"initial_state": initial_state, "state_v_first": v_first}
    known = {"return_intermediate_states": True, "output_final_state": True}
    if lengths is not None:
        options["cu_seqlens"] = cases.packed_offsets(lengths, device=hopper.device)
        known["cu_seqlens_cpu"] = cases.packed_offsets(lengths)
    expected = hopper.expected(inputs, **options)
    for split in (1, 3, 8):
        o, S, h = hopper.forward(inputs, sequence_split=split, **options, **known)
        hopper.check({"o": o, "S": S, "h": h}, expected, "slow", where=f" in {split}")


@pytest.mark.caching_allocator
@pytest.mark.gpu
def test_a_captured_split_call_follows_its_inputs(hopper, seed):
    inputs, others = (hopper.inputs("layer_init", seqlen=1024, heads=2, seed=seed + n) for n in range(2))
    hopper.forward(inputs, sequence_split=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = hopper.forward(inputs, sequence_split=4)
    for x, y in zip(inputs.tensors, others.tensors, strict=True):
        x.copy_(y)
    graph.replay()
    expected, _ = hopper.forward(others, sequence_split=4)
    compare.assert_bitwise_equal(o, expected, "o")
