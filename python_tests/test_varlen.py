"""Packed sequences: each is a run of its own, to the bit, whatever lies beside it."""

import cases
import compare
import pytest
import torch

SHAPE = {"heads": 2, "dim_k": 32, "dim_v": 48}
PACKINGS = {
    "empty first, inside and last": cases.PACKED_LENGTHS,
    "one": (130,),
    "one empty": (0,),
    "only empty": (0, 0, 0),
    "single tokens": (1, 1, 1, 1, 1),
    "chunk lengths": (64, 128, 64),
    "around the chunk": (63, 65, 1, 64),
    "primes": (31, 67, 2, 131),
    "long after short": (3, 200),
}
PER_TOKEN = ("o", "dq", "dk", "dv", "dg", "db", "dw")
PER_SEQUENCE = ("S", "d_initial_state")

every_packing = pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)


def packed_inputs(backend, lengths, seed: int, *, regime="slow", **shape) -> tuple[cases.Inputs, dict]:
    """Inputs, and the options with offsets, a state for every sequence and a gradient for its final state."""
    inputs = backend.inputs(regime, seqlen=sum(lengths), **{**SHAPE, **shape}, seed=seed)
    initial_state, d_final_state = backend.states(inputs, number=len(lengths), seed=seed)
    cu_seqlens = cases.packed_offsets(lengths, device=backend.device)
    return inputs, {"initial_state": initial_state, "d_final_state": d_final_state, "cu_seqlens": cu_seqlens}


def sequence(inputs: cases.Inputs, options: dict, n: int) -> tuple[cases.Inputs, dict]:
    """Sequence n alone, as a call without offsets."""
    begin, end = options["cu_seqlens"][n : n + 2].tolist()
    alone = cases.Inputs(*(x[:, begin:end] for x in inputs.tensors), do=inputs.do[:, begin:end])
    alone.A_log, alone.dt_bias = inputs.A_log, inputs.dt_bias
    states = {name: options[name][n : n + 1] for name in ("initial_state", "d_final_state")}
    others = {name: x for name, x in options.items() if name not in (*states, "cu_seqlens", "cu_seqlens_cpu")}
    return alone, {**others, **states}


def assert_sequence_equals(packed: dict, alone: dict, cu_seqlens: torch.Tensor, n: int) -> None:
    begin, end = cu_seqlens[n : n + 2].tolist()
    for name in PER_TOKEN:
        compare.assert_bitwise_equal(packed[name][:, begin:end], alone[name], f"{name} of sequence {n}")
    for name in PER_SEQUENCE:
        compare.assert_bitwise_equal(packed[name][n : n + 1], alone[name], f"{name} of sequence {n}")


# -- right, and independent ----------------------------------------------------------------------------------


@pytest.mark.every_dtype
@every_packing
def test_packed_sequences_agree_with_the_reference(backend, lengths, seed):
    inputs, options = packed_inputs(backend, lengths, seed)
    backend.check_against_reference(inputs, **options)


@pytest.mark.every_dtype
@every_packing
def test_a_packed_sequence_equals_a_run_of_its_own_bit_for_bit(backend, lengths, seed):
    inputs, options = packed_inputs(backend, lengths, seed)
    packed = backend.run(inputs, **options, sequence_split=1)
    for n in range(len(lengths)):
        alone, alone_options = sequence(inputs, options, n)
        results = backend.run(alone, **alone_options, sequence_split=1)
        assert_sequence_equals(packed, results, options["cu_seqlens"], n)


@pytest.mark.gpu
@pytest.mark.every_dtype
@pytest.mark.parametrize("split", [3, 8, 64])
def test_sequences_each_in_segments(hopper, split, seed):
    """As near to the reference as whole ones, and to the bit what each alone is in as many segments."""
    lengths = cases.LONG_PACKED_LENGTHS
    inputs, options = packed_inputs(hopper, lengths, seed, dim_k=64, dim_v=128)
    options["sequence_split"] = split
    packed = hopper.check_against_reference(inputs, "slow", **options)
    for n in range(len(lengths)):
        alone, alone_options = sequence(inputs, options, n)
        assert_sequence_equals(packed, hopper.run(alone, **alone_options), options["cu_seqlens"], n)


