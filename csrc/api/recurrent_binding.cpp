// recurrent_forward as a plain C function of Python: a decoding step is called tens of times a token, and of its dozens
// of integers pybind11 would make a few microseconds.
//
// Tensors come as an address and the tuple of their strides in elements, and as such tuples inside tuples where they
// are optional. Checks nothing that would take an access to a tensor; answers False where a layout is one that the
// kernel does not read, and nothing has been launched then.
#include "api/recurrent_binding.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <exception>
#include <limits>

#include "api/recurrent.h"

namespace gdn2 {
namespace {

// The arguments one after the other. A wrong one sets Python's error, which is looked at once, at the end.
class Arguments {
 public:
  Arguments(PyObject* const* at, Py_ssize_t number) : at_(at), end_(at + number) {}

  PyObject* object() {
    if (at_ == end_) {
      PyErr_SetString(PyExc_TypeError, "recurrent_forward: too few arguments");
      return Py_None;
    }
    return *at_++;
  }

  std::int64_t integer() { return PyErr_Occurred() ? 0 : PyLong_AsLongLong(object()); }
  std::int32_t small() { return static_cast<std::int32_t>(integer()); }
  bool flag() { return PyObject_IsTrue(object()) == 1; }
  float number() { return PyErr_Occurred() ? 0.f : static_cast<float>(PyFloat_AsDouble(object())); }
  std::uint8_t* address() { return reinterpret_cast<std::uint8_t*>(integer()); }

  // The items of a tuple, or no arguments for None.
  Arguments tuple() {
    PyObject* const x = object();
    if (x == Py_None) {
      return {nullptr, 0};
    }
    if (!PyTuple_Check(x)) {
      PyErr_SetString(PyExc_TypeError, "recurrent_forward: expected a tuple or None");
      return {nullptr, 0};
    }
    return {&PyTuple_GET_ITEM(x, 0), PyTuple_GET_SIZE(x)};
  }

  bool empty() const { return at_ == end_; }

 private:
  PyObject* const* at_;
  PyObject* const* end_;
};

// Strides in bytes, and whether all of them fit.
struct Strides {
  std::int64_t element_bytes;
  bool fit = true;

  // The stride of a dimension of one element is never used, and may be anything.
  std::int64_t wide(std::int64_t size, std::int64_t stride) const {
    return size > 1 ? stride * element_bytes : 0;
  }
  std::int32_t narrow(std::int64_t size, std::int64_t stride) {
    std::int64_t const bytes = wide(size, stride);
    fit = fit && bytes >= 0 && bytes <= std::numeric_limits<std::int32_t>::max();
    return static_cast<std::int32_t>(bytes);
  }
};

std::int64_t bytes_of(ElementType element) {
  return element == ElementType::kFloat32 ? 4 : 2;
}

struct Reader {
  CallShape& shape;
  bool fit = true;

  // An address and four strides.
  StridedTokens tokens(Arguments& from, int heads, int channels, ElementType element) {
    Strides strides{bytes_of(element)};
    StridedTokens x;
    x.data = from.address();
    Arguments stride = from.tuple();
    x.stride_batch = strides.wide(shape.batch, stride.integer());
    x.stride_token = strides.narrow(shape.seqlen, stride.integer());
    x.stride_head = strides.narrow(heads, stride.integer());
    x.stride_channel = strides.narrow(channels, stride.integer());
    fit = fit && strides.fit;
    return x;
  }

  // (address, four strides). v_first: what the caller says of the dimensions' order; changed to what the memory says, for
  // a transposed view is the other order.
  StateTensor states(Arguments from, bool& v_first, ElementType element) {
    if (from.empty()) {
      return {};
    }
    Strides strides{bytes_of(element)};
    StateTensor x;
    x.data = from.address();
    Arguments stride = from.tuple();
    x.stride_slot = stride.integer() * strides.element_bytes;
    x.stride_head = strides.narrow(shape.num_value_heads, stride.integer());
    std::int64_t const outer = stride.integer(), inner = stride.integer();
    std::int64_t const num_rows = v_first ? shape.dim_v : shape.dim_k,
                       length = v_first ? shape.dim_k : shape.dim_v;
    if (inner == 1 || length == 1) {
      x.stride_row = strides.narrow(num_rows, outer);
    } else if (outer == 1 || num_rows == 1) {
      x.stride_row = strides.narrow(length, inner);
      v_first = !v_first;
    } else {
      fit = false;
    }
    fit = fit && strides.fit;
    return x;
  }

