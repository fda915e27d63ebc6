"""Tensors of the CPU that pass for those of a GPU: what the extension lets through can be tried without one.

A right call goes on to ask CUDA for its device, which is not there; any other is answered with False before.
"""

import ctypes
import importlib
import importlib.util

import pytest
import torch

from gdn2_ext import cuda_launch

MARKS = [
    pytest.mark.skipif(
        importlib.util.find_spec("gdn2_ext._C") is None, reason="needs an install with kernels (GDN2_CUDA=ON)"
    ),
    pytest.mark.skipif(cuda_launch.READ_TENSORS is None, reason="needs PyTorch 2.10"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the launch would go through"),
]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class ManagedTensor(ctypes.Structure):
    pass


GiveBack = ctypes.PYFUNCTYPE(None, ctypes.POINTER(ManagedTensor))
ManagedTensor._fields_ = [
    ("version", ctypes.c_uint32 * 2),
    ("context", ctypes.c_void_p),
    ("give_back", GiveBack),
    ("flags", ctypes.c_uint64),
    ("tensor", DLTensor),
]
View = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
SetError = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
Allocate = ctypes.PYFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(DLTensor),
    ctypes.POINTER(ctypes.POINTER(ManagedTensor)),
    ctypes.c_void_p,
    SetError,
)


class ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("major_version", ctypes.c_uint32),
        ("minor_version", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", Allocate),
        ("others", ctypes.c_void_p * 2),
        ("view", View),
        ("current_stream", ctypes.c_void_p),
    ]


_NAME = b"dlpack_exchange_api"


def exchange_api() -> ExchangeApi:
    """PyTorch's."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ExchangeApi.from_address(get_pointer(cuda_launch.READ_TENSORS[0], _NAME))


@pytest.fixture
def read_tensors():
    """As cuda_launch.READ_TENSORS, for tensors of the CPU that pass for those of GPU 0."""
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api = exchange_api()

    def view(x, out) -> int:
        try:
            status = api.view(x, out)
        except RuntimeError:  # what DLPack has no word for
            return -1
        if status == 0 and out.contents.device_type == 1:
            out.contents.device_type, out.contents.device_id = 2, 0
        return status

    disguised = ExchangeApi.from_buffer_copy(api)
    disguised.view = View(view)
    yield (new_capsule(ctypes.addressof(disguised), _NAME, None), *cuda_launch.READ_TENSORS[1:])


def gets_to_the_gpu(name: str, *arguments) -> bool:
    """Whether the extension's function would launch."""
    try:
        launched = getattr(importlib.import_module("gdn2_ext._C"), name)(*arguments)
    except RuntimeError as error:
        assert "cudaErrorInsufficientDriver" in str(error) or "cudaErrorNoDevice" in str(error)
        return True
    assert launched is (None if name.endswith("at_once") else False)
    return False
