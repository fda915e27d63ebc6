"""What only a GPU can show: streams, graphs, devices, sizes beyond 32 bits, what the module is made of."""

import importlib
import re
import shutil
import subprocess

import cases
import compare
import pytest
import torch

import gdn2_ext

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper_kernels():
    """Skips, with the reason, where the kernels do not run."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    tokens = cases.make_inputs("slow", seqlen=1, heads=1, dtype=torch.bfloat16, device="cuda", seed=0).tensors
    supported, reason = gdn2_ext.supports(*tokens)
    if not supported:
        pytest.skip(reason)


def make_inputs(seed: int, seqlen: int = 300, **sizes) -> cases.Inputs:
    return cases.make_inputs(
        "layer_init", seqlen=seqlen, **{"heads": 2, **sizes}, dtype=torch.bfloat16, device="cuda", seed=seed
    )


def forward(inputs: cases.Inputs, **options) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return gdn2_ext.chunk_gdn2(*inputs.tensors, output_final_state=True, backend="cuda", **options)


NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "db", "dw", "d initial state")


def training_step(inputs: cases.Inputs, states: tuple, **options) -> list[torch.Tensor]:
    """o, the final state and every gradient, through both; states: initial, gradient of the final one."""
    initial_state, d_final_state = states
    leaves = [x.detach().requires_grad_() for x in (*inputs.tensors, initial_state)]
    o, final_state = gdn2_ext.chunk_gdn2(
        *leaves[:6], initial_state=leaves[6], output_final_state=True, backend="cuda", **options
    )
    gradients = torch.autograd.grad([o, final_state], leaves, [inputs.do, d_final_state])
    return [o.detach(), final_state.detach(), *gradients]


def make_states(
    inputs: cases.Inputs, seed: int, number: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (number or inputs.v.shape[0], inputs.v.shape[2], inputs.q.shape[3], inputs.v.shape[3])
    return tuple(torch.randn(shape, generator=generator, device="cuda") for _ in range(2))


def assert_same(actual, expected, where: str = "") -> None:
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        compare.assert_bitwise_equal(x, y, name + where)


@pytest.mark.parametrize("b_is_mn_major", [False, True])
@pytest.mark.parametrize("rows, depth", [(64, 64), (256, 192), (1024, 1024)])
def test_a_tile_product_is_right(rows, depth, b_is_mn_major, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    a = torch.randn(rows, depth, generator=generator, device="cuda").bfloat16()
    b = torch.randn(
        *((depth, 128) if b_is_mn_major else (128, depth)), generator=generator, device="cuda"
    ).bfloat16()
    c = torch.full((rows, 128), torch.nan, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    extension = importlib.import_module("gdn2_ext._C")
    extension.tile_product(a.data_ptr(), b.data_ptr(), c.data_ptr(), rows, depth, b_is_mn_major, stream)
    exact = a.double() @ (b.double() if b_is_mn_major else b.double().T)
    compare.assert_close(c, exact, 1e-6, "C")  # products of bf16 are exact in float32; the sums are rounded


def test_a_call_runs_on_the_current_stream(seed):
    """Inputs that a slow stream has not written yet: only a kernel on that stream reads what it should."""
    inputs = make_inputs(seed)
    expected = forward(inputs)
    late = cases.Inputs(*(torch.full_like(x, torch.nan) for x in (*inputs.tensors, inputs.do)))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, source in zip(late.tensors, inputs.tensors):
            target.copy_(source)
        results = forward(late)
    stream.synchronize()
    compare.assert_bitwise_equal(results[0], expected[0], "o")
    compare.assert_bitwise_equal(results[1], expected[1], "final state")


@pytest.mark.caching_allocator
def test_a_call_holds_its_outputs_alone(seed):
    """And those are PyTorch's own: storage that came through DLPack would not hear of other streams."""
    inputs = make_inputs(seed)
    with torch.no_grad():
        forward(inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        results = forward(inputs)
        held = torch.cuda.memory_allocated() - before
    storages = [x.untyped_storage() for x in results[:2]]
    assert held == sum((x.nbytes() + 511) // 512 * 512 for x in storages)
    assert all(x.resizable() for x in storages)


@pytest.mark.caching_allocator
def test_a_captured_call_follows_its_inputs(seed):
    inputs = make_inputs(seed)
    forward(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, final_state = forward(inputs)
    for again in range(3):
        other = make_inputs(seed + 1 + again)
        for target, source in zip(inputs.tensors, other.tensors):
            target.copy_(source)
        graph.replay()
        expected = forward(other)
        compare.assert_bitwise_equal(o, expected[0], f"o of replay {again}")
        compare.assert_bitwise_equal(final_state, expected[1], f"final state of replay {again}")


@pytest.mark.caching_allocator
def test_a_captured_packed_call_follows_its_offsets(seed):
    inputs = make_inputs(seed)
    cu_seqlens = torch.tensor([0, 100, 200, 300], device="cuda", dtype=torch.int32)
    forward(inputs, cu_seqlens=cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, final_state = forward(inputs, cu_seqlens=cu_seqlens)
    for offsets in ([0, 0, 7, 300], [0, 64, 128, 300], [0, 299, 299, 300]):
        cu_seqlens.copy_(torch.tensor(offsets))
        graph.replay()
        expected = forward(inputs, cu_seqlens=torch.tensor(offsets, device="cuda"))
        compare.assert_bitwise_equal(o, expected[0], f"o at {offsets}")
        compare.assert_bitwise_equal(final_state, expected[1], f"final state at {offsets}")


def assert_never_waits(call) -> None:
    """Neither by PyTorch's functions nor by others: a second of work on the device is not done afterwards."""
    call()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)
        call()
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()


@pytest.mark.caching_allocator  # without it memory is returned, which waits
def test_a_call_never_waits_for_the_device(seed):
    inputs = make_inputs(seed)
    cu_seqlens = torch.tensor([0, 100, 300], device="cuda")
    for options in ({}, {"sequence_split": 3}, {"return_intermediate_states": True}):
        assert_never_waits(lambda o=options: forward(inputs, **o))
    for options in ({}, {"sequence_split": 3}):
        assert_never_waits(lambda o=options: forward(inputs, cu_seqlens=cu_seqlens, **o))


@pytest.mark.parametrize(
    "sizes", [{"batch": 4, "heads": 16}, {"batch": 16, "heads": 16}, {"heads": 3, "dim_v": 256}]
)
def test_two_runs_agree_bit_for_bit(sizes, seed):
    """With one and with two slices of the value columns a CTA, and more CTAs than run at once."""
    inputs = make_inputs(seed, seqlen=1000, **sizes)
    first, second = forward(inputs), forward(inputs)
    compare.assert_bitwise_equal(first[0], second[0], "o")
    compare.assert_bitwise_equal(first[1], second[1], "final state")


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 4, "heads": 16},
        {"batch": 1, "heads": 2, "value_heads": 4},
        {"heads": 3, "dim_k": 64, "dim_v": 256},
    ],
)
def test_two_training_steps_agree_bit_for_bit(sizes, seed):
    inputs = make_inputs(seed, seqlen=1000, **sizes)
    states = make_states(inputs, seed)
    assert_same(training_step(inputs, states), training_step(inputs, states))


