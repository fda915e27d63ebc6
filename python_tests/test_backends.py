"""Which backend takes a call, what `supports` says, and what a user hears when the kernels cannot be used."""

import doctest
import importlib.util
import warnings

import pytest
import torch

import gdn2_ext
from gdn2_ext import chunk_gdn2, cuda_backend, cuda_launch, fused_recurrent_gdn2, ops, supports

SHAPE = {"batch": 1, "seqlen": 3, "heads": 1, "dim_k": 64, "dim_v": 64}
HOPPER = torch.device("cuda", 0)
NO_KERNELS = "gdn2_ext was built without its kernels (GDN2_CUDA=OFF)"


@pytest.fixture
def fresh_warnings(monkeypatch):
    """As in a new process, in which no fallback has been reported."""
    monkeypatch.setattr(ops, "_warned_reasons", set())


@pytest.fixture
def extension(monkeypatch):
    """As if the extension had been built."""
    monkeypatch.setattr(cuda_launch, "_C", object())


@pytest.fixture
def no_extension(monkeypatch):
    """As if the package had been built without its kernels."""
    monkeypatch.setattr(cuda_launch, "_C", None)
    monkeypatch.setattr(cuda_launch, "WHY_NO_EXTENSION", NO_KERNELS)


class OnDevice:
    """As much of a tensor as the choice of a backend reads, on a device that need not exist."""

    def __init__(self, device: torch.device, dtype=torch.bfloat16, channels: int = 128):
        self.device, self.dtype, self.shape = device, dtype, (1, 1, 1, channels)


