"""The host's side of the recurrent kernel, with a stand-in for the extension: no GPU and no build needed."""

import contextlib
import ctypes

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2_ext import cuda_launch, cuda_recurrent
from gdn2_ext.torch_backend import GateOptions

B, T, H, HV, K, V = 2, 3, 2, 4, 8, 16
PLAIN = GateOptions(False, False, None, False, 1.0)


class StandIn:
    """Answers as told; zeroes the output and the states where it says that it has launched."""

    def __init__(self, *answers: bool):
        self.answers, self.calls = list(answers), []

    def recurrent_forward(self, how, *arguments) -> bool:
        assert how is None and len(arguments) == 23
        self.calls.append(arguments)
        answer = self.answers.pop(0)
        if answer:
            for tensor in (arguments[6], arguments[9]):  # o, states
                if tensor is not None:
                    self.zero(*tensor[:3])
        return answer

    @staticmethod
    def zero(address: int, shape: tuple, strides: tuple) -> None:
        contiguous = torch.empty(shape, device="meta").stride()
        assert strides == contiguous, "what a stand-in can write to"
        itemsize = 2 if shape == (B, T, HV, V) else 4
        ctypes.memset(address, 0, itemsize * torch.Size(shape).numel())


@pytest.fixture
def launch(monkeypatch):
    """cuda_recurrent.recurrent_forward on tensors of the CPU, with a stand-in that answers like this."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": 5}))

    def call(*answers: bool, tensors: dict | None = None, options: GateOptions = PLAIN, **arguments):
        bf16 = torch.bfloat16
        shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "g": (B, T, H, K)}
        shapes |= {"b": (B, T, H, K), "w": (B, T, HV, V)}
        tokens = {name: torch.ones(shape, dtype=bf16) for name, shape in shapes.items()} | (tensors or {})
        names = ("A_log", "dt_bias", "initial_state", "cu_seqlens", "state_indices", "num_accepted_tokens")
        others = [arguments.pop(name, None) for name in names]
        flags = {"state_v_first": False, "inplace_final_state": False, "output_final_state": False}
        stand_in = StandIn(*answers)
        monkeypatch.setattr(cuda_launch, "_C", stand_in)
        results = cuda_recurrent.recurrent_forward(
            *tokens.values(), *others, 0.5, options, **flags | arguments
        )
        return *results, stand_in.calls

    return call


def test_one_launch_with_everything_as_it_is(launch):
    out = torch.ones(B, T, HV, V, dtype=torch.bfloat16)
    pool, slots = torch.ones(9, HV, K, V), torch.tensor([3, 4])
    o, final_state, calls = launch(
        True, out=out, initial_state=pool, state_indices=slots, inplace_final_state=True
    )
    assert o is out and final_state is None
    assert not out.any() and not pool.any()
    (arguments,) = calls
    assert arguments[6] == (out.data_ptr(), (B, T, HV, V), out.stride(), 0, -1)
    assert arguments[9] == (pool.data_ptr(), (9, HV, K, V), pool.stride(), 2, -1)
    assert arguments[12] == (slots.data_ptr(), (2,), (1,), 4, -1)
    assert arguments[14:] == (0.5, False, False, None, False, 1.0, False, True, 5)
    assert out._version == 1 and pool._version == 1


@pytest.mark.parametrize("v_first", [False, True])
def test_a_final_state_is_made_when_it_is_asked_for(launch, v_first):
    _, final_state, calls = launch(True, output_final_state=True, state_v_first=v_first)
    assert final_state.shape == ((B, HV, V, K) if v_first else (B, HV, K, V))
    assert final_state.dtype == torch.float32
    assert calls[0][10][0] == final_state.data_ptr()
    assert calls[0][9] is None


def test_what_the_kernel_does_not_read_is_copied_and_copied_back(launch):
    out = torch.ones(B, T, HV, 2 * V, dtype=torch.bfloat16)[..., ::2]
    pool = torch.ones(9, HV, K, 2 * V)[..., ::2]
    A_log = torch.zeros(2 * H)[::2]
    gated = GateOptions(True, True, -5.0, True, 2.0)
    o, _, calls = launch(
        False, True, out=out, initial_state=pool, state_indices=torch.tensor([3, 4]), A_log=A_log,
        inplace_final_state=True, options=gated,
    )  # fmt: skip
    assert o is out and not out.any() and not pool.any()
    asked, copied = calls
    assert asked[6][0] == out.data_ptr() and asked[9][0] == pool.data_ptr()
    assert copied[6][0] != out.data_ptr() and copied[9][0] != pool.data_ptr()
    assert copied[7][2] == (1,), "parameters are handed over without gaps"
    assert copied[14:20] == (0.5, True, True, -5.0, True, 2.0)


def test_what_no_copy_makes_readable_is_an_error(launch):
    with pytest.raises(RuntimeError, match="takes no tensors as large as these"):
        launch(False, False)


# -- when to go around the dispatcher ------------------------------------------------------------------------


def test_nobody_watches():
    assert cuda_launch.nobody_watches()


@pytest.mark.parametrize(
    "watched", [TorchFunctionMode, TorchDispatchMode, lambda: torch.autocast("cuda", torch.bfloat16)]
)
def test_somebody_does(watched):
    if watched not in (TorchFunctionMode, TorchDispatchMode) and not torch.cuda.is_available():
        pytest.skip("no GPU: autocast stays off without one")
    with watched():
        assert not cuda_launch.nobody_watches()


def test_a_transform_watches():
    seen = []
    torch.vmap(lambda x: seen.append(cuda_launch.nobody_watches()) or x)(torch.zeros(2))
    assert seen == [False]


def test_tensors_that_need_no_operator():
    class Subclass(torch.Tensor):
        pass

    plain, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert cuda_launch.are_plain((plain, None, torch.nn.Parameter(plain, requires_grad=False)))
    assert not cuda_launch.are_plain((plain, leaf))
    assert not cuda_launch.are_plain((plain, torch.nn.Parameter(plain)))
    assert not cuda_launch.are_plain((plain, plain.as_subclass(Subclass)))
    with torch.no_grad():
        assert cuda_launch.are_plain((plain, leaf))


def test_tensors_of_the_cpu_do_not_go_to_the_kernel_at_once(monkeypatch):
    monkeypatch.setattr(cuda_launch, "_C", StandIn())
    tokens = [torch.zeros(B, T, H, K, dtype=torch.bfloat16)] * 6
    rest = (
        None,
        None,
        None,
        None,
        False,
        False,
        False,
        None,
        False,
        None,
        None,
        None,
        False,
        False,
        1.0,
        None,
    )
    assert cuda_recurrent.recurrent_at_once(*tokens, *rest) is None