@pytest.mark.parametrize("options", [{}, {"use_qk_l2norm_in_kernel": True}])
def test_gradients_of_packed_sequences_are_those_of_each_alone(options, seed):
    lengths = (37, 0, 64, 1, 200, 130)
    inputs = make_inputs(seed, seqlen=sum(lengths), value_heads=4)
    states = make_states(inputs, seed, number=len(lengths))
    cu_seqlens = cases.packed_offsets(lengths, device="cuda")
    packed = training_step(inputs, states, cu_seqlens=cu_seqlens, **options)
    begin = 0
    for n, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        alone = cases.Inputs(*(x[:, rows].contiguous() for x in (*inputs.tensors, inputs.do)))
        expected = training_step(alone, tuple(x[n : n + 1] for x in states), **options)
        of_sequence = [
            x[n : n + 1] if "state" in name else x[:, rows] for name, x in zip(NAMES, packed, strict=True)
        ]
        assert_same(of_sequence, expected, f" of sequence {n}")
        begin += length


def test_nan_in_one_sequence_stays_in_it(seed):
    """Inputs, dO and states: the tiles of a tail hold rows of the next sequence."""
    lengths = (70, 50, 130)
    inputs = make_inputs(seed, seqlen=sum(lengths))
    states = make_states(inputs, seed, number=len(lengths))
    cu_seqlens = cases.packed_offsets(lengths, device="cuda")
    expected = training_step(inputs, states, cu_seqlens=cu_seqlens)
    for x in (*inputs.tensors, inputs.do):
        x[:, 70:120] = torch.nan
    for x in states:
        x[1] = torch.nan
    results = training_step(inputs, states, cu_seqlens=cu_seqlens)
    for name, x, y in zip(NAMES, results, expected, strict=True):
        kept = (lambda t: t[[0, 2]]) if "state" in name else (lambda t: torch.cat([t[:, :70], t[:, 120:]], 1))
        compare.assert_bitwise_equal(kept(x), kept(y), name)