@pytest.mark.parametrize("gate_heads", ["key", "value"])
@pytest.mark.parametrize("v_first", [False, True])
def test_packing_with_groups_and_everything_in_the_kernel_changes_no_bit(backend, v_first, gate_heads, seed):
    lengths = cases.PACKED_LENGTHS
    shape = {"value_heads": 4, "gate_heads": gate_heads}
    inputs = backend.raw_inputs(seqlen=sum(lengths), **SHAPE, **shape, seed=seed)
    initial_state, d_final_state = backend.states(inputs, number=len(lengths), seed=seed, v_first=v_first)
    options = {
        "initial_state": initial_state,
        "d_final_state": d_final_state,
        "cu_seqlens": cases.packed_offsets(lengths, device=backend.device),
        "state_v_first": v_first,
        "erase_scale": 2,
        **cases.EVERYTHING,
    }
    packed = backend.check_against_reference(inputs, **options)
    for n in range(len(lengths)):
        alone, alone_options = sequence(inputs, options, n)
        assert_sequence_equals(packed, backend.run(alone, **alone_options), options["cu_seqlens"], n)


@pytest.mark.slow
def test_a_sequence_does_not_depend_on_how_many_there_are(backend, seed):
    """With many heads and sequences the kernels share work that they would do side by side otherwise."""
    lengths = (70, 1, 65, 0, 40)
    inputs, options = packed_inputs(backend, lengths, seed, heads=16, dim_k=128, dim_v=128)
    packed = backend.run(inputs, **options)
    for n in range(len(lengths)):
        alone, alone_options = sequence(inputs, options, n)
        results = backend.run(alone, **alone_options)
        assert_sequence_equals(packed, results, options["cu_seqlens"], n)


