"""What the extension's functions of the chunk form let through to the GPU, tried without one.

chunk_forward and chunk_backward, whose caller makes all tensors; chunk_forward_at_once and
chunk_backward_at_once, which make them.
"""

import disguise
import pytest
import torch

from gdn2_ext import cuda_backend, cuda_launch

B, T, H, HV, K, V = 2, 100, 2, 4, 32, 64
SLOTS = B * 2

pytestmark = disguise.MARKS
read_tensors = disguise.read_tensors

INPUTS = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state", "cu_seqlens")
FORWARD = (*INPUTS, "o", "final_state", "chunk_states", "A_minus_I", "P", "kept", "workspace")
GRADIENTS = ("dq", "dk", "dv", "dg", "db", "dw", "dA_log", "d_dt_bias", "d_initial_state")
BACKWARD = ("do", "d_final_state", *INPUTS, "A_minus_I", "P", "kept", "workspace", *GRADIENTS)
OPTIONS = {
    "scale": None, "use_qk_l2norm": False, "use_gate": False, "lower_bound": None, "use_gate_sigmoid": False,
    "erase_scale": 1.0, "state_v_first": False, "num_segments": 1, "stream": 0,
}  # fmt: skip


def inputs(gate_heads: int = H, **changes) -> dict:
    bf16 = torch.bfloat16
    call = {
        **{name: torch.zeros(B, T, H, K, dtype=bf16) for name in ("q", "k")},
        **{name: torch.zeros(B, T, HV, V, dtype=bf16) for name in ("v", "w")},
        "g": torch.zeros(B, T, gate_heads, K),
        "b": torch.zeros(B, T, gate_heads, K, dtype=bf16),
        "initial_state": torch.zeros(B, HV, K, V),
    }
    return call | changes


def packed(call: dict) -> dict:
    tokens = {name: x.reshape(1, B * T, *x.shape[2:]) for name, x in call.items() if x.shape[:2] == (B, T)}
    return call | tokens | {"cu_seqlens": torch.tensor([0, 37, B * T])}


def gated(call: dict) -> dict:
    gates = {"A_log": torch.zeros(H), "dt_bias": torch.zeros(H * K), "use_gate": True}
    return call | gates | {"use_gate_sigmoid": True, "erase_scale": 2, "use_qk_l2norm": True}


def sizes(call: dict) -> cuda_backend._Sizes:
    return cuda_backend._Sizes.of(call["q"], call["v"], call["g"], call.get("cu_seqlens"))


