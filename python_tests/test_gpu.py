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


def test_a_call_never_waits_for_the_device(seed):
    inputs = make_inputs(seed)
    cu_seqlens = torch.tensor([0, 100, 300], device="cuda")
    forward(inputs, cu_seqlens=cu_seqlens)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(inputs)
        forward(inputs, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize(
    "sizes", [{"batch": 4, "heads": 16}, {"batch": 16, "heads": 16}, {"heads": 3, "dim_v": 256}]
)
def test_two_runs_agree_bit_for_bit(sizes, seed):
    """With one and with two slices of the value columns a CTA, and more CTAs than run at once."""
    inputs = make_inputs(seed, seqlen=1000, **sizes)
    first, second = forward(inputs), forward(inputs)
    compare.assert_bitwise_equal(first[0], second[0], "o")
    compare.assert_bitwise_equal(first[1], second[1], "final state")


def test_the_second_device_is_used_when_the_tensors_are_there(seed):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    here = make_inputs(seed)
    there = cases.Inputs(*(x.to("cuda:1") for x in (*here.tensors, here.do)))
    assert torch.cuda.current_device() == 0
    expected, results = forward(here), forward(there)
    assert results[0].device == torch.device("cuda:1")
    compare.assert_bitwise_equal(results[0].cpu(), expected[0].cpu(), "o")


def test_tensors_of_more_than_two_to_the_31_elements(seed):
    """The last and the first head of a call with 2^31 + 2^20 elements a tensor equal calls of their own."""
    seqlen, heads, dim = 2**17 + 64, 128, 128
    free, _ = torch.cuda.mem_get_info()
    if free < 90 * 2**30:
        pytest.skip(f"needs 90 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (1, seqlen, heads, dim)
    q, k, v, b, w = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(5))
    for x in (q, k, v):
        x.normal_(generator=generator)
    for x in (b, w):
        x.uniform_(generator=generator)
    g = torch.empty(shape, device="cuda").uniform_(-0.1, 0, generator=generator)
    assert q.numel() > 2**31
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True, "backend": "cuda"}
    with torch.no_grad():
        o, final_state = gdn2_ext.chunk_gdn2(q, k, v, g, b, w, **options)
        for head in (0, heads - 1):
            alone = [x[:, :, head : head + 1] for x in (q, k, v, g, b, w)]
            o_alone, state_alone = gdn2_ext.chunk_gdn2(*alone, **options)
            assert torch.equal(o[:, :, head : head + 1], o_alone), f"o of head {head}"
            assert torch.equal(final_state[:, head : head + 1], state_alone), f"final state of head {head}"


def test_the_scan_is_made_of_tensor_core_and_bulk_tensor_instructions():
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump on PATH")
    module = importlib.import_module("gdn2_ext._C").__file__
    listing = subprocess.run(
        [tool, "-sass", module], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    kernels = re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL)
    scans = [body for name, body in kernels if "scan_kernel" in name]
    prepares = [body for name, body in kernels if "prepare_kernel" in name]
    assert scans and prepares
    for body in (*scans, *prepares):
        assert "HGMMA" in body and "UTMALDG" in body
        assert not re.search(r"\b(LDL|STL)\b", body), "local memory: registers are spilled"
