"""The recurrent kernel where only a GPU can show it: graphs, streams, memory, sizes, long runs."""

import importlib
import re
import shutil
import subprocess

import cases
import compare
import pytest
import torch

import gdn2_ext
from gdn2_ext import cuda_launch, cuda_recurrent, fused_recurrent_gdn2

pytestmark = pytest.mark.gpu

NUM_SLOTS = 40
# Whose states go by narrow slices, by wide ones, and as whole matrices.
BATCHES = (4, 200, 800)


@pytest.fixture(autouse=True)
def hopper_kernels():
    """Skips, with the reason, where the kernels do not run."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    tokens = cases.make_inputs("slow", seqlen=1, heads=1, dtype=torch.bfloat16, device="cuda", seed=0).tensors
    supported, reason = gdn2_ext.supports(*tokens)
    if not supported:
        pytest.skip(reason)


@pytest.fixture
def at_once_only(monkeypatch):
    """Fails where a call takes the slow way, through all checks or through an operator."""
    if cuda_launch.READ_TENSORS is None:
        pytest.skip("this PyTorch has no C interface to its tensors (2.10 has)")

    def fail(*_, **__):
        raise AssertionError("the call went through the checks")

    monkeypatch.setattr(gdn2_ext.ops, "_check_tokens", fail)


def make_inputs(seed: int, batch: int = 3, seqlen: int = 1, **sizes) -> cases.Inputs:
    sizes = {"heads": 2, "value_heads": 4, "dim_k": 128, "dim_v": 128, **sizes}
    options = {"dtype": torch.bfloat16, "device": "cuda", "seed": seed}
    return cases.make_inputs("layer_init", batch=batch, seqlen=seqlen, **sizes, **options)


def make_pool(seed: int, dtype: torch.dtype = torch.float32, slots: int = NUM_SLOTS) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(slots, 4, 128, 128, generator=generator, device="cuda").to(dtype)


def decode(inputs: cases.Inputs, **options):
    options = {"use_qk_l2norm_in_kernel": True, **options}
    with torch.no_grad():
        return fused_recurrent_gdn2(*inputs.tensors, backend="cuda", **options)


def in_pool(inputs: cases.Inputs, pool: torch.Tensor, indices: torch.Tensor, **options) -> torch.Tensor:
    return decode(inputs, initial_state=pool, state_indices=indices, inplace_final_state=True, **options)[0]


def overwrite(targets, sources) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


# -- graphs and streams --------------------------------------------------------------------------------------


@pytest.mark.caching_allocator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_follows_its_indices(dtype, seed):
    """Requests move between slots, leave (-1) and join while the graph stays."""
    inputs, pool = make_inputs(seed), make_pool(seed, dtype)
    indices = torch.tensor([4, 7, 9], device="cuda", dtype=torch.int32)
    out = torch.empty_like(inputs.v)
    in_pool(inputs, pool.clone(), indices, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_pool(inputs, pool, indices, out=out)
    expected_pool = pool.clone()
    for step, slots in enumerate(([4, 7, 9], [9, -1, 4], [39, 0, NUM_SLOTS], [-1, -1, -1], [7, 9, 39])):
        new = make_inputs(seed + step + 1)
        overwrite(inputs.tensors, new.tensors)
        indices.copy_(torch.tensor(slots))
        graph.replay()
        expected = in_pool(new, expected_pool, torch.tensor(slots, device="cuda"))
        compare.assert_bitwise_equal(out, expected, f"o of step {step}")
        compare.assert_bitwise_equal(pool, expected_pool, f"the pool after step {step}", nan=True)


@pytest.mark.caching_allocator
def test_a_captured_step_follows_its_offsets(seed):
    inputs, pool = make_inputs(seed, batch=1, seqlen=12), make_pool(seed)
    cu_seqlens = torch.tensor([0, 4, 8, 12], device="cuda", dtype=torch.int32)
    indices = torch.tensor([4, 7, 9], device="cuda")
    in_pool(inputs, pool.clone(), indices, cu_seqlens=cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = in_pool(inputs, pool, indices, cu_seqlens=cu_seqlens)
    expected_pool = pool.clone()
    for offsets in ([0, 1, 2, 12], [0, 0, 12, 12], [0, 3, 2, 12], [0, 12, 12, 13], [0, 2, 4, 6]):
        cu_seqlens.copy_(torch.tensor(offsets))
        graph.replay()
        expected = in_pool(inputs, expected_pool, indices, cu_seqlens=torch.tensor(offsets, device="cuda"))
        well_formed = offsets == sorted(offsets) and offsets[-1] == 12  # else rows are NaN
        compare.assert_bitwise_equal(o, expected, f"o at {offsets}", nan=not well_formed)
        compare.assert_bitwise_equal(pool, expected_pool, f"the pool at {offsets}", nan=True)


@pytest.mark.caching_allocator
def test_steps_that_follow_each_other_see_each_others_states(seed):
    """Launches overlap: every one starts while the one before it runs, and has to wait for what it writes."""
    steps = [make_inputs(seed + t) for t in range(50)]
    pool, indices = make_pool(seed), torch.tensor([4, 7, 9], device="cuda")
    one_by_one = pool.clone()
    outputs = []
    for step in steps:
        outputs.append(in_pool(step, one_by_one, indices))
        torch.cuda.synchronize()
    in_pool(steps[0], pool.clone(), indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [in_pool(step, pool, indices) for step in steps]
    graph.replay()
    for t, (o, expected) in enumerate(zip(captured, outputs, strict=True)):
        compare.assert_bitwise_equal(o, expected, f"o of step {t}")
    compare.assert_bitwise_equal(pool, one_by_one, "the pool", nan=True)


def test_a_step_waits_for_the_kernel_that_makes_its_inputs(seed):
    inputs, pool = make_inputs(seed, batch=64), make_pool(seed, slots=64)
    indices = torch.randperm(64, device="cuda")
    expected_pool = pool.clone()
    expected = in_pool(inputs, expected_pool, indices)
    late = cases.Inputs(*(torch.full_like(x, torch.nan) for x in (*inputs.tensors, inputs.do)))
    late_indices, late_pool = torch.full_like(indices, -1), torch.full_like(pool, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        overwrite(
            (*late.tensors, late_indices, late_pool), (*inputs.tensors, indices, pool)
        )  # the pool comes last, and is what the kernel asks for first
        o = in_pool(late, late_pool, late_indices)
    stream.synchronize()
    compare.assert_bitwise_equal(o, expected, "o")
    compare.assert_bitwise_equal(late_pool, expected_pool, "the pool", nan=True)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.caching_allocator
def test_a_step_with_out_allocates_nothing_and_waits_for_nothing(at_once_only, seed):
    inputs, pool = make_inputs(seed), make_pool(seed)
    indices, out = torch.tensor([4, 7, 9], device="cuda"), torch.empty_like(inputs.v)
    in_pool(inputs, pool, indices, out=out)
    mode = torch.cuda.get_sync_debug_mode()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        in_pool(inputs, pool, indices, out=out)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.caching_allocator
def test_a_step_allocates_its_outputs_alone(at_once_only, seed):
    inputs, pool = make_inputs(seed), make_pool(seed, slots=3)
    decode(inputs, initial_state=pool, output_final_state=True)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    decode(inputs, initial_state=pool, output_final_state=True)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 2


@pytest.mark.parametrize("seqlen", [1, 2])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_pool_with_gaps_between_its_slots(batch, dtype, v_first, seqlen, seed):
    """A layer's part of a cache of all layers, and poison all around it: narrow and wide slices."""
    inputs = make_inputs(seed, batch=batch, seqlen=seqlen)
    states = make_pool(seed, dtype, slots=batch + 5)
    cache = torch.full((batch + 5, 3, 4, 128, 128), torch.nan, dtype=dtype, device="cuda")
    indices = torch.randperm(batch + 5, device="cuda")[:batch]
    cache[indices, 1] = states[indices]
    before = cache.clone()
    o = in_pool(inputs, cache[:, 1], indices, state_v_first=v_first)
    expected = in_pool(inputs, states, indices, state_v_first=v_first)
    compare.assert_bitwise_equal(o, expected, "o")
    compare.assert_bitwise_equal(cache[indices, 1], states[indices], "the states")
    cache[indices, 1] = before[indices, 1]
    compare.assert_bitwise_equal(cache, before, "everything else", nan=True)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bad", [-1, -(2**31), 2**31 - 1, 2**62, -(2**63), NUM_SLOTS])
