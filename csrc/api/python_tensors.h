// Arguments of Python's calls, tensors among them, for functions that check them where they read them.
// PyTorch 2.10 and newer hands out a tensor's address, shape, strides and type through DLPack's C interface
// in tens of nanoseconds; with an older one, and wherever tensors are not plain ones, they come as tuples.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>

#include "api/cuda_error.h"
#include "api/dlpack.h"
#include "params.h"

namespace gdn2::python {

constexpr std::int64_t kMaxDimK = 128, kMaxDimV = 256;

// The first three are those of ElementType.
enum class Kind { kBFloat16, kFloat16, kFloat32, kInt32, kInt64, kOther };

inline std::int64_t bytes_of(Kind kind) {
  return kind == Kind::kInt64 ? 8 : kind == Kind::kFloat32 || kind == Kind::kInt32 ? 4 : 2;
}

struct View {
  bool given = false;
  std::uint8_t* data = nullptr;
  int ndim = 0;
  std::int64_t shape[4] = {}, strides[4] = {};  // strides in elements
  Kind kind = Kind::kOther;
  int device = -1;

  template <class... Sizes>
  bool has_shape(Sizes... sizes) const {
    std::int64_t const expected[] = {static_cast<std::int64_t>(sizes)...};
    return ndim == sizeof...(sizes) && std::equal(expected, expected + ndim, shape);
  }
  bool has_shape_of(View const& other) const {
    return ndim == other.ndim && std::equal(shape, shape + ndim, other.shape);
  }
  bool is_contiguous() const {
    bool const empty = std::find(shape, shape + ndim, 0) != shape + ndim;
    bool gaps = false;
    std::int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      gaps = gaps || (shape[i] != 1 && strides[i] != stride);
      stride *= shape[i];
    }
    return empty || !gaps;
  }
  bool is_index() const { return kind == Kind::kInt32 || kind == Kind::kInt64; }
};

// Python's arguments one after the other. Whatever is wrong with one sets Python's error, which is looked at
// once.
class Arguments {
 public:
  explicit Arguments(PyObject* const* first) : next_(first) {}

  PyObject* object() { return *next_++; }
  bool flag() {
    PyObject* const x = object();
    if (!PyBool_Check(x)) {
      PyErr_SetString(PyExc_TypeError, "expected True or False");
    }
    return x == Py_True;
  }
  double number() { return PyFloat_AsDouble(object()); }
  // Whether there is a number, and not None.
  bool number(double& out) {
    PyObject* const x = object();
    if (x == Py_None) {
      return false;
    }
    out = PyFloat_AsDouble(x);
    return true;
  }
  std::int64_t integer() { return PyLong_AsLongLong(object()); }

 private:
  PyObject* const* next_;
};

inline std::uint8_t* address_of(dlpack::Tensor const& tensor) {
  return static_cast<std::uint8_t*>(tensor.data) + tensor.byte_offset;
}

struct GiveBack {
  void operator()(dlpack::ManagedTensor* memory) const {
    if (memory->give_back != nullptr) {
      memory->give_back(memory);
    }
  }
};
using Memory = std::unique_ptr<dlpack::ManagedTensor, GiveBack>;

