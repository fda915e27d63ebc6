"""What the extension's recurrent_forward lets through to the GPU, tried without one."""

import importlib

import disguise
import pytest
import torch

from gdn2_ext import cuda_launch

B, T, H, HV, K, V, SLOTS = 3, 2, 2, 4, 16, 32, 9

pytestmark = disguise.MARKS
read_tensors = disguise.read_tensors

# The arguments of the extension's function, in its order.
TENSORS = (
    *("q", "k", "v", "g", "b", "w", "out", "A_log", "dt_bias", "initial_state", "final_state", "cu_seqlens"),
    *("state_indices", "num_accepted_tokens"),
)
OPTIONS = {
    "scale": None,
    "use_qk_l2norm": False,
    "use_gate": False,
    "lower_bound": None,
    "use_gate_sigmoid": False,
    "erase_scale": 1.0,
    "state_v_first": False,
    "inplace": False,
    "stream": 0,
}


def plain_call() -> dict:
    bf16 = torch.bfloat16
    return {
        **{name: torch.zeros(B, T, H, K, dtype=bf16) for name in ("q", "k", "b")},
        **{name: torch.zeros(B, T, HV, V, dtype=bf16) for name in ("v", "w", "out")},
        "g": torch.zeros(B, T, H, K),
        "initial_state": torch.zeros(B, HV, K, V),
        "final_state": torch.zeros(B, HV, K, V),
    }


def pool_call() -> dict:
    pool = {"initial_state": torch.zeros(SLOTS, HV, K, V), "state_indices": torch.tensor([4, -1, 0])}
    return plain_call() | pool | {"final_state": None, "inplace": True}


def speculative_call() -> dict:
    indices = torch.zeros(B, T + 1, dtype=torch.int32)
    return pool_call() | {"state_indices": indices, "num_accepted_tokens": torch.ones(B, dtype=torch.int64)}


def packed_call() -> dict:
    call = {
        name: x.reshape(1, B * T, *x.shape[2:]) if name in TENSORS[:7] else x
        for name, x in plain_call().items()
    }
    return call | {"cu_seqlens": torch.tensor([0, 1, 3, 6])}


def gated_call() -> dict:
    gates = {"A_log": torch.zeros(H), "dt_bias": torch.zeros(H * K), "use_gate": True}
    return plain_call() | gates | {"use_gate_sigmoid": True, "erase_scale": 2, "use_qk_l2norm": True}


def lets_through(read_tensors, call: dict) -> bool:
    call = dict.fromkeys(TENSORS) | OPTIONS | call
    assert list(call) == [*TENSORS, *OPTIONS], "an argument that there is not"
    return disguise.gets_to_the_gpu("recurrent_forward", read_tensors, *call.values())


CALLS = [plain_call, pool_call, speculative_call, packed_call, gated_call]


