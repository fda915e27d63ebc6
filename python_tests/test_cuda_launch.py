"""The host's side of the recurrent kernel, with a stand-in for the extension: no GPU and no build needed."""

import contextlib
import ctypes

import disguise
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2_ext import chunk_gdn2, cuda_backend, cuda_launch, cuda_recurrent
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


# -- the chunk form at once ----------------------------------------------------------------------------------


class ChunkStandIn:
    """Takes every call, or none; its results are ones."""

    def __init__(self, takes: bool):
        self.takes, self.forwards, self.backwards = takes, [], []

    def chunk_forward_at_once(self, read, make, *arguments):
        assert (read, make) == (cuda_launch.READ_TENSORS, cuda_launch.MAKE_TENSORS)
        self.forwards.append(arguments)
        *_, output_final_state, keep, keep_tiles = arguments
        if not self.takes:
            return None
        final_state = torch.ones(B, HV, K, V) if output_final_state else None
        self.kept = torch.ones(5 if keep_tiles else 3)
        return (torch.ones_like(arguments[2]), final_state, *([self.kept] if keep else []))

    def chunk_backward_at_once(self, read, make, *arguments):
        assert (read, make) == (cuda_launch.READ_TENSORS, cuda_launch.MAKE_TENSORS)
        self.backwards.append(arguments)
        inputs, needed = arguments[2:11], arguments[-9:]
        return tuple(torch.ones_like(x) if asked else None for x, asked in zip(inputs, needed, strict=True))


@pytest.fixture
def stand_in(monkeypatch, request) -> ChunkStandIn:
    if cuda_launch.READ_TENSORS is None:
        pytest.skip("needs PyTorch 2.10")
    stand_in = ChunkStandIn(getattr(request, "param", True))
    monkeypatch.setattr(cuda_launch, "_C", stand_in)
    return stand_in


def chunk_inputs(**changes) -> dict:
    bf16 = torch.bfloat16
    tokens = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (H, K), "b": (H, K), "w": (HV, V)}
    return {name: torch.zeros(B, T, *sizes, dtype=bf16) for name, sizes in tokens.items()} | changes


def chunk_at_once(inputs: dict):
    options = (None, False, False, None, False, 1.0, False, 0, False, False)
    return cuda_backend.chunk_at_once(*inputs.values(), None, None, None, None, *options)


def test_a_call_without_gradients_is_one_call_of_the_extension(stand_in):
    inputs, state = chunk_inputs(), torch.zeros(B, HV, K, V)
    o, final_state = chunk_gdn2(
        **inputs, initial_state=state, output_final_state=True, scale=0.5, use_qk_l2norm_in_kernel=True
    )
    assert o.shape == inputs["v"].shape and final_state.shape == state.shape
    (arguments,) = stand_in.forwards
    assert all(x is y for x, y in zip(arguments, (*inputs.values(), None, None, state, None)))
    assert arguments[10:] == (0.5, True, False, None, False, 1.0, False, 0, True, False, False)


@pytest.mark.parametrize("number", [1, 3])
def test_a_number_of_segments_is_handed_over(stand_in, number):
    chunk_gdn2(**chunk_inputs(), sequence_split=number)
    assert stand_in.forwards[0][17] == number


def test_leaves_that_nobody_differentiates_keep_nothing(stand_in):
    inputs = chunk_inputs()
    inputs["k"].requires_grad_()
    with torch.no_grad():
        o, _ = chunk_gdn2(**inputs)
    assert not o.requires_grad and stand_in.forwards[0][-2:] == (False, False)


@pytest.mark.parametrize("disable_recompute", [False, True])
def test_gradients_are_asked_for_and_handed_on(stand_in, disable_recompute):
    inputs = chunk_inputs()
    for name in ("q", "w"):
        inputs[name].requires_grad_()
    o, _ = chunk_gdn2(**inputs, disable_recompute=disable_recompute)
    assert stand_in.forwards[0][-2:] == (True, disable_recompute)
    o.backward(torch.zeros_like(o))
    (arguments,) = stand_in.backwards
    assert arguments[12].data_ptr() == stand_in.kept.data_ptr()
    assert arguments[13:21] == (None, False, False, None, False, 1.0, False, 0)
    assert arguments[21:] == (True, False, False, False, False, True, False, False, False)
    assert all((x.grad is not None) == (name in ("q", "w")) for name, x in inputs.items())