def test_a_training_step_writes_all_of_its_results(seed):
    """The memory that results and workspaces are made in is NaN beforehand."""
    inputs = make_inputs(seed, seqlen=333, batch=2, value_heads=4)
    states = make_states(inputs, seed)
    expected = training_step(inputs, states, use_qk_l2norm_in_kernel=True)
    torch.cuda.synchronize()
    for size in [2**k for k in range(9, 27)] * 2:
        torch.full((size // 4,), torch.nan, device="cuda")
    filler = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    del filler
    assert_same(training_step(inputs, states, use_qk_l2norm_in_kernel=True), expected)


# What a step is called with, and whether sequences are packed.
STEPS = {
    "plain": ({}, False),
    "segments": ({"sequence_split": 4}, False),
    "segments, tiles kept": ({"sequence_split": 4, "disable_recompute": True}, False),
    "packed": ({"sequence_split": 1}, True),
    "packed in segments": ({"sequence_split": 3}, True),
}
every_step = pytest.mark.parametrize(("options", "packed"), STEPS.values(), ids=STEPS)


@pytest.mark.caching_allocator
@every_step
def test_a_captured_training_step_follows_its_inputs(options, packed, seed):
    """Forward, backward and an SGD step on the inputs. And offsets."""
    inputs = make_inputs(seed)
    leaves = [x.detach().clone().requires_grad_() for x in inputs.tensors]
    optimizer = torch.optim.SGD(leaves, lr=0.125)
    cu_seqlens = torch.tensor([0, 100, 200, 300], device="cuda") if packed else None

    def step():
        for x in leaves:
            x.grad = None
        o, _ = gdn2_ext.chunk_gdn2(*leaves, cu_seqlens=cu_seqlens, **options, backend="cuda")
        o.backward(inputs.do)
        optimizer.step()

    def load(seed):
        with torch.no_grad():
            for leaf, x in zip(leaves, make_inputs(seed).tensors):
                leaf.copy_(x)
            if packed:
                cu_seqlens[1:3] = torch.tensor([seed % 200, 200 + seed % 100])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for again in range(3):
        load(seed + again)
        graph.replay()
        replayed = [x.detach().clone() for x in leaves]
        load(seed + again)
        step()
        for name, x, y in zip("qkvgbw", replayed, leaves):
            compare.assert_bitwise_equal(x, y.detach(), f"{name} after replay {again}")


def test_a_backward_runs_on_the_forwards_stream(seed):
    inputs = make_inputs(seed)
    states = make_states(inputs, seed)
    expected = training_step(inputs, states)
    late = cases.Inputs(*(torch.full_like(x, torch.nan) for x in (*inputs.tensors, inputs.do)))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, source in zip((*late.tensors, late.do), (*inputs.tensors, inputs.do)):
            target.copy_(source)
        results = training_step(late, states)
    stream.synchronize()
    assert_same(results, expected)


@pytest.mark.caching_allocator
@every_step
def test_a_backward_never_waits_for_the_device(options, packed, seed):
    inputs = make_inputs(seed)
    if packed:
        options = {**options, "cu_seqlens": torch.tensor([0, 100, 200, 300], device="cuda")}
    states = make_states(inputs, seed, number=3 if packed else None)
    assert_never_waits(lambda: training_step(inputs, states, **options))


def test_the_second_device_is_used_when_the_tensors_are_there(seed):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    here = make_inputs(seed)
    there = cases.Inputs(*(x.to("cuda:1") for x in (*here.tensors, here.do)))
    assert torch.cuda.current_device() == 0
    expected, results = forward(here), forward(there)
    assert results[0].device == torch.device("cuda:1")
    compare.assert_bitwise_equal(results[0].cpu(), expected[0].cpu(), "o")


def test_tensors_of_more_than_two_to_the_31_elements(needs_gpu_memory, seed):
    """The last and the first head of a call with 2^31 + 2^20 elements a tensor equal calls of their own."""
    seqlen, heads, dim = 2**17 + 64, 128, 128
    needs_gpu_memory(60)  # the call and its tensors take 49
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (1, seqlen, heads, dim)
    q, k, v, b, w = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(5))
    for x in (q, k, v):
        x.normal_(generator=generator)
    for x in (b, w):
        x.uniform_(generator=generator)
    g = torch.empty(shape, device="cuda").uniform_(-0.1, 0, generator=generator)
    assert q.numel() > 2**31
    options = {
        "use_qk_l2norm_in_kernel": True, "output_final_state": True, "backend": "cuda", "sequence_split": 1
    }  # fmt: skip
    with torch.no_grad():
        o, final_state = gdn2_ext.chunk_gdn2(q, k, v, g, b, w, **options)
        for head in (0, heads - 1):
            alone = [x[:, :, head : head + 1] for x in (q, k, v, g, b, w)]
            o_alone, state_alone = gdn2_ext.chunk_gdn2(*alone, **options)
            assert torch.equal(o[:, :, head : head + 1], o_alone), f"o of head {head}"
            assert torch.equal(final_state[:, head : head + 1], state_alone), f"final state of head {head}"


@pytest.mark.parametrize("options", [{}, {"use_qk_l2norm_in_kernel": True}], ids=["plain", "norm"])
def test_a_training_step_of_more_sequences_than_a_grid_has_in_one_dimension(options, needs_gpu_memory, seed):
    batch = 65535 + 300
    needs_gpu_memory(24)  # the call and its tensors take 9
    inputs = make_inputs(seed, seqlen=2, batch=batch, heads=1, dim_v=16)
    states = make_states(inputs, seed)
    together = training_step(inputs, states, **options)
    for part in (slice(0, 100), slice(65500, 65600), slice(batch - 100, batch)):
        rows = cases.Inputs(*(x[part] for x in (*inputs.tensors, inputs.do)))
        alone = training_step(rows, tuple(x[part] for x in states), **options)
        assert_same([x[part] for x in together], alone, f" of {part}")


def test_the_kernels_are_made_of_tensor_core_and_bulk_copy_instructions():
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump on PATH")
    module = importlib.import_module("gdn2_ext._C").__file__
    listing = subprocess.run(
        [tool, "-sass", module], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    kernels = re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL)
    # Which instructions a kernel is made of; of prepare's the backward's form makes no products.
    asked = {
        r"11scan_kernel": ("HGMMA", "UTMALDG", "UBLKCP", "UTMASTG"),
        r"14prepare_kernel.*6Extras\w+?EEELb0E": ("HGMMA", "UTMALDG"),
        r"14prepare_kernel.*6Extras\w+?EEELb1E": ("UTMALDG",),
        r"20scan_backward_kernel": ("HGMMA", "UTMALDG", "UBLKCP"),
        r"16gradients_kernel": ("HGMMA", "HMMA", "UTMALDG", "UBLKCP", "UTMASTG"),
    }
    for pattern, instructions in asked.items():
        bodies = [body for name, body in kernels if re.search(pattern, name)]
        assert bodies, f"no kernel {pattern}"
        for body in bodies:
            missing = [x for x in instructions if x not in body]
            assert not missing, f"{pattern}: without {missing}"
            assert not re.search(r"\b(LDL|STL)\b", body), f"{pattern}: local memory, registers are spilled"