def halves(x: torch.Tensor) -> torch.Tensor:
    """Every other element of twice as many."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("call", CALLS)
def test_calls_as_the_kernel_needs_them_get_to_the_gpu(read_tensors, call):
    assert lets_through(read_tensors, call())


@pytest.mark.parametrize("call", CALLS)
def test_tensors_of_the_cpu_do_not(call):
    assert not lets_through(cuda_launch.READ_TENSORS, call())


GOOD_CHANGES = {
    "float16": {name: (lambda x: x.half()) for name in ("q", "k", "v", "b", "w", "out")},
    "g in 16 bits": {"g": lambda x: x.bfloat16()},
    "gates of value heads": {name: (lambda x: x.repeat(1, 1, 2, 1)) for name in ("g", "b")},
    "strided tokens": dict.fromkeys(("q", "k", "v", "g", "b", "w", "out"), halves),
    "transposed tokens": {
        name: (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)) for name in ("q", "v", "out")
    },
    "no state": {"initial_state": lambda x: None},
    "no result": {"final_state": lambda x: None},
    "no result, transposed": {
        "initial_state": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "final_state": lambda x: None,
    },
    "rows with gaps": {"initial_state": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :V]},
    "scale": {"scale": lambda x: 1},
    "norms": {"use_qk_l2norm": lambda x: True},
    "sigmoids": {"use_gate_sigmoid": lambda x: True, "erase_scale": lambda x: 2},
    "bounded decay": {"use_gate": lambda x: True, "lower_bound": lambda x: -5},
    "a parameter": {"initial_state": lambda x: torch.nn.Parameter(x)},
}


@pytest.mark.parametrize("changes", GOOD_CHANGES.values(), ids=GOOD_CHANGES)
def test_so_do_their_variants(read_tensors, changes):
    call = plain_call()
    call |= {name: change(call.get(name)) for name, change in changes.items()}
    assert lets_through(read_tensors, call)


class Subclass(torch.Tensor):
    pass


WRONG_CHANGES = [
    *((plain_call, name, lambda x: x[:2]) for name in TENSORS[:7]),
    *((plain_call, name, lambda x: x[0]) for name in TENSORS[:7]),
    *((plain_call, name, lambda x: x.float().double()) for name in TENSORS[:7]),
    *((plain_call, name, lambda x: x.to("meta")) for name in TENSORS[:7]),
    *((plain_call, name, lambda x: x.as_subclass(Subclass)) for name in TENSORS[:7]),
    *((plain_call, name, lambda x: [0.0]) for name in TENSORS[:7]),
    *((plain_call, name, lambda x: None) for name in TENSORS[:7]),
    *((plain_call, name, lambda x: x.half()) for name in TENSORS[:7]),
    (plain_call, "k", lambda x: x[..., :8]),
    (plain_call, "v", lambda x: x[:, :, :3]),
    (plain_call, "g", lambda x: x.repeat(1, 1, 3, 1)),
    (plain_call, "b", lambda x: x.repeat(1, 1, 2, 1)),
    (plain_call, "initial_state", lambda x: x[:2]),
    (plain_call, "initial_state", lambda x: x[:, :2]),
    (plain_call, "initial_state", lambda x: x.transpose(2, 3)),
    (plain_call, "initial_state", lambda x: x.bfloat16()),
    (plain_call, "initial_state", halves),
    (plain_call, "final_state", lambda x: x[:2]),
    (plain_call, "final_state", lambda x: x.bfloat16()),
    (plain_call, "state_v_first", lambda x: True),
    (plain_call, "inplace", lambda x: True),
    (plain_call, "A_log", lambda x: torch.zeros(H)),
    (plain_call, "dt_bias", lambda x: torch.zeros(H * K)),
    (plain_call, "num_accepted_tokens", lambda x: torch.ones(B, dtype=torch.int64)),
    (plain_call, "use_gate", lambda x: True),
    (plain_call, "erase_scale", lambda x: 2),
    (plain_call, "erase_scale", lambda x: "2"),
    (plain_call, "scale", lambda x: "large"),
    (plain_call, "lower_bound", lambda x: -5.0),
    (plain_call, "cu_seqlens", lambda x: torch.tensor([0, 1, 1, 2])),
    (packed_call, "cu_seqlens", lambda x: x.float()),
    (packed_call, "cu_seqlens", lambda x: x[:1]),
    (packed_call, "cu_seqlens", lambda x: x[None]),
    (packed_call, "cu_seqlens", lambda x: x[:3]),
    (gated_call, "A_log", lambda x: None),
    (gated_call, "A_log", lambda x: x.half()),
    (gated_call, "A_log", lambda x: x.repeat(2)),
    (gated_call, "A_log", halves),
    (gated_call, "dt_bias", lambda x: x[:H]),
    (gated_call, "dt_bias", lambda x: x.view(H, K)),
    (gated_call, "lower_bound", lambda x: 0.0),
    (gated_call, "lower_bound", lambda x: float("nan")),
    (gated_call, "erase_scale", lambda x: 3),
    (pool_call, "initial_state", lambda x: None),
    (pool_call, "initial_state", lambda x: x[:0]),
    (pool_call, "initial_state", lambda x: x.half()),
    (pool_call, "state_indices", lambda x: x[:2]),
    (pool_call, "state_indices", lambda x: x.float()),
    (pool_call, "state_indices", lambda x: x[0]),
    (pool_call, "state_indices", lambda x: None),
    (pool_call, "state_indices", lambda x: x.to("meta")),
    (pool_call, "final_state", lambda x: torch.zeros(B, HV, K, V)),
    (pool_call, "num_accepted_tokens", lambda x: torch.ones(B, dtype=torch.int64)),
    (speculative_call, "state_indices", lambda x: x[:, :1]),
    (speculative_call, "state_indices", lambda x: x[:, :0]),
    (speculative_call, "num_accepted_tokens", lambda x: x[:2]),
    (speculative_call, "num_accepted_tokens", lambda x: x.float()),
]


@pytest.mark.parametrize("call, name, change", WRONG_CHANGES)
def test_nothing_else_does(read_tensors, call, name, change):
    arguments = call()
    before = arguments.get(name, OPTIONS.get(name))
    arguments[name] = change(before)
    assert not lets_through(read_tensors, arguments)


@pytest.mark.parametrize("number", [0, 1, 23, 25])
def test_another_number_of_arguments_is_an_error(number):
    extension = importlib.import_module("gdn2_ext._C")
    with pytest.raises(TypeError, match=f"expected 24 arguments, got {number}"):
        extension.recurrent_forward(*[None] * number)