@pytest.mark.parametrize("stand_in", [False], indirect=True)
@pytest.mark.parametrize("differentiated", [False, True])
def test_calls_that_the_extension_does_not_take_go_on(stand_in, differentiated):
    inputs = chunk_inputs()
    inputs["q"].requires_grad_(differentiated)
    o, _ = chunk_gdn2(**inputs)
    assert len(stand_in.forwards) == 1 and o.requires_grad == differentiated
    assert not o.any(), "what the torch backend computes"


@pytest.mark.parametrize(
    "changes", [{"chunk_size": 64, "backend": "torch"}, {"return_intermediate_states": True}]
)
def test_other_calls_are_not_tried(stand_in, changes):
    chunk_gdn2(**chunk_inputs(), **changes)
    assert not stand_in.forwards


def test_subclasses_are_not_differentiated_at_once(stand_in):
    class Subclass(torch.Tensor):
        pass

    inputs = chunk_inputs()
    inputs["q"].requires_grad_()
    inputs["v"] = inputs["v"].as_subclass(Subclass)
    assert chunk_at_once(inputs) is None
    assert not stand_in.forwards


@pytest.mark.parametrize("watched", [TorchFunctionMode, TorchDispatchMode])
def test_nothing_goes_around_somebody_who_watches(stand_in, watched):
    inputs = chunk_inputs()
    with watched():
        assert chunk_at_once(inputs) is None
    assert not stand_in.forwards


def test_tensors_are_made_by_pytorch():
    like, empty, empty_float32 = cuda_launch.MAKE_TENSORS
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        made = like(x), empty(x, (4, 5)), empty_float32(x, (6,))
    assert [tuple(y.shape) for y in made] == [(2, 3), (4, 5), (6,)]
    assert [y.dtype for y in made] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert not any(y.requires_grad for y in made)


@pytest.mark.skipif(cuda_launch.READ_TENSORS is None, reason="needs PyTorch 2.10")
def test_memory_comes_from_pytorch_and_goes_back():
    """csrc/api/dlpack.h against the PyTorch that is here."""
    api, size = disguise.exchange_api(), ctypes.c_int64(100_001)
    cpu, uint8 = 1, 1
    prototype = disguise.DLTensor(
        device_type=cpu, ndim=1, code=uint8, bits=8, lanes=1, shape=ctypes.pointer(size)
    )
    memory = ctypes.POINTER(disguise.ManagedTensor)()
    no_error = disguise.SetError(lambda *_: pytest.fail("an error"))
    assert api.major_version == 1
    assert api.allocate(ctypes.byref(prototype), ctypes.byref(memory), None, no_error) == 0
    tensor = memory.contents.tensor
    assert (tensor.device_type, tensor.ndim, tensor.shape[0], tensor.strides[0]) == (cpu, 1, size.value, 1)
    assert (tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset) == (uint8, 8, 1, 0)
    assert tensor.data % 16 == 0
    ctypes.memset(tensor.data, 1, size.value)
    memory.contents.give_back(memory)


@pytest.mark.skipif(cuda_launch.READ_TENSORS is None, reason="needs PyTorch 2.10")
def test_memory_that_there_is_not_is_an_error():
    api, size = disguise.exchange_api(), ctypes.c_int64(1 << 60)
    prototype = disguise.DLTensor(device_type=1, ndim=1, code=1, bits=8, lanes=1, shape=ctypes.pointer(size))
    memory, said = ctypes.POINTER(disguise.ManagedTensor)(), []
    set_error = disguise.SetError(lambda _, kind, message: said.append(message))
    assert api.allocate(ctypes.byref(prototype), ctypes.byref(memory), None, set_error) != 0
    assert said
