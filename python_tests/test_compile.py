"""The operators under torch.library.opcheck and torch.compile(fullgraph=True)."""

import cases
import compare
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from gdn2_ext import chunk_gdn2, fused_recurrent_gdn2

SHAPE = {"batch": 2, "seqlen": 70, "heads": 2, "value_heads": 4, "dim_k": 16, "dim_v": 32}
NO_OPTIONS = (0.25, False, False, None, False, 1.0, False)
ALL_OPTIONS = (0.25, True, True, None, True, 2.0, False)
BOUNDED_OPTIONS = (0.25, True, True, -5.0, True, 1.0, True)

CALLS = {
    "plain": ({}, NO_OPTIONS),
    "gates per value head": ({"gate_heads": "value"}, NO_OPTIONS),
    "everything": ({"state": True, "raw": True}, ALL_OPTIONS),
    "bounded, v first": ({"state": True, "raw": True}, BOUNDED_OPTIONS),
    "packed": ({"state": True, "packed": True}, NO_OPTIONS),
    "packed, everything": ({"state": True, "raw": True, "packed": True}, ALL_OPTIONS),
    "empty": ({"state": True, "seqlen": 0}, NO_OPTIONS),
}
every_call = pytest.mark.parametrize("kind, options", CALLS.values(), ids=CALLS)


def operator_inputs(backend, kind: dict, options: tuple, seed: int, requires_grad: bool = False) -> tuple:
    """q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens; the gradients of both outputs."""
    kind = dict(kind)
    state, raw, packed = (kind.pop(name, False) for name in ("state", "raw", "packed"))
    shape = {**SHAPE, **kind, "batch": 1 if packed else 2}
    inputs = backend.raw_inputs(**shape, seed=seed) if raw else backend.inputs("slow", **shape, seed=seed)
    lengths = (13, 0, 57)
    number = len(lengths) if packed else None
    states = backend.states(inputs, number=number, seed=seed, v_first=options[-1])
    tensors = [*inputs.tensors, inputs.A_log, inputs.dt_bias, states[0] if state else None]
    tensors = [x if x is None else x.detach().requires_grad_(requires_grad) for x in tensors]
    cu_seqlens = cases.packed_offsets(lengths, device=backend.device) if packed else None
    return (*tensors, cu_seqlens), inputs.do, states[1]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- opcheck: schema, autograd registration, fake kernel, dynamic shapes -------------------------------------


@every_call
@pytest.mark.parametrize(
    "requires_grad, keeps_tiles, split",
    [(False, False, 0), (True, False, 0), (True, True, 0), (True, True, 3)],
)
def test_chunk_forward_passes_opcheck(backend, kind, options, requires_grad, keeps_tiles, split, seed):
    tensors, _, _ = operator_inputs(backend, kind, options, seed, requires_grad)
    arguments = (*tensors, *options, True, None, requires_grad, keeps_tiles, split, backend.name)
    opcheck(torch.ops.gdn2_ext.chunk_forward.default, arguments)


@pytest.mark.parametrize("packed, num_state_chunks", [(False, 2), (True, 4)])
def test_chunk_forward_with_intermediate_states_passes_opcheck(backend, packed, num_state_chunks, seed):
    tensors, _, _ = operator_inputs(backend, {"state": True, "packed": packed}, NO_OPTIONS, seed)
    arguments = (*tensors, *NO_OPTIONS, False, num_state_chunks, False, False, 0, backend.name)
    opcheck(torch.ops.gdn2_ext.chunk_forward.default, arguments)


@every_call
@pytest.mark.parametrize("with_d_final_state", [False, True])
def test_chunk_backward_passes_opcheck(backend, kind, options, with_d_final_state, seed):
    tensors, do, d_final_state = operator_inputs(backend, kind, options, seed)
    *_, kept = torch.ops.gdn2_ext.chunk_forward(*tensors, *options, True, None, True, False, 0, backend.name)
    needed = [x is not None for x in tensors[:9]]
    d_final_state = d_final_state if with_d_final_state else None
    arguments = (do, d_final_state, *tensors, kept, *options, needed, 0, backend.name)
    opcheck(torch.ops.gdn2_ext.chunk_backward.default, arguments)
    some = [wanted and place % 2 == 0 for place, wanted in enumerate(needed)]
    arguments = (do, d_final_state, *tensors, kept, *options, some, 0, backend.name)
    opcheck(torch.ops.gdn2_ext.chunk_backward.default, arguments)