// How tensors come: as objects, by the interface of their type, or as tuples.
class TensorReader {
 public:
  // None, or (the interface's capsule, torch.Tensor, torch.nn.Parameter).
  explicit TensorReader(PyObject* how) {
    if (how == Py_None) {
      return;
    }
    if (!PyTuple_Check(how) || PyTuple_GET_SIZE(how) != 3) {
      throw pybind11::type_error("expected None, or how tensors are read");
    }
    api_ = static_cast<dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(PyTuple_GET_ITEM(how, 0), dlpack::kCapsuleName));
    tensor_ = PyTuple_GET_ITEM(how, 1);
    parameter_ = PyTuple_GET_ITEM(how, 2);
  }

  bool reads_objects() const { return tensor_ != nullptr; }
  bool usable() const {
    return !reads_objects() || (api_ != nullptr && api_->major_version == dlpack::kMajorVersion &&
                                api_->view != nullptr && api_->allocate != nullptr);
  }

  View read(PyObject* x) const {
    View view;
    view.given = x != Py_None;
    if (view.given) {
      reads_objects() ? read_object(view, x) : read_tuple(view, x);
    }
    return view;
  }

  // Memory of PyTorch's allocator, which takes it back in the order of the current stream. Null where there
  // is none.
  Memory allocate(std::int64_t bytes, int device) const {
    dlpack::Tensor prototype{};
    prototype.device = {dlpack::kCuda, device};
    prototype.dtype = {.code = dlpack::kUInt, .bits = 8, .lanes = 1};
    prototype.ndim = 1;
    prototype.shape = &bytes;
    dlpack::ManagedTensor* tensor = nullptr;
    auto const ignore = [](void*, char const*, char const*) {};
    return Memory(api_->allocate(&prototype, &tensor, nullptr, ignore) == 0 ? tensor : nullptr);
  }

  cudaStream_t current_stream(int device) const {
    void* stream = nullptr;
    api_->current_stream(dlpack::kCuda, device, &stream);
    return static_cast<cudaStream_t>(stream);
  }

 private:
  dlpack::ExchangeApi const* api_ = nullptr;
  PyObject *tensor_ = nullptr, *parameter_ = nullptr;

  // A subclass of torch.Tensor may be anything: it stays without a kind.
  void read_object(View& view, PyObject* x) const {
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    dlpack::Tensor tensor{};
    if ((type != tensor_ && type != parameter_) || api_->view(x, &tensor) != 0 || tensor.ndim > 4 ||
        (tensor.ndim > 0 && tensor.strides == nullptr)) {
      return;
    }
    view.data = address_of(tensor);
    view.ndim = tensor.ndim;
    std::copy_n(tensor.shape, tensor.ndim, view.shape);
    std::copy_n(tensor.strides, tensor.ndim, view.strides);
    view.device = tensor.device.type == dlpack::kCuda ? tensor.device.id : -1;
    int const bits = tensor.dtype.lanes == 1 ? tensor.dtype.bits : 0;
    switch (tensor.dtype.code) {
      case dlpack::kBFloat:
        view.kind = bits == 16 ? Kind::kBFloat16 : Kind::kOther;
        break;
      case dlpack::kFloat:
        view.kind = bits == 16 ? Kind::kFloat16 : bits == 32 ? Kind::kFloat32 : Kind::kOther;
        break;
      case dlpack::kInt:
        view.kind = bits == 32 ? Kind::kInt32 : bits == 64 ? Kind::kInt64 : Kind::kOther;
        break;
    }
  }

  // (address, shape, strides, kind, device)
  static void read_tuple(View& view, PyObject* x) {
    PyObject *shape, *strides;
    unsigned long long address;
    int kind;
    if (PyArg_ParseTuple(x, "KO!O!ii", &address, &PyTuple_Type, &shape, &PyTuple_Type, &strides, &kind,
                         &view.device) == 0 ||
        PyTuple_GET_SIZE(shape) > 4 || PyTuple_GET_SIZE(strides) != PyTuple_GET_SIZE(shape)) {
      return;
    }
    view.data = reinterpret_cast<std::uint8_t*>(address);
    view.ndim = static_cast<int>(PyTuple_GET_SIZE(shape));
    for (int i = 0; i < view.ndim; ++i) {
      view.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      view.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    view.kind = static_cast<Kind>(kind);
  }
};

inline bool is_current_hopper(int device) {
  int current = -1, major = 0, minor = 0;
  throw_on_error(cudaGetDevice(&current), "gdn2_ext");
  if (current != device) {
    return false;
  }
  throw_on_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "gdn2_ext");
  throw_on_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "gdn2_ext");
  return major == 9 && minor == 0;
}

// What a function returns to Python: whether it launched, or what it made, where null stands for Python's
// error.
inline PyObject* to_python(bool launched) {
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(launched);
}
inline PyObject* to_python(pybind11::object made) {
  return made.release().ptr();
}

// A function of Python's that is body(arguments); `number` arguments are expected.
template <class Body>
PyObject* call_kernel(char const* name, PyObject* const* arguments, Py_ssize_t given, Py_ssize_t number,
                      Body body) {
  if (given != number) {
    return PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", name, number, given);
  }
  try {
    Arguments from(arguments);
    return to_python(body(from));
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (std::exception const& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <class Function>
PyMethodDef method(char const* name, Function* function, char const* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

}  // namespace gdn2::python