def test_a_sequence_does_not_depend_on_what_it_is_packed_with(backend, seed):
    """The same sequence between short neighbours, between long ones, and at other offsets."""
    inputs, options = packed_inputs(backend, (100,), seed)
    others = backend.inputs("resets", seqlen=400, **SHAPE, seed=seed + 10)
    states = backend.normal(3, 2, 32, 48, seed=seed), backend.normal(3, 2, 32, 48, seed=seed + 1)
    alone = backend.run(inputs, **options, sequence_split=1)
    for before, after in ((1, 5), (63, 0), (64, 64), (200, 199)):
        parts = [
            (others.tensors[i][:, :before], x, others.tensors[i][:, :after])
            for i, x in enumerate(inputs.tensors)
        ]
        do = torch.cat([others.do[:, :before], inputs.do, others.do[:, :after]], dim=1)
        packed_options = {
            "cu_seqlens": cases.packed_offsets((before, 100, after), device=backend.device),
            "initial_state": torch.cat([states[0][:1], options["initial_state"], states[0][2:]]),
            "d_final_state": torch.cat([states[1][:1], options["d_final_state"], states[1][2:]]),
        }
        packed = backend.run(
            cases.Inputs(*(torch.cat(x, dim=1) for x in parts), do=do), **packed_options, sequence_split=1
        )
        assert_sequence_equals(packed, alone, packed_options["cu_seqlens"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("split", [1, 3])
def test_thousands_of_sequences(backend, split, dtype, seed):
    """More sequences and chunks than the threads that order them, many of equal lengths, a few long ones."""
    lengths = [7 * n % 5 for n in range(2500)]
    lengths[77], lengths[2222] = 300, 65
    inputs, options = packed_inputs(backend, lengths, seed, heads=1)
    options |= {"sequence_split": split, "cu_seqlens": options["cu_seqlens"].to(dtype)}
    first, second = backend.check_against_reference(inputs, **options), backend.run(inputs, **options)
    for name, x in first.items():
        compare.assert_bitwise_equal(x, second[name], name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("on_host_too", [True, False])
def test_offsets_may_be_int32_or_int64(backend, dtype, on_host_too, seed):
    lengths = cases.PACKED_LENGTHS
    inputs, options = packed_inputs(backend, lengths, seed)
    expected = backend.run(inputs, **options)
    options["cu_seqlens"] = cases.packed_offsets(lengths, dtype=dtype, device=backend.device)
    options["cu_seqlens_cpu"] = cases.packed_offsets(lengths, dtype=dtype) if on_host_too else None
    actual = backend.run(inputs, **options)
    for name, x in actual.items():
        compare.assert_bitwise_equal(x, expected[name], name)


def test_offsets_on_the_cpu_serve_tensors_on_any_device(backend, seed):
    inputs, options = packed_inputs(backend, cases.PACKED_LENGTHS, seed)
    expected = backend.run(inputs, **options)
    actual = backend.run(inputs, **{**options, "cu_seqlens": options["cu_seqlens"].cpu()})
    for name, x in actual.items():
        compare.assert_bitwise_equal(x, expected[name], name)


# -- neighbours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 3, 64])
@pytest.mark.parametrize(
    "raw, dim_k",
    [(None, 32), ({}, 32), ({}, 100), ({"lower_bound": -5.0}, 32), ({"lower_bound": -5.0}, 128)],
    ids=["activated", "raw", "raw-100", "bounded", "bounded-128"],
)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nan_in_one_sequence_stays_there(backend, bad, raw, dim_k, split, seed):
    """Also of rows that a short last chunk has in front of it or in its tiles."""
    lengths, shape = (70, 33, 270), {**SHAPE, "dim_k": dim_k}
    inputs, options = packed_inputs(backend, lengths, seed, dim_k=dim_k)
    options["sequence_split"] = split
    if raw is not None:
        inputs = backend.raw_inputs(seqlen=373, **shape, seed=seed)
        options |= {**cases.EVERYTHING, **raw}
    clean = backend.run(inputs, **options)
    begin, end = options["cu_seqlens"][bad : bad + 2].tolist()
    for x in (*inputs.tensors, inputs.do):
        x[:, begin:end] = float("nan")
    for name in ("initial_state", "d_final_state"):
        options[name][bad] = float("nan")
    dirty = backend.run(inputs, **options)
    for n in set(range(3)) - {bad}:
        begin_n, end_n = options["cu_seqlens"][n : n + 2].tolist()
        alone = {name: clean[name][:, begin_n:end_n] for name in PER_TOKEN}
        alone |= {name: clean[name][n : n + 1] for name in PER_SEQUENCE}
        assert_sequence_equals(dirty, alone, options["cu_seqlens"], n)
    assert dirty["o"][:, begin:end].isnan().all()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nan_in_one_batch_row_stays_there(backend, bad, seed):
    inputs = backend.inputs("slow", batch=3, seqlen=70, **SHAPE, seed=seed)
    clean = backend.run(inputs)
    for x in (*inputs.tensors, inputs.do):
        x[bad] = float("nan")
    dirty = backend.run(inputs)
    others = [n for n in range(3) if n != bad]
    for name, x in clean.items():
        compare.assert_bitwise_equal(dirty[name][others], x[others], f"{name} of the other rows")
    assert dirty["o"][bad].isnan().all()


@pytest.mark.parametrize("bad", [0, 1])
def test_nan_in_one_head_stays_there(backend, bad, seed):
    inputs = backend.inputs("slow", batch=2, seqlen=70, **SHAPE, seed=seed)
    clean = backend.run(inputs)
    for x in (*inputs.tensors, inputs.do):
        x[:, :, bad] = float("nan")
    dirty = backend.run(inputs)
    for name, x in clean.items():
        heads = 1 if name == "S" else 2
        other = dirty[name].select(heads, 1 - bad), x.select(heads, 1 - bad)
        compare.assert_bitwise_equal(*other, f"{name} of the other head")


# -- malformed offsets, which nobody read on the host --------------------------------------------------------

# offsets, and how many of the sequences in front are well-formed, of 200 tokens
MALFORMED = {
    "does not start at 0": ([5, 70, 200], 0),
    "starts below 0": ([-3, 70, 200], 0),
    "falls": ([0, 70, 50, 200], 1),
    "falls at once": ([0, -10, 70, 200], 0),
    "goes beyond the end": ([0, 70, 300, 200], 1),
    "ends beyond the end": ([0, 70, 100, 201], 2),
    "goes far beyond the end": ([0, 70, 2**31 - 1, 200], 1),
    "goes far below 0": ([0, 70, -(2**31), 200], 1),
    "ends before the end": ([0, 70, 150], 2),
    "is all zero": ([0, 0, 0], 2),
    "garbage": ([7, -9, 2**30, 3, 200], 0),
}
malformed = pytest.mark.parametrize("offsets, good", MALFORMED.values(), ids=MALFORMED)


@malformed
@pytest.mark.parametrize("split", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_malformed_offsets_give_nan_from_the_first_bad_sequence_on(
    backend, offsets_on_device_only, dtype, split, offsets, good, seed
):
    inputs = backend.inputs("slow", seqlen=200, **SHAPE, seed=seed)
    number = len(offsets) - 1
    initial_state, d_final_state = backend.states(inputs, number=number, seed=seed)
    cu_seqlens = torch.tensor(offsets, dtype=dtype, device=backend.device)
    options = {
        "initial_state": initial_state, "d_final_state": d_final_state, "sequence_split": split
    }  # fmt: skip
    results = backend.run(inputs, cu_seqlens=cu_seqlens, **options)
    for n in range(good):
        alone, alone_options = sequence(inputs, {**options, "cu_seqlens": cu_seqlens}, n)
        assert_sequence_equals(results, backend.run(alone, **alone_options), cu_seqlens, n)
    end = offsets[good] if good > 0 else 0
    for name in PER_TOKEN:
        assert results[name][:, end:].isnan().all(), f"{name}: a row that no sequence owns is not NaN"
    for name in PER_SEQUENCE:
        assert results[name][good:].isnan().all(), f"{name}: a malformed sequence's is not NaN"


@malformed
def test_malformed_offsets_known_on_the_host_raise(backend, offsets, good, seed):
    inputs = backend.inputs(seqlen=200, **SHAPE, seed=seed)
    cu_seqlens = torch.tensor(offsets, device=backend.device)
    with pytest.raises(
        ValueError, match=r"cu_seqlens_cpu: expected (to start at 0|ascending offsets|to end at T = 200)"
    ):
        backend.forward(inputs, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens.cpu())
    with pytest.raises(
        ValueError, match=r"cu_seqlens: expected (to start at 0|ascending offsets|to end at T = 200)"
    ):
        backend.forward(inputs, cu_seqlens=cu_seqlens.cpu())


# -- states at the chunks' starts ----------------------------------------------------------------------------


@every_packing
@pytest.mark.parametrize("v_first", [False, True])
def test_the_states_at_the_chunks_starts_follow_each_other(backend, v_first, lengths, seed):
    inputs, options = packed_inputs(backend, lengths, seed)
    cu_seqlens = options["cu_seqlens"]
    initial_state, _ = backend.states(inputs, number=len(lengths), seed=seed, v_first=v_first)
    options = {"cu_seqlens": cu_seqlens, "initial_state": initial_state, "state_v_first": v_first}
    o, S, h = backend.forward(
        inputs,
        return_intermediate_states=True,
        output_final_state=True,
        cu_seqlens_cpu=cu_seqlens.cpu(),
        **options,
    )
    backend.check({"o": o, "S": S, "h": h}, backend.expected(inputs, **options))


@every_packing
def test_without_offsets_on_the_host_there_is_room_for_more_states(
    backend, offsets_on_device_only, lengths, seed
):
    inputs, options = packed_inputs(backend, lengths, seed)
    options = {name: options[name] for name in ("cu_seqlens", "initial_state")}
    _, _, h = backend.forward(inputs, return_intermediate_states=True, **options)
    expected = backend.expected(inputs, **options)["h"]
    assert h.shape[1] == sum(lengths) // 64 + len(lengths)
    backend.check({"h": h[:, : expected.shape[1]]}, {"h": expected})
    assert not h[:, expected.shape[1] :].any(), "the states behind the last chunk's are not zero"
