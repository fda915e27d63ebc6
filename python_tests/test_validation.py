"""Every bad input raises before anything runs, naming the argument, what was expected and what came.

All of it happens on the host, so that one device is enough; what is on another device is on `meta` here.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2_ext import chunk_gdn2, fused_recurrent_gdn2, supports

B, T, H, HV, K, V = 2, 3, 2, 4, 8, 16


def good_call() -> dict:
    return {
        "q": torch.zeros(B, T, H, K),
        "k": torch.zeros(B, T, H, K),
        "v": torch.zeros(B, T, HV, V),
        "g": torch.zeros(B, T, H, K),
        "b": torch.zeros(B, T, H, K),
        "w": torch.zeros(B, T, HV, V),
    }


def packed_call() -> dict:
    return {name: x[:1] for name, x in good_call().items()} | {"cu_seqlens": torch.tensor([0, 2, T])}


def pool_call() -> dict:
    return good_call() | {"initial_state": torch.zeros(9, HV, K, V), "state_indices": torch.tensor([1, 2])}


class NoOperator(TorchDispatchMode):
    """Fails as soon as an operator of this package runs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.namespace != "gdn2_ext", f"{function} ran before the arguments were checked"
        return function(*args, **(kwargs or {}))


def assert_raises(function, arguments: dict, error: type, message: str) -> None:
    with NoOperator(), pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    assert str(caught.value) == message


def replace(name: str, *, shape=None, dtype=None, device=None):
    """The named tensor of a call, made again in another shape, dtype or on another device."""

    def change(call: dict) -> None:
        x = call[name]
        call[name] = torch.zeros(
            x.shape if shape is None else shape, dtype=dtype or x.dtype, device=device or x.device
        )

    change.__name__ = f"{name} {shape or dtype or device}"
    return change


def give(**values):
    def change(call: dict) -> None:
        call.update(values)

    change.__name__ = ", ".join(f"{name}={_short(x)}" for name, x in values.items())
    return change


def _short(x) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)


def case(change, error: type, message: str, call=good_call):
    return pytest.param(call, change, error, message, id=change.__name__)