  // (address, whether it has 64 bits, strides), one or two.
  IndexTensor indices(Arguments from) {
    if (from.empty()) {
      return {};
    }
    IndexTensor x{};
    x.data = from.address();
    x.is_64_bit = from.flag();
    Strides strides{x.is_64_bit ? 8 : 4};
    Arguments stride = from.tuple();
    x.stride_sequence = strides.narrow(shape.num_sequences + 1, stride.integer());
    x.stride_position = stride.empty() ? 0 : strides.narrow(2, stride.integer());
    fit = fit && strides.fit;
    return x;
  }
};

// Arguments in the order of gdn2_ext/cuda_backend.py.
bool launch(Arguments& from) {
  RecurrentParams params{};
  CallShape& shape = params.shape;
  shape.element = static_cast<ElementType>(from.small());
  params.gate_element = static_cast<ElementType>(from.small());
  params.state_element = static_cast<ElementType>(from.small());
  Arguments q_shape = from.tuple(), v_shape = from.tuple();
  shape.batch = q_shape.small();
  shape.seqlen = q_shape.small();
  shape.num_heads = q_shape.small();
  shape.dim_k = q_shape.small();
  v_shape.integer();
  v_shape.integer();
  shape.num_value_heads = v_shape.small();
  shape.dim_v = v_shape.small();
  shape.num_gate_heads = from.small();
  shape.num_sequences = from.small();
  shape.num_slots = from.small();

  Reader read{shape};
  params.q = read.tokens(from, shape.num_heads, shape.dim_k, shape.element);
  params.k = read.tokens(from, shape.num_heads, shape.dim_k, shape.element);
  params.v = read.tokens(from, shape.num_value_heads, shape.dim_v, shape.element);
  params.g = read.tokens(from, shape.num_gate_heads, shape.dim_k, params.gate_element);
  params.b = read.tokens(from, shape.num_gate_heads, shape.dim_k, shape.element);
  params.w = read.tokens(from, shape.num_value_heads, shape.dim_v, shape.element);
  params.o = read.tokens(from, shape.num_value_heads, shape.dim_v, shape.element);
  params.gates.A_log = reinterpret_cast<float const*>(from.address());
  params.gates.dt_bias = reinterpret_cast<float const*>(from.address());

  bool const v_first = from.flag();
  bool states_v_first = v_first, final_v_first = v_first;
  params.states = read.states(from.tuple(), states_v_first, params.state_element);
  params.final_state = read.states(from.tuple(), final_v_first, ElementType::kFloat32);
  params.state_v_first = params.states.data != nullptr ? states_v_first : final_v_first;
  read.fit = read.fit && (params.states.data == nullptr || params.final_state.data == nullptr ||
                          states_v_first == final_v_first);
  params.cu_seqlens = read.indices(from.tuple());
  params.state_indices = read.indices(from.tuple());
  params.num_accepted_tokens = read.indices(from.tuple());
  params.index_columns = from.small();
  params.inplace = from.flag();

  params.scale = from.number();
  params.gates.use_qk_l2norm = from.flag();
  params.gates.decay_gate = static_cast<DecayGate>(from.small());
  params.gates.lower_bound = from.number();
  params.gates.use_gate_sigmoid = from.flag();
  params.gates.erase_scale = from.number();
  auto const stream = reinterpret_cast<cudaStream_t>(from.address());
  if (PyErr_Occurred() || !read.fit) {
    return false;
  }
  pybind11::gil_scoped_release const release;  // a full queue makes a launch wait
  run_recurrent(params, stream);
  return true;
}

PyObject* recurrent_forward(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  try {
    Arguments from(arguments, number);
    bool const launched = launch(from);
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(launched);
  } catch (std::exception const& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"recurrent_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&recurrent_forward)),
     METH_FASTCALL,
     "A decoding step on the current device; see csrc/api/recurrent.h for shapes. False, and nothing launched, for a "
     "layout that the kernel does not read. Checks nothing else."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_recurrent_forward(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) {
    throw pybind11::error_already_set();
  }
}

}  // namespace gdn2