def placed(x: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Like x, so many bytes behind a multiple of 128: allocators of GPUs give multiples."""
    memory = torch.zeros(x.numel() * x.element_size() + 256, dtype=torch.uint8)
    first = -memory.data_ptr() % 128 + offset
    return memory[first : first + x.numel() * x.element_size()].view(x.dtype)


def workspace_of(call: dict, *flags) -> torch.Tensor:
    return placed(sizes(call).workspace(call["q"], *flags))


def kept_of(call: dict, *flags) -> torch.Tensor:
    return placed(sizes(call).kept(call["q"], *flags))


def forward(call: dict) -> dict:
    workspace = workspace_of(call, False, False, False)
    o, final_state = torch.zeros_like(call["v"]), torch.zeros(B, HV, K, V)
    return call | {"o": o, "final_state": final_state, "workspace": workspace}


def split(call: dict) -> dict:
    """The forward in three segments."""
    call = forward(call) | {"num_segments": 3, "kept": kept_of(call, 3)}
    return call | {"workspace": workspace_of(call, False, False, False, 3)}


def split_backward(call: dict) -> dict:
    call = backward(call) | {"num_segments": 3, "kept": kept_of(call, 3)}
    norms = call.get("use_qk_l2norm", False)
    return call | {"workspace": workspace_of(call, True, True, norms, 3)}


def keeping(call: dict) -> dict:
    """The forward of training, which keeps A - I and P."""
    call = forward(call)
    shape = (sizes(call).num_slots, call["g"].shape[2], *cuda_backend.TRIANGLE)
    matrices = torch.zeros(shape, dtype=call["q"].dtype)
    workspace = workspace_of(call, True, False, False)
    return call | {"A_minus_I": matrices, "P": matrices.clone(), "workspace": workspace}


def keeping_tiles(call: dict, num_segments: int = 1) -> dict:
    """The same with disable_recompute."""
    call, norms = keeping(call), call.get("use_qk_l2norm", False)
    kept = kept_of(call, num_segments, True, norms)
    workspace = workspace_of(call, True, False, norms, num_segments, True)
    return call | {"num_segments": num_segments, "kept": kept, "workspace": workspace}


def backward_of_tiles(call: dict, num_segments: int = 1) -> dict:
    call, norms = backward(call), call.get("use_qk_l2norm", False)
    kept = kept_of(call, num_segments, True, norms)
    workspace = workspace_of(call, True, True, norms, num_segments, True)
    return call | {"num_segments": num_segments, "kept": kept, "workspace": workspace}


def backward(call: dict) -> dict:
    kept = {name: keeping(call)[name] for name in ("A_minus_I", "P")}
    given = [call.get(name) for name in INPUTS[:9]]
    out = cuda_backend._new_gradients(sizes(call), given, [x is not None for x in given])
    workspace = workspace_of(call, True, True, call.get("use_qk_l2norm", False))
    call = call | kept | dict(zip(GRADIENTS, out, strict=True)) | {"workspace": workspace}
    return call | {"do": torch.zeros_like(call["v"]), "d_final_state": torch.zeros(B, HV, K, V)}


def described(x: torch.Tensor, device: int = 0) -> tuple:
    """As `cuda_launch.as_tuple`, of a device that is not there."""
    kind = cuda_launch._KINDS.get(x.dtype, len(cuda_launch._KINDS))
    return x.data_ptr(), tuple(x.shape), x.stride(), kind, device


def lets_through(call: dict, device: int = 0) -> bool:
    tensors = BACKWARD if "do" in call else FORWARD
    call = dict.fromkeys(tensors) | OPTIONS | call
    assert set(call) == {*tensors, *OPTIONS}, "an argument that there is not"
    arguments = [call[name] for name in (*tensors, *OPTIONS)]
    arguments = [described(x, device) if isinstance(x, torch.Tensor) else x for x in arguments]
    return disguise.gets_to_the_gpu("chunk_backward" if "do" in call else "chunk_forward", *arguments)


def at_once_takes(read_tensors, call: dict, sequence_split: int = 0) -> bool:
    """Whether the function that makes its own tensors would launch; it does not see the others."""
    call = dict.fromkeys((*BACKWARD, *FORWARD)) | OPTIONS | call
    inputs, options = [call[name] for name in INPUTS], [call[name] for name in tuple(OPTIONS)[:7]]
    how = (read_tensors, cuda_launch.MAKE_TENSORS)
    if call["do"] is None:
        wanted = [call[name] is not None for name in ("final_state", "P", "kept")]
        arguments = (*inputs, *options, sequence_split, *wanted)
        return disguise.gets_to_the_gpu("chunk_forward_at_once", *how, *arguments)
    kept = [call[name] for name in ("A_minus_I", "P", "kept")]
    needed = [call[name] is not None for name in GRADIENTS]
    arguments = (call["do"], call["d_final_state"], *inputs, *kept, *options, sequence_split, *needed)
    return disguise.gets_to_the_gpu("chunk_backward_at_once", *how, *arguments)


KINDS = {
    "plain": lambda: inputs(),
    "packed": lambda: packed(inputs()),
    "gated": lambda: gated(inputs()),
    "gates of value heads": lambda: inputs(gate_heads=HV),
    "no state": lambda: inputs(initial_state=None),
}
PASSES = {
    "forward": forward,
    "split": split,
    "keeping": keeping,
    "backward": backward,
    "split_backward": split_backward,
    "keeping tiles": keeping_tiles,
    "keeping tiles and split": lambda call: keeping_tiles(call, 3),
    "backward of tiles": backward_of_tiles,
    "backward of tiles and split": lambda call: backward_of_tiles(call, 3),
}


@pytest.fixture(params=PASSES)
def stage(request):
    return PASSES[request.param]


@pytest.fixture(params=KINDS)
def call(request, stage) -> dict:
    return stage(KINDS[request.param]())


def test_calls_as_the_kernels_need_them_get_to_the_gpu(call):
    assert lets_through(call)


def test_so_do_those_that_make_their_tensors(read_tensors, call):
    assert at_once_takes(read_tensors, call)
    assert at_once_takes(read_tensors, call, sequence_split=call.get("num_segments", 1))


def test_tensors_of_the_cpu_do_not(call):
    assert not lets_through(call, device=-1)
    assert not at_once_takes(cuda_launch.READ_TENSORS, call)


def aligned_view(x: torch.Tensor) -> torch.Tensor:
    """Of a wider tensor: rows start at multiples of 16 bytes."""
    wide = torch.zeros(*x.shape[:3], x.shape[3] + 16 // x.element_size(), dtype=x.dtype)
    return wide[..., : x.shape[3]]


GOOD = {
    "float16": dict.fromkeys(("q", "k", "v", "b", "w", "o"), torch.Tensor.half),
    "g in 16 bits": {"g": torch.Tensor.bfloat16},
    "views": dict.fromkeys(("q", "k", "v", "g", "b", "w"), aligned_view),
    "transposed": dict.fromkeys(("q", "g"), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "a scale": {"scale": lambda _: 0.3},
    "nobody asks": {"final_state": lambda _: None},
    "v first": {
        "state_v_first": lambda _: True,
        **{name: (lambda x: torch.zeros(B, HV, V, K)) for name in ("initial_state", "final_state")},
    },
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_variants_get_to_the_gpu(read_tensors, changes):
    call = forward(inputs())
    call |= {name: change(call.get(name)) for name, change in changes.items()}
    assert lets_through(call)
    assert at_once_takes(read_tensors, call)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same at an address that is no multiple of 16 bytes."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


BAD = {
    "float32": ("q", torch.Tensor.float),
    "another dtype": ("k", torch.Tensor.half),
    "another length": ("v", lambda x: x[:, 1:]),
    "other heads": ("w", lambda x: x[:, :, 1:]),
    "too many channels": ("q", lambda x: torch.zeros(B, T, H, 192, dtype=x.dtype)),
    "channels with gaps": ("b", lambda x: x.repeat_interleave(2, -1)[..., ::2]),
    "an odd address": ("q", shifted),
    "rows of odd strides": ("k", lambda x: torch.zeros(B, T, H, K + 1, dtype=x.dtype)[..., :K]),
    "expanded tokens": ("v", lambda x: x[:, :1].expand(x.shape)),
    "three dimensions": ("g", lambda x: x[0]),
    "a state in 16 bits": ("initial_state", torch.Tensor.bfloat16),
    "a transposed state": ("initial_state", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "too few states": ("initial_state", lambda x: x[1:]),
    "A_log without a gate": ("A_log", lambda _: torch.zeros(H)),
    "a gate without A_log": ("use_gate", lambda _: True),
    "a bound without a gate": ("lower_bound", lambda _: -1.0),
    "an erase scale without sigmoids": ("erase_scale", lambda _: 2.0),
    "offsets of a batch": ("cu_seqlens", lambda _: torch.tensor([0, T])),
}
# Of what the caller makes.
BAD_ROOM = {
    "a short workspace": ("workspace", lambda x: x[:-16]),
    "no workspace": ("workspace", lambda _: None),
    "no segments": ("num_segments", lambda _: 0),
    "a workspace between tiles' places": ("workspace", lambda x: placed(x, 16)),
    "too little that is kept": ("kept", lambda x: placed(torch.zeros(8))),
    "kept between tiles' places": ("kept", lambda x: placed(torch.zeros(8) if x is None else x, 64)),
}


class Subclass(torch.Tensor):
    pass


# Of what comes as Python has it.
BAD_OBJECTS = {
    "a scale that is none": ("scale", lambda _: "large"),
    "a flag that is none": ("use_qk_l2norm", lambda _: "no"),
    "no tensor": ("q", lambda _: 3),
    "a list": ("g", lambda x: x.tolist()[:1]),
    "a subclass": ("v", lambda x: x.as_subclass(Subclass)),
    "a state of a subclass": ("initial_state", lambda x: x.as_subclass(Subclass)),
    "a tensor without memory": ("k", lambda x: x.to("meta")),
    "no tokens": ("q", lambda x: x[:, :0]),
}


@pytest.mark.parametrize(("name", "change"), BAD.values(), ids=BAD)
def test_wrong_calls_do_not(read_tensors, stage, name, change):
    call = stage(inputs())
    wrong = call | {name: change(call.get(name))}
    assert lets_through(call)
    assert not lets_through(wrong)
    assert at_once_takes(read_tensors, call)
    assert not at_once_takes(read_tensors, wrong)


@pytest.mark.parametrize(("name", "change"), BAD_ROOM.values(), ids=BAD_ROOM)
def test_calls_without_room_do_not(stage, name, change):
    call = stage(inputs())
    assert lets_through(call)
    assert not lets_through(call | {name: change(call.get(name))})


@pytest.mark.parametrize(("name", "change"), BAD_OBJECTS.values(), ids=BAD_OBJECTS)
def test_wrong_objects_do_not(read_tensors, stage, name, change):
    call = stage(inputs())
    assert not at_once_takes(read_tensors, call | {name: change(call.get(name))})


@pytest.mark.parametrize("number", [-1, 1 << 16, 1 << 40])
def test_numbers_of_segments_are_checked(read_tensors, stage, number):
    assert not at_once_takes(read_tensors, stage(inputs()), sequence_split=number)


@pytest.mark.parametrize("name", ["o", "final_state", "A_minus_I", "P", *GRADIENTS[:6], "d_initial_state"])
def test_outputs_have_the_right_shape_and_no_gaps(name):
    call = backward(inputs()) if name.startswith("d") else keeping(inputs())
    x = call[name]
    assert not lets_through(call | {name: x[..., :-1].contiguous()})
    assert not lets_through(call | {name: x.transpose(0, 1).contiguous().transpose(0, 1)})
    assert not lets_through(call | {name: x.to(torch.float64)})


def test_the_workspace_grows_with_what_is_in_it():
    call, flags = (
        inputs(),
        ((True, False, False), (False, False, False), (True, True, False), (True, True, True)),
    )
    numbers = [sizes(call).workspace(call["q"], *x).numel() for x in flags]
    assert numbers == sorted(set(numbers))
    assert sizes(packed(call)).workspace(call["q"], *flags[0]).numel() > numbers[0]


def test_segments_need_room_of_their_own():
    call = inputs()
    numbers = [sizes(call).workspace(call["q"], True, False, False, n).numel() for n in (1, 2, 3)]
    assert numbers == sorted(set(numbers))