def test_supports_answers_for_tensors_on_the_cpu(extension, backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    if backend.device.type != "cpu":
        pytest.skip("these tensors are on the CPU")
    assert supports(*inputs.tensors) == (
        False,
        "the kernels need an NVIDIA Hopper GPU and the tensors are on cpu",
    )


def test_supports_says_when_there_is_no_extension(no_extension, backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    taken, reason = supports(*inputs.tensors)
    assert not taken
    assert reason == NO_KERNELS


def test_supports_sees_what_autocast_makes_of_a_call(backend, seed):
    inputs = backend.inputs(seqlen=3, heads=1, dim_k=16, dim_v=16, seed=seed)
    q, k, v, g, b, w = inputs.tensors
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        mixed = supports(q, k.float(), v, g, b.float(), w)
        assert mixed == supports(*(x.bfloat16() for x in (q, k, v)), g, b.bfloat16(), w.bfloat16())


def test_supports_takes_the_options_of_a_call(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    plain = supports(*inputs.tensors)
    assert supports(*inputs.tensors, initial_state=initial_state, output_final_state=True) == plain
    assert plain[0] == (backend.name == "cuda")
    assert bool(plain[1]) != plain[0]


@pytest.mark.parametrize(
    "error, reason",
    [
        (None, None),
        (ModuleNotFoundError("No module named 'gdn2_ext._C'"), NO_KERNELS),
        (ImportError("libc is too old"), "the kernels of gdn2_ext could not be loaded: libc is too old"),
    ],
)
def test_importing_the_package_needs_no_extension(monkeypatch, error, reason):
    """The module's code in a module of another name: the package that the other tests use stays as it is."""

    def import_module(name):
        assert name == "gdn2_ext._C"
        if error is not None:
            raise error
        return "the extension"

    spec = importlib.util.spec_from_file_location("gdn2_ext.another_cuda_launch", cuda_launch.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(importlib, "import_module", import_module)
    spec.loader.exec_module(module)
    assert module._C == ("the extension" if error is None else None)
    assert module.WHY_NO_EXTENSION == reason


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 1)])
def test_another_architecture_is_named(extension, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = cuda_backend.why_not_chunk(OnDevice(HOPPER), OnDevice(HOPPER))
    expected = f"the kernels need compute capability 9.0 and this device has {capability[0]}.{capability[1]}"
    assert reason == expected
    assert cuda_backend.why_not_recurrent(OnDevice(HOPPER), OnDevice(HOPPER)) == expected


@pytest.mark.parametrize(
    "q, v, reason",
    [
        (OnDevice(HOPPER), OnDevice(HOPPER), None),
        (OnDevice(HOPPER, torch.float16, 16), OnDevice(HOPPER, torch.float16, 256), None),
        (
            OnDevice(HOPPER, torch.float32),
            OnDevice(HOPPER, torch.float32),
            "the kernels take bfloat16 and float16, and q is torch.float32",
        ),
        (OnDevice(HOPPER, channels=129), OnDevice(HOPPER), "the kernels take K up to 128, and K is 129"),
        (OnDevice(HOPPER), OnDevice(HOPPER, channels=257), "the kernels take V up to 256, and V is 257"),
    ],
)
def test_on_hopper_dtype_and_head_sizes_decide(extension, monkeypatch, q, v, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda_backend.why_not_chunk(q, v) == reason


def test_the_backend_that_cannot_take_a_call_says_why(no_extension, backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    for function in (chunk_gdn2, fused_recurrent_gdn2):
        with pytest.raises(ValueError) as caught:
            function(*inputs.tensors, backend="cuda")
        assert str(caught.value) == f"backend: 'cuda' cannot take this call: {NO_KERNELS}"


def test_auto_takes_the_torch_backend_on_the_cpu_without_a_word(fresh_warnings, backend, seed):
    if backend.device.type != "cpu":
        pytest.skip("these tensors are on the CPU")
    inputs = backend.inputs(**SHAPE, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in (chunk_gdn2, fused_recurrent_gdn2):
            o, _ = function(*inputs.tensors)
            assert torch.equal(o, function(*inputs.tensors, backend="torch")[0])


def test_auto_falls_back_on_a_gpu_with_one_warning_for_every_reason(fresh_warnings):
    with pytest.warns(UserWarning) as caught:
        for reason in ("too old", "too new", "too old", "too new"):
            assert ops._choose_backend("auto", HOPPER, reason) == "torch"
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "gdn2_ext falls back to its torch backend: too old",
        "gdn2_ext falls back to its torch backend: too new",
    ]


@pytest.mark.parametrize(
    "asked, reason, chosen", [("auto", None, "cuda"), ("cuda", None, "cuda"), ("torch", None, "torch")]
)
def test_where_the_kernels_take_a_call_auto_takes_them(fresh_warnings, asked, reason, chosen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._choose_backend(asked, HOPPER, reason) == chosen


# -- what the kernels are handed -----------------------------------------------------------------------------


def strided(shape: tuple, strides: tuple, offset: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    """A view of numbered memory that starts at a multiple of 16 bytes, offset elements in."""
    length = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.arange(length, dtype=torch.float32).to(dtype).as_strided(shape, strides, offset)


@pytest.mark.parametrize(
    "x",
    [
        strided((2, 3, 4, 64), (768, 256, 64, 1)),
        strided((2, 3, 4, 64), (768, 64, 192, 1)),
        strided((2, 3, 4, 64), (2304, 768, 192, 1), offset=64),
        strided((2, 3, 4, 64), (64, 512, 128, 1)),
        strided((2, 3, 4, 60), (768, 256, 64, 1)),
        strided((1, 3, 1, 64), (5, 64, 7, 1)),
        strided((2, 3, 4, 4), (48, 16, 4, 1), dtype=torch.float32),
    ],
    ids=lambda x: f"{list(x.shape)} {list(x.stride())}",
)
def test_views_with_aligned_rows_are_read_where_they_are(x):
    assert cuda_backend._readable(x) is x


@pytest.mark.parametrize(
    "x",
    [
        strided((2, 3, 4, 64), (1536, 512, 128, 2)),
        strided((2, 3, 4, 64), (768, 256, 64, 1), offset=1),
        strided((2, 3, 4, 60), (720, 240, 60, 1)),
        strided((2, 3, 4, 64), (0, 256, 64, 1)),
        strided((2, 3, 4, 5), (60, 20, 5, 1), dtype=torch.float32),
    ],
    ids=lambda x: f"{list(x.shape)} {list(x.stride())} {x.storage_offset()}",
)
def test_other_views_are_copied_to_aligned_rows(x):
    y = cuda_backend._readable(x)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    assert y.stride(3) == 1 and y.data_ptr() % 16 == 0
    assert all(stride * y.element_size() % 16 == 0 and stride > 0 for stride in y.stride()[:3])


# -- the package ---------------------------------------------------------------------------------------------


def test_the_package_says_what_it_has():
    names = {"chunk_gdn2", "fused_recurrent_gdn2", "supports", "GatedDeltaNet2", "RecurrentCache"}
    assert set(gdn2_ext.__all__) == names
    assert all(getattr(gdn2_ext, name).__doc__ for name in gdn2_ext.__all__)
    assert gdn2_ext.__version__[0].isdigit()


def test_the_examples_in_the_docstrings_run():
    outcome = doctest.testmod(ops)
    assert outcome.attempted > 0 and outcome.failed == 0