@pytest.mark.recurrent
@every_call
@pytest.mark.parametrize("with_final_state", [False, True])
def test_recurrent_forward_passes_opcheck(backend, kind, options, with_final_state, seed):
    tensors, _, _ = operator_inputs(backend, kind, options, seed)
    arguments = (*tensors, None, None, *options, with_final_state, backend.name)
    opcheck(torch.ops.gdn2_ext.recurrent_forward.default, arguments)


@pytest.mark.recurrent
@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("functional", [True, False])
def test_recurrent_forward_on_a_pool_passes_opcheck(backend, functional, columns, seed):
    inputs = backend.inputs("slow", **{**SHAPE, "seqlen": 3}, seed=seed)
    pool = backend.normal(9, 4, 16, 32, seed=seed)
    indices = torch.tensor([5, 2], device=backend.device)
    accepted = None
    if columns:
        indices = torch.tensor([[5, 1, 8], [2, 7, 0]], device=backend.device)
        accepted = torch.tensor([1, 3], device=backend.device)
    name = "recurrent_forward" if functional else "recurrent_forward_"
    with_final_state = (True,) if functional else ()
    arguments = (*inputs.tensors, None, None, pool, None, indices, accepted, *NO_OPTIONS)
    opcheck(getattr(torch.ops.gdn2_ext, name).default, (*arguments, *with_final_state, backend.name))


# -- torch.compile -------------------------------------------------------------------------------------------


def loss(o: torch.Tensor, final_state: torch.Tensor) -> torch.Tensor:
    """Something around the op for the compiler to work on."""
    return (o.float() * torch.sin(o.float())).sum() + final_state.square().mean()


def training_step(backend, leaves: list, **options) -> torch.Tensor:
    o, final_state = chunk_gdn2(
        *leaves[:6], A_log=leaves[6], dt_bias=leaves[7], initial_state=leaves[8],
        output_final_state=True, **cases.EVERYTHING, **options, backend=backend.name,
    )  # fmt: skip
    return loss(o, final_state)


def leaves_of(backend, seed: int, number: int | None = None, **shape) -> list[torch.Tensor]:
    inputs = backend.raw_inputs(**{**SHAPE, **shape}, seed=seed)
    initial_state, _ = backend.states(inputs, number=number, seed=seed)
    return [
        x.detach().requires_grad_() for x in (*inputs.tensors, inputs.A_log, inputs.dt_bias, initial_state)
    ]


def assert_compiled_equals_eager(step, leaves: list, compiled, exact: bool = True, bar: float = 0.0) -> None:
    expected_loss = step(leaves)
    expected = torch.autograd.grad(expected_loss, leaves)
    actual_loss = compiled(leaves)
    actual = torch.autograd.grad(actual_loss, leaves)
    names = ("dq", "dk", "dv", "dg", "db", "dw", "dA_log", "d_dt_bias", "d_initial_state")
    for name, x, y in zip(("loss", *names), (actual_loss, *actual), (expected_loss, *expected), strict=True):
        if exact:
            compare.assert_bitwise_equal(x, y, name)
        else:
            compare.assert_close(x, y, bar, name)


def test_a_compiled_training_step_equals_the_eager_one(backend, seed):
    leaves = leaves_of(backend, seed)

    def step(leaves):
        return training_step(backend, leaves)

    assert_compiled_equals_eager(step, leaves, torch.compile(step, fullgraph=True, backend="aot_eager"))


def test_a_compiled_packed_training_step_equals_the_eager_one(backend, seed):
    leaves = leaves_of(backend, seed, number=3, batch=1)
    cu_seqlens = torch.tensor([0, 13, 13, 70], device=backend.device)

    def step(leaves):
        return training_step(backend, leaves, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens.cpu())

    def compiled_step(leaves):
        return training_step(backend, leaves, cu_seqlens=cu_seqlens)

    assert_compiled_equals_eager(
        step, leaves, torch.compile(compiled_step, fullgraph=True, backend="aot_eager")
    )


