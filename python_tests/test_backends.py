"""Which backend takes a call, what `supports` says, and what a user hears when the kernels cannot be used."""

import doctest
import warnings

import pytest
import torch

import gdn2_ext
from gdn2_ext import chunk_gdn2, cuda_backend, fused_recurrent_gdn2, ops, supports

SHAPE = {"batch": 1, "seqlen": 3, "heads": 1, "dim_k": 64, "dim_v": 64}
HOPPER = torch.device("cuda", 0)


@pytest.fixture
def fresh_warnings(monkeypatch):
    """As in a new process, in which no fallback has been reported."""
    monkeypatch.setattr(ops, "_warned_reasons", set())


@pytest.fixture
def extension(monkeypatch):
    """As if the extension had been built."""
    monkeypatch.setattr(cuda_backend, "_C", object())


@pytest.fixture
def no_extension(monkeypatch):
    """As if the package had been built without its kernels."""
    monkeypatch.setattr(cuda_backend, "_C", None)
    monkeypatch.setattr(cuda_backend, "_IMPORT_ERROR", "no module _C", raising=False)


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
    assert reason == "gdn2_ext was built without its kernels (GDN2_CUDA=OFF): no module _C"


def test_supports_takes_the_options_of_a_call(backend, seed):
    inputs = backend.inputs(**SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    plain = supports(*inputs.tensors)
    assert supports(*inputs.tensors, initial_state=initial_state, output_final_state=True) == plain
    assert plain[0] == (backend.name == "cuda")
    assert bool(plain[1]) != plain[0]


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
    message = "^backend: 'cuda' cannot take this call: gdn2_ext was built without its kernels"
    for function in (chunk_gdn2, fused_recurrent_gdn2):
        with pytest.raises(ValueError, match=message):
            function(*inputs.tensors, backend="cuda")


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


@pytest.mark.parametrize("asked, reason, chosen", [("auto", None, "cuda"), ("cuda", None, "cuda"), ("torch", None, "torch")])
def test_where_the_kernels_take_a_call_auto_takes_them(fresh_warnings, asked, reason, chosen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._choose_backend(asked, HOPPER, reason) == chosen


def test_the_package_says_what_it_has():
    assert set(gdn2_ext.__all__) == {"chunk_gdn2", "fused_recurrent_gdn2", "supports"}
    assert all(getattr(gdn2_ext, name).__doc__ for name in gdn2_ext.__all__)
    assert gdn2_ext.__version__[0].isdigit()


def test_the_examples_in_the_docstrings_run():
    outcome = doctest.testmod(ops)
    assert outcome.attempted > 0 and outcome.failed == 0
