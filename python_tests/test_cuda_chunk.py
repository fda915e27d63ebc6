"""What the extension's functions of the chunk form let through to the GPU, tried without one.

chunk_forward and chunk_backward, whose caller makes all tensors; chunk_forward_at_once and
chunk_backward_at_once, which make them.
"""

import disguise
import pytest
import torch

from gdn2_ext import cuda_backend, cuda_launch
from gdn2_ext.sequence_split import Gpu
from gdn2_ext.torch_backend import GateOptions

B, T, H, HV, K, V = 2, 100, 2, 4, 32, 64
SLOTS = B * 2

pytestmark = disguise.MARKS
read_tensors = disguise.read_tensors

INPUTS = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state", "cu_seqlens")
FORWARD = (*INPUTS, "o", "final_state", "chunk_states", "kept", "workspace")
GRADIENTS = ("dq", "dk", "dv", "dg", "db", "dw", "dA_log", "d_dt_bias", "d_initial_state")
BACKWARD = ("do", "d_final_state", *INPUTS, "kept", "workspace", *GRADIENTS)
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


def kept_of(call: dict, num_segments: int = 1, keep_tiles: bool = False) -> torch.Tensor:
    size = sizes(call).kept_size(num_segments, keep_tiles, call.get("use_qk_l2norm", False))
    return placed(torch.zeros(size))


def forward(call: dict, num_segments: int = 1) -> dict:
    workspace = workspace_of(call, False, False, num_segments)
    o, final_state = torch.zeros_like(call["v"]), torch.zeros(B, HV, K, V)
    return call | {"o": o, "final_state": final_state, "workspace": workspace, "num_segments": num_segments}


def keeping(call: dict, num_segments: int = 1, tiles: bool = False) -> dict:
    """The forward of training, and with tiles that of disable_recompute."""
    workspace = workspace_of(call, True, False, num_segments, tiles)
    kept = kept_of(call, num_segments, tiles)
    return forward(call, num_segments) | {"kept": kept, "workspace": workspace}