@pytest.mark.slow
def test_inductor_compiles_a_training_step(backend, seed):
    """Whose code checks the strides that the fake kernels promise."""
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(3, device=backend.device))
    except Exception as error:
        pytest.skip(f"inductor cannot compile here: {str(error).splitlines()[0]}")
    leaves = leaves_of(backend, seed)

    def step(leaves):
        return training_step(backend, leaves)

    # The loss around the op is computed in fused form, in another order than eagerly.
    bar = backend.bar("dg")
    assert_compiled_equals_eager(step, leaves, torch.compile(step, fullgraph=True), exact=False, bar=bar)


def test_one_graph_serves_every_length(backend, seed):
    counter = CompileCounterWithBackend("aot_eager")

    def step(leaves):
        return training_step(backend, leaves)

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for seqlen in (70, 130, 64, 200, 33):
        assert_compiled_equals_eager(step, leaves_of(backend, seed, seqlen=seqlen), compiled)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 5, "another length made it compile again"


def test_compiled_inference_returns_the_states_of_the_chunks(backend, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)

    def infer(*tensors):
        return chunk_gdn2(
            *tensors, output_final_state=True, return_intermediate_states=True, backend=backend.name
        )

    actual = torch.compile(infer, fullgraph=True, backend="aot_eager")(*inputs.tensors)
    for name, x, y in zip(("o", "S", "h"), actual, infer(*inputs.tensors), strict=True):
        compare.assert_bitwise_equal(x, y, name)


def test_compiled_with_the_backend_left_open(backend, seed):
    """`auto` asks for the device while tracing, and leaves no graph break."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)

    def infer(*tensors):
        return chunk_gdn2(*tensors, output_final_state=True)

    actual = torch.compile(infer, fullgraph=True, backend="aot_eager")(*inputs.tensors)
    for name, x, y in zip(("o", "S"), actual, infer(*inputs.tensors), strict=True):
        compare.assert_bitwise_equal(x, y, name)


def test_the_packing_may_change_under_one_graph(backend, seed):
    """Offsets are data: other lengths of the sequences, and another number of them, reach the same graph."""
    counter = CompileCounterWithBackend("aot_eager")

    def infer(cu_seqlens, *tensors):
        return chunk_gdn2(*tensors, cu_seqlens=cu_seqlens, output_final_state=True, backend=backend.name)

    compiled = torch.compile(infer, fullgraph=True, backend=counter, dynamic=True)
    inputs = backend.inputs("slow", **{**SHAPE, "batch": 1}, seed=seed)
    compilations = []
    for offsets in ([0, 13, 13, 13, 14, 70], [0, 0, 1, 1, 64, 70], [0, 1, 2, 3, 4, 5, 70]):
        cu_seqlens = torch.tensor(offsets, device=backend.device)
        actual, expected = compiled(cu_seqlens, *inputs.tensors), infer(cu_seqlens, *inputs.tensors)
        for name, x, y in zip(("o", "S"), actual, expected, strict=True):
            compare.assert_bitwise_equal(x, y, f"{name} with offsets {offsets}")
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3, "other offsets made it compile again"


def test_compiled_under_autocast(backend, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    tensors = [x.float() for x in inputs.tensors]

    def infer(*tensors):
        with torch.autocast(backend.device.type, torch.bfloat16):
            return chunk_gdn2(*tensors, output_final_state=True, backend=backend.name)

    actual = torch.compile(infer, fullgraph=True, backend="aot_eager")(*tensors)
    expected = infer(*tensors)
    assert actual[0].dtype == torch.bfloat16
    for name, x, y in zip(("o", "S"), actual, expected, strict=True):
        compare.assert_bitwise_equal(x, y, name)


@pytest.mark.recurrent
@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_decoding_step_equals_the_eager_one(backend, inplace, seed):
    inputs = backend.inputs("slow", **{**SHAPE, "seqlen": 1}, seed=seed)
    indices = torch.tensor([5, 2], device=backend.device)

    def decode(pool, *tensors):
        return fused_recurrent_gdn2(
            *tensors, initial_state=pool, state_indices=indices, inplace_final_state=inplace,
            output_final_state=True, backend=backend.name,
        )  # fmt: skip

    pools = [backend.normal(7, 4, 16, 32, seed=seed) for _ in range(2)]
    expected = decode(pools[0], *inputs.tensors)
    actual = torch.compile(decode, fullgraph=True, backend="aot_eager")(pools[1], *inputs.tensors)
    for name, x, y in zip(("o", "S", "pool"), (*actual, pools[1]), (*expected, pools[0]), strict=True):
        compare.assert_bitwise_equal(x, y, name)