def float32(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


GATE = {"use_gate_in_kernel": True}

# What both functions and `supports` check: the six tensors with a row per token.
BAD_TOKENS = [
    *(
        case(give(**{name: value}), TypeError, f"{name}: expected a torch.Tensor, got {came}")
        for name in ("q", "k", "v", "g", "b", "w")
        for value, came in ((None, "NoneType"), ([0.0], "list"))
    ),
    *(
        case(replace(name, device="meta"), ValueError, f"{name}: expected device cpu as q, got meta")
        for name in ("k", "v", "g", "b", "w")
    ),
    case(
        replace("q", dtype=torch.int64),
        TypeError,
        "q: expected dtype torch.bfloat16 or torch.float16 or torch.float32 or torch.float64, "
        "got torch.int64",
    ),
    *(
        case(
            replace(name, dtype=torch.bfloat16),
            TypeError,
            f"{name}: expected dtype torch.float32 as q, got torch.bfloat16",
        )
        for name in ("k", "v", "b", "w")
    ),
    case(
        replace("g", dtype=torch.bfloat16), TypeError, "g: expected dtype torch.float32, got torch.bfloat16"
    ),
    case(replace("g", dtype=torch.float64), TypeError, "g: expected dtype torch.float32, got torch.float64"),
    *(
        case(
            replace(name, shape=shape),
            ValueError,
            f"{name}: expected 4 dimensions [B, T, heads, channels], got shape {shape}",
        )
        for name in ("q", "k", "v", "g", "b", "w")
        for shape in ((T, H, K), (1, B, T, H, K))
    ),
    case(
        replace("q", shape=(B, T, 0, K)),
        ValueError,
        "q, v: heads and channels must not be 0, got q (2, 3, 0, 8) and v (2, 3, 4, 16)",
    ),
    case(
        replace("v", shape=(B, T, HV, 0)),
        ValueError,
        "q, v: heads and channels must not be 0, got q (2, 3, 2, 8) and v (2, 3, 4, 0)",
    ),
    *(
        case(
            replace("k", shape=shape),
            ValueError,
            f"k: expected shape (2, 3, 2, 8) [B, T, H, K] as q, got {shape}",
        )
        for shape in ((B + 1, T, H, K), (B, T + 1, H, K), (B, T, H + 1, K), (B, T, H, K + 1))
    ),
    case(
        replace("v", shape=(B, T, 3, V)),
        ValueError,
        "v: HV must be a multiple of the H = 2 of q, got HV = 3",
    ),
    case(
        replace("v", shape=(B, T, 1, V)),
        ValueError,
        "v: HV must be a multiple of the H = 2 of q, got HV = 1",
    ),
    *(
        case(
            replace("v", shape=shape),
            ValueError,
            f"v: expected shape (2, 3, 4, 16) [B, T, HV, V] with B and T as q, got {shape}",
        )
        for shape in ((B + 1, T, HV, V), (B, T + 1, HV, V))
    ),
    *(
        case(
            replace("w", shape=shape),
            ValueError,
            f"w: expected shape (2, 3, 4, 16) [B, T, HV, V] as v, got {shape}",
        )
        for shape in ((B + 1, T, HV, V), (B, T, H, V), (B, T, HV, V + 1))
    ),
    case(replace("g", shape=(B, T, 3, K)), ValueError, "g: expected H = 2 or HV = 4 heads, got 3"),
    *(
        case(
            replace("g", shape=shape),
            ValueError,
            f"g: expected shape (2, 3, 2, 8) [B, T, H or HV, K] with B, T and K as q, got {shape}",
        )
        for shape in ((B + 1, T, H, K), (B, T + 1, H, K), (B, T, H, K + 1))
    ),
    *(
        case(
            replace("b", shape=shape),
            ValueError,
            f"b: expected shape (2, 3, 2, 8) [B, T, heads of g, K] as g, got {shape}",
        )
        for shape in ((B, T, HV, K), (B, T, H, K - 1), (B, T, 1, K))
    ),
]

# What both functions check: options and states.
BAD_OPTIONS = [
    case(
        give(**GATE),
        ValueError,
        "A_log: expected a tensor [H] with use_gate_in_kernel, got None (optional with lower_bound)",
    ),
    case(give(A_log=float32(H)), ValueError, "A_log: expected None without use_gate_in_kernel, got a tensor"),
    case(
        give(dt_bias=float32(H * K)),
        ValueError,
        "dt_bias: expected None without use_gate_in_kernel, got a tensor",
    ),
    case(give(A_log=1.0, **GATE), TypeError, "A_log: expected a torch.Tensor or None, got float"),
    case(
        give(A_log=float32(H), dt_bias=0, **GATE),
        TypeError,
        "dt_bias: expected a torch.Tensor or None, got int",
    ),
    case(give(A_log=float32(H).to("meta"), **GATE), ValueError, "A_log: expected device cpu as q, got meta"),
    case(
        give(A_log=float32(H).half(), **GATE),
        TypeError,
        "A_log: expected dtype torch.float32, got torch.float16",
    ),
    case(
        give(A_log=float32(H).double(), **GATE),
        TypeError,
        "A_log: expected dtype torch.float32, got torch.float64",
    ),
    case(give(A_log=float32(HV), **GATE), ValueError, "A_log: expected shape (2,) [H], got (4,)"),
    case(give(A_log=float32(1, H), **GATE), ValueError, "A_log: expected 1 dimensions [H], got shape (1, 2)"),
    case(
        give(A_log=float32(H), dt_bias=float32(H, K), **GATE),
        ValueError,
        "dt_bias: expected 1 dimensions [H*K], got shape (2, 8)",
    ),
    case(
        give(A_log=float32(H), dt_bias=float32(H), **GATE),
        ValueError,
        "dt_bias: expected shape (16,) [H*K], got (2,)",
    ),
    *(
        case(
            give(lower_bound=bound, A_log=float32(H), **GATE),
            ValueError,
            f"lower_bound: expected a number below 0, got {bound}",
        )
        for bound in (0, 5.0, float("nan"))
    ),
    case(
        give(lower_bound="-5", A_log=float32(H), **GATE),
        TypeError,
        "lower_bound: expected a number below 0 or None, got str",
    ),
    case(give(erase_scale=3), ValueError, "erase_scale: expected 1 or 2, got 3"),
    case(
        give(erase_scale=0.5, use_gate_sigmoid_in_kernel=True),
        ValueError,
        "erase_scale: expected 1 or 2, got 0.5",
    ),
    case(
        give(erase_scale=2),
        ValueError,
        "erase_scale: expected 1 without use_gate_sigmoid_in_kernel, got 2",
    ),
    case(give(scale="large"), TypeError, "scale: expected a number or None, got str"),
    *(
        case(give(**{flag: "no"}), TypeError, f"{flag}: expected True or False, got 'no'")
        for flag in ("output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "state_v_first")
    ),
    case(give(backend="triton"), ValueError, "backend: expected one of auto, cuda, torch, got 'triton'"),
    case(give(backend=None), ValueError, "backend: expected one of auto, cuda, torch, got None"),
    case(give(initial_state=0.0), TypeError, "initial_state: expected a torch.Tensor or None, got float"),
    case(
        give(initial_state=float32(B, HV, K, V).to("meta")),
        ValueError,
        "initial_state: expected device cpu as q, got meta",
    ),
    *(
        case(
            give(initial_state=float32(B, HV, K, V).to(dtype)),
            TypeError,
            f"initial_state: expected dtype torch.float32, got {dtype}",
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
    ),
    *(
        case(
            give(initial_state=float32(*shape)),
            ValueError,
            f"initial_state: expected shape (2, 4, 8, 16) [N, HV, K, V], got {shape}",
        )
        for shape in ((B + 1, HV, K, V), (B, H, K, V), (B, HV, V, K))
    ),
    case(
        give(initial_state=float32(HV, K, V)),
        ValueError,
        "initial_state: expected 4 dimensions [N, HV, K, V], got shape (4, 8, 16)",
    ),
    case(
        give(initial_state=float32(B, HV, K, V), state_v_first=True),
        ValueError,
        "initial_state: expected shape (2, 4, 16, 8) [N, HV, V, K], got (2, 4, 8, 16)",
    ),
    case(
        give(initial_state=float32(1, HV, K, V)),
        ValueError,
        "initial_state: expected shape (2, 4, 8, 16) [N, HV, K, V], got (1, 4, 8, 16)",
        call=packed_call,
    ),
    case(
        give(cu_seqlens=torch.tensor([0, T])),
        ValueError,
        "q: expected B = 1 with cu_seqlens (sequences are packed along T), got B = 2",
    ),
    case(
        give(cu_seqlens=[0, T]),
        TypeError,
        "cu_seqlens: expected a torch.Tensor or None, got list",
        call=packed_call,
    ),
    case(
        give(cu_seqlens=torch.tensor([0.0, T])),
        TypeError,
        "cu_seqlens: expected dtype torch.int32 or torch.int64, got torch.float32",
        call=packed_call,
    ),
    case(
        give(cu_seqlens=torch.tensor([0, T], dtype=torch.int16)),
        TypeError,
        "cu_seqlens: expected dtype torch.int32 or torch.int64, got torch.int16",
        call=packed_call,
    ),
    *(
        case(
            give(cu_seqlens=torch.zeros(shape, dtype=torch.int64)),
            ValueError,
            f"cu_seqlens: expected shape [N+1] with N >= 1, got {shape}",
            call=packed_call,
        )
        for shape in ((), (0,), (1,), (1, 3))
    ),
    case(
        give(cu_seqlens=torch.tensor([0, T]).to("meta")),
        ValueError,
        "cu_seqlens: expected device cpu as q or cpu, got meta",
        call=packed_call,
    ),
    case(
        give(cu_seqlens=torch.tensor([1, 2, T])),
        ValueError,
        "cu_seqlens: expected to start at 0, got 1",
        call=packed_call,
    ),
    case(
        give(cu_seqlens=torch.tensor([0, 2, 1, T])),
        ValueError,
        "cu_seqlens: expected ascending offsets, got 2 then 1 at index 2",
        call=packed_call,
    ),
    case(
        give(cu_seqlens=torch.tensor([0, 2, T + 4])),
        ValueError,
        "cu_seqlens: expected to end at T = 3, got 7",
        call=packed_call,
    ),
]
BAD_CHUNK_OPTIONS = [
    case(give(chunk_size=32), ValueError, "chunk_size: expected 64, got 32"),
    case(give(chunk_size=128), ValueError, "chunk_size: expected 64, got 128"),
    *(
        case(
            give(sequence_split=split),
            ValueError,
            f"sequence_split: expected None or a whole number from 1 to 64, got {split}",
        )
        for split in (0, -1, 1.5, "2")
    ),
    case(
        give(cu_seqlens_cpu=torch.tensor([0, T])),
        ValueError,
        "cu_seqlens_cpu: expected None without cu_seqlens, got a tensor",
    ),
    case(
        give(cu_seqlens_cpu=[0, 2, T]),
        TypeError,
        "cu_seqlens_cpu: expected a torch.Tensor or None, got list",
        call=packed_call,
    ),
    case(
        give(cu_seqlens_cpu=torch.tensor([0.0, 2.0, T])),
        TypeError,
        "cu_seqlens_cpu: expected dtype torch.int32 or torch.int64, got torch.float32",
        call=packed_call,
    ),
    case(
        give(cu_seqlens_cpu=torch.tensor([0, T])),
        ValueError,
        "cu_seqlens_cpu: expected shape (3,) as cu_seqlens, got (2,)",
        call=packed_call,
    ),
    case(
        give(cu_seqlens_cpu=torch.tensor([0, 2, T]).to("meta")),
        ValueError,
        "cu_seqlens_cpu: expected device cpu, got meta",
        call=packed_call,
    ),
    case(
        give(cu_seqlens_cpu=torch.tensor([0, 3, 2])),
        ValueError,
        "cu_seqlens_cpu: expected ascending offsets, got 3 then 2 at index 2",
        call=packed_call,
    ),
    case(
        give(cu_seqlens_cpu=torch.tensor([0, 1, T])),
        ValueError,
        "cu_seqlens_cpu: expected the values of cu_seqlens, got others",
        call=packed_call,
    ),
    case(give(disable_recompute=1), TypeError, "disable_recompute: expected True or False, got 1"),
]

BAD_POOL_OPTIONS = [
    case(
        give(
            state_indices=torch.tensor([[1, 2, 3], [4, 5, 6]]),
            num_accepted_tokens=torch.tensor([3, 0]),
            check_indices=True,
        ),
        ValueError,
        "num_accepted_tokens: expected numbers from 1 to 3, got 0 at index 1",
        call=pool_call,
    ),
    case(
        give(inplace_final_state=True),
        ValueError,
        "inplace_final_state: expected state_indices with it, got None",
    ),
    case(
        give(num_accepted_tokens=torch.tensor([1, 1])),
        ValueError,
        "num_accepted_tokens: expected state_indices [N, T] with it, got None",
    ),
    case(
        give(state_indices=torch.tensor([0, 1])),
        ValueError,
        "initial_state: expected a pool with state_indices, got None",
    ),
    case(
        give(state_indices=[0, 1]),
        TypeError,
        "state_indices: expected a torch.Tensor or None, got list",
        call=pool_call,
    ),
    case(
        give(num_accepted_tokens=2),
        TypeError,
        "num_accepted_tokens: expected a torch.Tensor or None, got int",
        call=pool_call,
    ),
    case(
        give(state_indices=torch.tensor([0, 1]).to("meta")),
        ValueError,
        "state_indices: expected device cpu as q, got meta",
        call=pool_call,
    ),
    case(
        give(state_indices=torch.tensor([0.0, 1.0])),
        TypeError,
        "state_indices: expected dtype torch.int32 or torch.int64, got torch.float32",
        call=pool_call,
    ),
    case(
        give(state_indices=torch.tensor([0, 1, 2])),
        ValueError,
        "state_indices: expected shape (2,) [N] or [N, T], got (3,)",
        call=pool_call,
    ),
    case(
        give(state_indices=torch.tensor(0)),
        ValueError,
        "state_indices: expected 1 dimensions [N] or [N, T], got shape ()",
        call=pool_call,
    ),
    *(
        case(
            give(state_indices=torch.zeros(shape, dtype=torch.int64)),
            ValueError,
            f"state_indices: expected [N, T] with N = 2, got shape {shape}",
            call=pool_call,
        )
        for shape in ((3, T), (2, 0))
    ),
    case(
        give(state_indices=torch.zeros(B, T - 1, dtype=torch.int64)),
        ValueError,
        "state_indices: expected a column for each of the 3 positions, got 2",
        call=pool_call,
    ),
    case(
        give(num_accepted_tokens=torch.tensor([1, 1])),
        ValueError,
        "num_accepted_tokens: expected state_indices [N, T] with it, got [N]",
        call=pool_call,
    ),
    case(
        give(state_indices=torch.zeros(B, T, dtype=torch.int64), num_accepted_tokens=torch.tensor([1, 1, 1])),
        ValueError,
        "num_accepted_tokens: expected shape (2,) [N], got (3,)",
        call=pool_call,
    ),
    case(
        give(
            state_indices=torch.zeros(B, T, dtype=torch.int64), num_accepted_tokens=torch.tensor([1.0, 1.0])
        ),
        TypeError,
        "num_accepted_tokens: expected dtype torch.int32 or torch.int64, got torch.float32",
        call=pool_call,
    ),
    case(
        give(initial_state=float32(9, HV, K, V).half()),
        TypeError,
        "initial_state: expected dtype torch.float32 or torch.bfloat16, got torch.float16",
        call=pool_call,
    ),
    case(
        give(initial_state=float32(9, HV, V, K)),
        ValueError,
        "initial_state: expected shape (9, 4, 8, 16) [num_slots, HV, K, V], got (9, 4, 16, 8)",
        call=pool_call,
    ),
    case(
        give(initial_state=float32(0, HV, K, V)),
        ValueError,
        "initial_state: expected a pool [num_slots, HV, K, V], got shape (0, 4, 8, 16)",
        call=pool_call,
    ),
    case(
        give(initial_state=torch.tensor(0.0)),
        ValueError,
        "initial_state: expected a pool [num_slots, HV, K, V], got shape ()",
        call=pool_call,
    ),
    case(give(out=0.0), TypeError, "out: expected a torch.Tensor or None, got float"),
    case(give(out=float32(B, T, HV, V).to("meta")), ValueError, "out: expected device cpu as q, got meta"),
    case(
        give(out=float32(B, T, HV, V).half()),
        TypeError,
        "out: expected dtype torch.float32, got torch.float16",
    ),
    case(
        give(out=float32(B, T, H, V)),
        ValueError,
        "out: expected shape (2, 3, 4, 16) [B, T, HV, V], got (2, 3, 2, 16)",
    ),
]

table = "call, change, error, message"


@pytest.mark.parametrize(table, BAD_TOKENS)
@pytest.mark.parametrize("function", [chunk_gdn2, fused_recurrent_gdn2, supports])
def test_a_bad_token_tensor_raises(function, call, change, error, message):
    arguments = call()
    change(arguments)
    assert_raises(function, arguments, error, message)


@pytest.mark.parametrize(table, BAD_OPTIONS)
@pytest.mark.parametrize("function", [chunk_gdn2, fused_recurrent_gdn2])
def test_a_bad_option_raises(function, call, change, error, message):
    arguments = call()
    change(arguments)
    assert_raises(function, arguments, error, message)


@pytest.mark.parametrize(table, BAD_CHUNK_OPTIONS)
def test_a_bad_option_of_chunk_gdn2_raises(call, change, error, message):
    arguments = call()
    change(arguments)
    assert_raises(chunk_gdn2, arguments, error, message)


@pytest.mark.parametrize(table, BAD_POOL_OPTIONS)
def test_a_bad_option_of_fused_recurrent_gdn2_raises(call, change, error, message):
    arguments = call()
    change(arguments)
    assert_raises(fused_recurrent_gdn2, arguments, error, message)


@pytest.mark.parametrize("function", [chunk_gdn2, fused_recurrent_gdn2])
@pytest.mark.parametrize("name", ["q", "g", "w"])
def test_forward_mode_derivatives_raise(function, name):
    arguments = good_call()
    x = arguments.pop(name)
    message = f"{function.__name__} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: function(**arguments, **{name: x})[0], (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(**arguments, **{name: forward_ad.make_dual(x, torch.ones_like(x))})


@pytest.mark.parametrize("call", [good_call, packed_call])
@pytest.mark.parametrize("function", [chunk_gdn2, fused_recurrent_gdn2])
def test_the_calls_that_these_tests_spoil_are_good_ones(function, call):
    o, _ = function(**call())
    assert o.shape == call()["v"].shape


def test_the_pool_call_that_these_tests_spoil_is_a_good_one():
    o, _ = fused_recurrent_gdn2(**pool_call())
    assert o.shape == (B, T, HV, V)


@pytest.mark.parametrize("name", ["scale", "initial_state", "cu_seqlens", "chunk_size", "no_such_option"])
def test_supports_takes_the_options_of_chunk_gdn2(name):
    """What chunk_gdn2 would not know, supports does not know either."""
    value = {"scale": 1.0, "chunk_size": 64}.get(name)
    if name == "no_such_option":
        with pytest.raises(TypeError, match="no_such_option"):
            supports(**good_call(), no_such_option=1)
    else:
        assert supports(**good_call(), **{name: value})[0] in (True, False)