def backward(call: dict, num_segments: int = 1, tiles: bool = False) -> dict:
    given = [call.get(name) for name in INPUTS[:9]]
    out = cuda_backend._new_gradients(sizes(call), given, [x is not None for x in given])
    workspace = workspace_of(call, True, True, num_segments, tiles)
    call = call | dict(zip(GRADIENTS, out, strict=True)) | {"workspace": workspace}
    call |= {"kept": kept_of(call, num_segments, tiles), "num_segments": num_segments}
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
        keep = call["kept"] is not None
        arguments = (*inputs, *options, sequence_split, call["final_state"] is not None, keep)
        with_tiles_and_without = {
            disguise.gets_to_the_gpu("chunk_forward_at_once", *how, *arguments, tiles)
            for tiles in (False, keep)
        }
        assert len(with_tiles_and_without) == 1
        return with_tiles_and_without.pop()
    needed = [call[name] is not None for name in GRADIENTS]
    tensors = (call["do"], call["d_final_state"], *inputs, call["kept"])
    arguments = (*tensors, *options, sequence_split, *needed)
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
    "split": lambda call: forward(call, 3),
    "keeping": keeping,
    "keeping and split": lambda call: keeping(call, 3),
    "keeping tiles": lambda call: keeping(call, tiles=True),
    "keeping tiles and split": lambda call: keeping(call, 3, tiles=True),
    "backward": backward,
    "split backward": lambda call: backward(call, 3),
    "backward of tiles": lambda call: backward(call, tiles=True),
    "backward of tiles and split": lambda call: backward(call, 3, tiles=True),
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
}
# Of what a forward keeps.
BAD_KEPT = {
    "nothing": lambda _: torch.zeros(0),
    "too little": lambda x: x[:-64],
    "too much": lambda x: placed(torch.cat((x, x[:64]))),
    "as much as two": lambda x: placed(x.repeat(2)),
    "between tiles' places": lambda x: placed(x, 64),
    "as many in bfloat16": lambda x: placed(x.bfloat16()),
    "as large in bfloat16": lambda x: x.view(torch.bfloat16),
    "as large in int32": lambda x: x.view(torch.int32),
    "with gaps": lambda x: placed(x.repeat(2))[::2],
    "in two dimensions": lambda x: x.unsqueeze(1),
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
    if call["workspace"].numel() == 0:
        pytest.skip("all of its memory is kept")
    assert not lets_through(call | {name: change(call.get(name))})


@pytest.mark.parametrize("change", BAD_KEPT.values(), ids=BAD_KEPT)
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("num_segments", [1, 2, 3])
@pytest.mark.parametrize("stage", [keeping, backward])
def test_what_is_kept_has_its_size_its_type_and_its_place(stage, num_segments, tiles, change):
    call = stage(gated(inputs()), num_segments, tiles)
    assert lets_through(call)
    assert not lets_through(call | {"kept": change(call["kept"])})


@pytest.mark.parametrize("other", [1, 2, 4])
def test_what_is_kept_is_of_as_many_segments(other):
    for stage in (keeping, backward):
        call = stage(inputs(), 3)
        assert not lets_through(call | {"kept": kept_of(call, other)})
        assert not lets_through(call | {"kept": kept_of(call, other, True)})


def test_a_backward_needs_what_is_kept():
    assert not lets_through(backward(inputs()) | {"kept": None})


def test_what_is_kept_has_no_gaps():
    """Bytes: A - I and P, 10 blocks of 512 each; norms; M, first states; factors, last decays and N."""
    tiles, value_states, key_states = SLOTS * H, B * HV * 64 * 64 * 4, B * H * 64 * 64 * 4
    matrices, norms, prepared = 2 * 5120 * tiles, 2 * 64 * 4 * tiles, tiles * (3 * 64 * 64 * 2 + 64 * 4)
    for call, least in ((inputs(), matrices), (gated(inputs()), matrices + norms)):
        for num_segments in (1, 2, 5):
            split = max(num_segments - 2, 0) * key_states + (num_segments - 1) * value_states
            assert 4 * kept_of(call, num_segments).numel() == least + split
            N = (num_segments - 1) * value_states
            assert 4 * kept_of(call, num_segments, True).numel() == least + split + prepared + N


@pytest.mark.parametrize(("name", "change"), BAD_OBJECTS.values(), ids=BAD_OBJECTS)
def test_wrong_objects_do_not(read_tensors, stage, name, change):
    call = stage(inputs())
    assert not at_once_takes(read_tensors, call | {name: change(call.get(name))})


@pytest.mark.parametrize("number", [-1, 1 << 16, 1 << 40])
def test_numbers_of_segments_are_checked(read_tensors, stage, number):
    assert not at_once_takes(read_tensors, stage(inputs()), sequence_split=number)


@pytest.mark.parametrize("name", ["o", "final_state", *GRADIENTS[:6], "d_initial_state"])
def test_outputs_have_the_right_shape_and_no_gaps(name):
    call = backward(inputs()) if name.startswith("d") else keeping(inputs())
    x = call[name]
    assert not lets_through(call | {name: x[..., :-1].contiguous()})
    assert not lets_through(call | {name: x.transpose(0, 1).contiguous().transpose(0, 1)})
    assert not lets_through(call | {name: x.to(torch.float64)})


def test_the_workspace_grows_with_what_is_in_it():
    call, flags = inputs(), ((True, False), (False, False), (True, True))
    numbers = [sizes(call).workspace(call["q"], *x).numel() for x in flags]
    assert numbers == sorted(set(numbers))
    assert sizes(packed(call)).workspace(call["q"], *flags[0]).numel() > numbers[0]


def test_segments_need_room_of_their_own():
    call = inputs()
    numbers = [sizes(call).workspace(call["q"], True, False, n).numel() for n in (1, 2, 3)]
    assert numbers == sorted(set(numbers))


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """Segments, and elements kept or None, of all that cuda_backend launches; it gets to the GPU."""
    out = []

    def launch(function, tensors, options):
        kept = tensors[(BACKWARD if "backward" in function.__name__ else FORWARD).index("kept")]
        # Allocators of GPUs give multiples of 128 bytes.
        tensors = [x if x is None else described(x) for x in tensors]
        tensors = [x if x is None else (x[0] - x[0] % 128, *x[1:]) for x in tensors]
        assert disguise.gets_to_the_gpu(function.__name__, *tensors, *options, 0)
        out.append((options[-1], None if kept is None else kept.numel()))

    monkeypatch.setattr(cuda_backend, "_launch", launch)
    monkeypatch.setattr(cuda_backend, "gpu", lambda _: Gpu(132, 3350))
    return out


def launch_forward(tokens: list, asked: int, keep: bool = True, tiles: bool = False) -> torch.Tensor | None:
    arguments = (*tokens, None, None, None, None, 0.5, GateOptions(True, False, None, False, 1.0))
    flags = {"state_v_first": False, "output_final_state": True, "num_state_chunks": None}
    flags |= {"sequence_split": asked, "keep": keep, "keep_tiles": tiles}
    return cuda_backend.chunk_forward(*arguments, **flags)[-1]


def launch_backward(tokens: list, kept: torch.Tensor, asked: int) -> None:
    arguments = (*tokens, None, None, None, None, kept, 0.5, GateOptions(True, False, None, False, 1.0))
    flags = {"state_v_first": False, "needed": [True] * 6 + [False] * 3, "sequence_split": asked}
    cuda_backend.chunk_backward(tokens[2], None, *arguments, **flags)


def some_tokens(seqlen: int) -> list[torch.Tensor]:
    return [torch.zeros(1, seqlen, 1, K, dtype=torch.bfloat16) for _ in range(6)]


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize(
    ("seqlen", "asked", "fewest", "most"),
    [(300, 1, 1, 1), (300, 2, 2, 2), (300, 5, 5, 5), (300, 0, 1, 1), (30_000, 0, 2, 64), (0, 3, 1, 1)],
)
def test_the_backward_walks_as_many_segments_as_the_forward(launches, seqlen, asked, fewest, most, tiles):
    tokens = some_tokens(seqlen)
    kept = launch_forward(tokens, asked, tiles=tiles)
    launch_backward(tokens, kept, asked)
    (segments, size), of_backward = launches
    assert fewest <= segments <= most
    assert kept.dtype == torch.float32 and kept.shape == (size,)
    assert of_backward == (segments, size)


@pytest.mark.parametrize("asked", [0, 2, 64])
def test_what_a_whole_forward_keeps_says_that_it_was_whole(launches, asked):
    tokens = some_tokens(30_000)
    launch_backward(tokens, launch_forward(tokens, 1), asked)
    assert [segments for segments, _ in launches] == [1, 1]


@pytest.mark.parametrize("asked", [1, 3])
def test_a_forward_without_a_backward_keeps_nothing(launches, asked):
    assert launch_forward(some_tokens(300), asked, keep=False) is None
    assert launches == [(asked, None)]


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("seqlen", [0, 300])
def test_the_fake_operator_keeps_as_much(launches, seqlen, tiles):
    for asked in (1, 3):
        real = launch_forward(some_tokens(seqlen), asked, tiles=tiles)
        tokens = [x.to("meta") for x in some_tokens(seqlen)]
        options = (0.5, True, False, None, False, 1.0, False)
        *_, kept = torch.ops.gdn2_ext.chunk_forward(
            *tokens, None, None, None, None, *options, True, None, True, tiles, asked, "cuda"
        )
        assert (kept.shape, kept.dtype) == (real.shape, real.dtype)