def test_any_index_out_of_range_is_skipped(bad, batch, seed):
    inputs = make_inputs(seed, batch=batch)
    pool = make_pool(seed)
    indices = torch.arange(batch, device="cuda") % NUM_SLOTS
    indices[1::2] = bad
    indices[6:] = bad  # no slot twice
    before, expected_pool = pool.clone(), pool.clone()
    o = in_pool(inputs, pool, indices)
    good = (indices == torch.arange(batch, device="cuda") % NUM_SLOTS).nonzero().squeeze(1)
    rows = cases.Inputs(*(x[good] for x in (*inputs.tensors, inputs.do)))
    expected = in_pool(rows, expected_pool, indices[good])
    compare.assert_bitwise_equal(o[good], expected, "o of the others")
    compare.assert_bitwise_equal(pool, expected_pool, "the pool", nan=True)
    skipped = torch.ones(batch, dtype=torch.bool, device="cuda")
    skipped[good] = False
    assert not o[skipped].any()
    assert not torch.equal(pool, before)


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [1, 3])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_sequence_does_not_know_how_many_others_there_are(batch, dtype, v_first, seqlen, seed):
    """Bit for bit, though slices are narrow in a small batch and wide in a large one."""
    inputs, pool = make_inputs(seed, batch=batch, seqlen=seqlen), make_pool(seed, dtype, slots=batch)
    together, indices = pool.clone(), torch.arange(batch, device="cuda")
    o = in_pool(inputs, together, indices, state_v_first=v_first)
    for n in (0, 1, batch // 2, batch - 1):
        row = cases.Inputs(*(x[n : n + 1] for x in (*inputs.tensors, inputs.do)))
        alone = pool.clone()
        o_alone = in_pool(row, alone, indices[n : n + 1], state_v_first=v_first)
        compare.assert_bitwise_equal(o_alone, o[n : n + 1], f"o of {n}")
        compare.assert_bitwise_equal(alone[n], together[n], f"state of {n}")


def test_more_sequences_than_a_grid_has_in_one_dimension(seed):
    batch = 65535 + 300
    inputs = make_inputs(seed, batch=batch, heads=1, value_heads=1, dim_k=16, dim_v=16)
    o, S = decode(inputs, output_final_state=True)
    for part in (slice(0, 100), slice(65500, 65600), slice(batch - 100, batch)):
        rows = cases.Inputs(*(x[part] for x in (*inputs.tensors, inputs.do)))
        o_alone, S_alone = decode(rows, output_final_state=True)
        compare.assert_bitwise_equal(o[part], o_alone, f"o of {part}")
        compare.assert_bitwise_equal(S[part], S_alone, f"S of {part}")


def test_a_pool_of_more_than_two_to_the_31_elements(needs_gpu_memory, seed):
    slots = 2**31 // (4 * 128 * 128) + 10
    needs_gpu_memory(6)
    pool = torch.zeros(slots, 4, 128, 128, device="cuda", dtype=torch.bfloat16)
    small = make_pool(seed, torch.bfloat16, slots=3)
    inputs = make_inputs(seed)
    used = [slots - 1, 0, slots - 7]
    pool[used] = small
    o = in_pool(inputs, pool, torch.tensor(used, device="cuda"))
    expected = in_pool(inputs, small, torch.arange(3, device="cuda"))
    compare.assert_bitwise_equal(o, expected, "o")
    compare.assert_bitwise_equal(pool[used], small, "the states")
    pool[used] = 0
    assert not pool.any(), "another slot was written"


def test_the_second_device_is_used_when_the_tensors_are_there(seed):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    inputs, pool = make_inputs(seed), make_pool(seed)
    there = cases.Inputs(*(x.to("cuda:1") for x in (*inputs.tensors, inputs.do)))
    pool_there = pool.to("cuda:1")
    assert torch.cuda.current_device() == 0
    indices = torch.tensor([4, 7, 9], device="cuda")
    expected, o = in_pool(inputs, pool, indices), in_pool(there, pool_there, indices.to("cuda:1"))
    assert o.device == torch.device("cuda:1")
    compare.assert_bitwise_equal(o.cpu(), expected.cpu(), "o")
    compare.assert_bitwise_equal(pool_there.cpu(), pool.cpu(), "the pool", nan=True)


# -- accuracy ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("regime", ["slow", "layer_init", "raw"])
def test_after_ten_thousand_tokens_the_error_is_that_of_float32(regime, v_first, seed):
    """At most 1.1 times that of the torch backend, which computes in float32 as well."""
    seqlen, sizes = 10_000, {"heads": 1, "value_heads": 2, "dim_k": 128, "dim_v": 64}
    sizes |= {"dtype": torch.float16, "device": "cuda", "seed": seed}
    options = {"output_final_state": True, "state_v_first": v_first}
    if regime == "raw":
        inputs = cases.raw_inputs(seqlen=seqlen, **sizes)
        options |= {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, "use_gate_in_kernel": True}
        options |= {"use_qk_l2norm_in_kernel": True, "use_gate_sigmoid_in_kernel": True}
    else:
        inputs = cases.make_inputs(regime, seqlen=seqlen, **sizes)
    with torch.no_grad():
        exact_options = {
            name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()
        }
        exact = fused_recurrent_gdn2(
            *(x.double() for x in inputs.tensors), **exact_options, backend="torch"
        )  # float64 throughout
        errors = {}
        for backend in ("torch", "cuda"):
            results = fused_recurrent_gdn2(*inputs.tensors, **options, backend=backend)
            errors[backend] = [compare.relative_error(x, y) for x, y in zip(results, exact, strict=True)]
    for name, ours, theirs in zip(("o", "S"), errors["cuda"], errors["torch"], strict=True):
        assert ours <= 1.1 * theirs, f"{name}: {ours:.3e}, and {theirs:.3e} in the torch backend"


# -- the ways to the kernel ----------------------------------------------------------------------------------


def test_every_way_to_the_kernel_gives_the_same_bits(monkeypatch, seed):
    """At once, through the checks, through the operator, and compiled."""
    inputs, pools = make_inputs(seed), [make_pool(seed) for _ in range(4)]
    indices = torch.tensor([4, 7, 9], device="cuda")

    def step(pool, *tensors):
        return fused_recurrent_gdn2(
            *tensors, initial_state=pool, state_indices=indices, inplace_final_state=True, backend="cuda"
        )[0]

    with torch.no_grad():
        outputs = [step(pools[0], *inputs.tensors)]
        outputs.append(torch.compile(step, fullgraph=True, backend="aot_eager")(pools[1], *inputs.tensors))
        monkeypatch.setattr(cuda_recurrent, "READ_TENSORS", None)
        outputs.append(step(pools[2], *inputs.tensors))
        monkeypatch.setattr(cuda_recurrent, "nobody_watches", lambda: False)
        outputs.append(step(pools[3], *inputs.tensors))
    for o, pool in zip(outputs[1:], pools[1:], strict=True):
        compare.assert_bitwise_equal(o, outputs[0], "o")
        compare.assert_bitwise_equal(pool, pools[0], "the pool", nan=True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": lambda x: x[..., :64]}, ValueError, "k: expected shape"),
        ({"v": lambda x: x[:, :, :3]}, ValueError, "v: HV must be a multiple"),
        ({"b": lambda x: x.half()}, TypeError, "b: expected dtype torch.bfloat16 as q"),
        ({"g": lambda x: x.cpu()}, ValueError, "g: expected device cuda:0 as q"),
        ({"w": lambda x: x[:2]}, ValueError, "w: expected shape"),
        ({"q": lambda x: x[0]}, ValueError, "q: expected 4 dimensions"),
        ({"initial_state": lambda x: x.half()}, TypeError, "initial_state: expected dtype"),
        ({"initial_state": lambda x: x[..., :64]}, ValueError, "initial_state: expected shape"),
        ({"initial_state": lambda x: None}, ValueError, "initial_state: expected a pool"),
        ({"state_indices": lambda x: x[:2]}, ValueError, "state_indices: expected shape"),
        ({"state_indices": lambda x: x.float()}, TypeError, "state_indices: expected dtype"),
        ({"state_indices": lambda x: x.cpu()}, ValueError, "state_indices: expected device"),
        ({"state_indices": lambda x: None}, ValueError, "inplace_final_state: expected state_indices"),
        ({"out": lambda x: x[:, :, :2]}, ValueError, "out: expected shape"),
        ({"out": lambda x: 1.0}, TypeError, "out: expected a torch.Tensor or None"),
        ({"A_log": lambda x: torch.zeros(2, device="cuda")}, ValueError, "A_log: expected None"),
        ({"scale": lambda x: "large"}, TypeError, "scale: expected a number"),
        ({"erase_scale": lambda x: 3}, ValueError, "erase_scale: expected 1 or 2"),
        ({"lower_bound": lambda x: 1.0}, ValueError, "lower_bound: expected a number below 0"),
    ],
)
def test_a_wrong_call_raises_as_on_any_device(change, error, message, seed):
    inputs = make_inputs(seed)
    arguments = dict(zip(("q", "k", "v", "g", "b", "w"), inputs.tensors, strict=True))
    arguments |= {"initial_state": make_pool(seed), "state_indices": torch.tensor([4, 7, 9], device="cuda")}
    arguments |= {"inplace_final_state": True, "out": torch.empty_like(inputs.v)}
    before = arguments["initial_state"].clone()
    pool = arguments["initial_state"]
    ((name, spoil),) = change.items()
    arguments[name] = spoil(arguments.get(name))
    with torch.no_grad(), pytest.raises(error, match=re.escape(message)):
        fused_recurrent_gdn2(**arguments)
    compare.assert_bitwise_equal(pool, before, "the pool", nan=True)


def test_the_kernels_keep_states_in_registers():
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump on PATH")
    module = importlib.import_module("gdn2_ext._C").__file__
    listing = subprocess.run(
        [tool, "-sass", module], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    kernels = re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL)
    kernels = [body for name, body in kernels if "recurrent_kernel" in name]
    assert kernels
    for body in kernels:
        assert not re.search(r"\b(LDL|STL)\b", body), "local memory: registers are spilled"
    assert any(re.search(r"LDG\.E\.\S*128", body) for body in kernels), "no loads of 16 bytes"
