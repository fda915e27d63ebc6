// recurrent_forward as a plain C function of Python. A decoding step is called once a layer, and asking Python for the
// shapes, strides, types and addresses of a dozen tensors takes longer than the kernel: PyTorch 2.10 and newer hands them
// out through DLPack's C interface in tens of nanoseconds each. With an older one they come as tuples.
#include "api/recurrent_binding.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>

#include "api/cuda_error.h"
#include "api/dlpack.h"
#include "api/recurrent.h"

namespace gdn2 {
namespace {

constexpr std::int64_t kMaxDimK = 128, kMaxDimV = 256;

// The first three are those of ElementType.
enum class Kind { kBFloat16, kFloat16, kFloat32, kInt32, kInt64, kOther };

std::int64_t bytes_of(Kind kind) {
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
  bool is_index() const { return kind == Kind::kInt32 || kind == Kind::kInt64; }
};

// How many there are: how tensors are read, 14 tensors, 9 others.
constexpr Py_ssize_t kNumArguments = 24;

// Python's arguments one after the other. Whatever is wrong with one sets Python's error, which is looked at once.
class Arguments {
 public:
  explicit Arguments(PyObject* const* first) : next_(first) {}

  PyObject* object() { return *next_++; }
  bool flag() { return PyObject_IsTrue(object()) == 1; }
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

// How tensors come: as objects, by the interface of their type, or as tuples.
class TensorReader {
 public:
  // None, or (the interface's capsule, torch.Tensor, torch.nn.Parameter).
  explicit TensorReader(PyObject* how) {
    if (how == Py_None) {
      return;
    }
    PyObject* capsule;
    if (PyArg_ParseTuple(how, "OOO", &capsule, &tensor_, &parameter_) != 0) {
      api_ = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
    }
  }

  bool reads_objects() const { return tensor_ != nullptr; }
  bool usable() const {
    return !reads_objects() ||
           (api_ != nullptr && api_->major_version == dlpack::kMajorVersion && api_->view != nullptr);
  }

  View read(PyObject* x) const {
    View view;
    view.given = x != Py_None;
    if (view.given) {
      reads_objects() ? read_object(view, x) : read_tuple(view, x);
    }
    return view;
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
    view.data = static_cast<std::uint8_t*>(tensor.data) + tensor.byte_offset;
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

struct Tensors {
  View q, k, v, g, b, w, o, A_log, dt_bias, states, final_state, cu_seqlens, state_indices,
      num_accepted_tokens;
};

struct Options {
  bool has_scale, use_qk_l2norm, use_gate, has_lower_bound, use_gate_sigmoid, state_v_first, inplace;
  double scale = 0, lower_bound = 0, erase_scale;
};

// Fills the launcher's parameters. False: something is not as the kernel needs it, or as the op's contract has it.
class Parameters {
 public:
  Parameters(Tensors const& tensors, Options const& options) : x_(tensors), options_(options) {}

  bool fill(RecurrentParams& params) {
    params = {};
    fill_sizes(params.shape);
    if (!good_) {
      return false;
    }
    fill_tokens(params);
    fill_gates(params);
    fill_sequences(params);
    fill_states(params);
    return good_;
  }

 private:
  Tensors const& x_;
  Options const& options_;
  bool good_ = true;

  void need(bool condition) { good_ = good_ && condition; }

  void fill_sizes(CallShape& shape) {
    View const &q = x_.q, &v = x_.v, &g = x_.g;
    need(q.device >= 0 && q.ndim == 4 && v.ndim == 4 && g.ndim == 4);
    need(q.kind == Kind::kBFloat16 || q.kind == Kind::kFloat16);
    need(g.kind == q.kind || g.kind == Kind::kFloat32);
    for (View const* other : {&x_.k, &x_.v, &x_.b, &x_.w, &x_.o}) {
      need(other->kind == q.kind);
    }
    for (View const* other : {&x_.k, &v, &g, &x_.b, &x_.w, &x_.o}) {
      need(other->device == q.device);
    }
    need(x_.k.has_shape_of(q) && x_.w.has_shape_of(v) && x_.b.has_shape_of(g) && x_.o.has_shape_of(v));
    std::int64_t const heads = q.shape[2], value_heads = v.shape[2], gate_heads = g.shape[2];
    need(v.shape[0] == q.shape[0] && v.shape[1] == q.shape[1]);
    need(g.has_shape(q.shape[0], q.shape[1], gate_heads, q.shape[3]));
    need(heads > 0 && value_heads > 0 && value_heads % std::max<std::int64_t>(heads, 1) == 0);
    need(gate_heads == heads || gate_heads == value_heads);
    need(q.shape[3] > 0 && q.shape[3] <= kMaxDimK && v.shape[3] > 0 && v.shape[3] <= kMaxDimV);
    shape.element = static_cast<ElementType>(q.kind);
    shape.batch = small(q.shape[0]);
    shape.seqlen = small(q.shape[1]);
    shape.num_heads = small(heads);
    shape.num_gate_heads = small(gate_heads);
    shape.num_value_heads = small(value_heads);
    shape.dim_k = small(q.shape[3]);
    shape.dim_v = small(v.shape[3]);
  }

  std::int32_t small(std::int64_t x) {
    need(x >= 0 && x <= std::numeric_limits<std::int32_t>::max());
    return static_cast<std::int32_t>(x);
  }

  // In bytes. The stride of a dimension of one element is never used, and may be anything.
  std::int64_t stride(View const& view, int dimension) {
    return view.shape[dimension] > 1 ? view.strides[dimension] * bytes_of(view.kind) : 0;
  }
  std::int32_t small_stride(View const& view, int dimension) { return small(stride(view, dimension)); }

  StridedTokens tokens(View const& view) {
    return {.data = view.data,
            .stride_batch = stride(view, 0),
            .stride_token = small_stride(view, 1),
            .stride_head = small_stride(view, 2),
            .stride_channel = small_stride(view, 3)};
  }

  void fill_tokens(RecurrentParams& params) {
    params.q = tokens(x_.q);
    params.k = tokens(x_.k);
    params.v = tokens(x_.v);
    params.g = tokens(x_.g);
    params.b = tokens(x_.b);
    params.w = tokens(x_.w);
    params.o = tokens(x_.o);
    params.gate_element = static_cast<ElementType>(x_.g.kind);
  }

  // A vector of parameters, or null.
  float const* parameter(View const& view, std::int64_t length) {
    if (!view.given) {
      return nullptr;
    }
    need(view.has_shape(length) && view.kind == Kind::kFloat32 && view.device == x_.q.device);
    need(view.strides[0] == 1 || length == 1);
    return reinterpret_cast<float const*>(view.data);
  }

  void fill_gates(RecurrentParams& params) {
    CallShape const& shape = params.shape;
    GateParams& gates = params.gates;
    params.scale = static_cast<float>(options_.has_scale ? options_.scale : std::pow(shape.dim_k, -0.5));
    gates.use_qk_l2norm = options_.use_qk_l2norm;
    gates.decay_gate = !options_.use_gate         ? DecayGate::kNone
                       : options_.has_lower_bound ? DecayGate::kLowerBound
                                                  : DecayGate::kSoftplus;
    gates.A_log = parameter(x_.A_log, shape.num_heads);
    gates.dt_bias = parameter(x_.dt_bias, std::int64_t{shape.num_heads} * shape.dim_k);
    if (options_.use_gate) {
      need(x_.A_log.given || options_.has_lower_bound);
      need(!options_.has_lower_bound || options_.lower_bound < 0);
    } else {
      need(!x_.A_log.given && !x_.dt_bias.given && !options_.has_lower_bound);
    }
    gates.lower_bound = static_cast<float>(options_.lower_bound);
    gates.use_gate_sigmoid = options_.use_gate_sigmoid;
    need(options_.erase_scale == 1 || (options_.erase_scale == 2 && options_.use_gate_sigmoid));
    gates.erase_scale = static_cast<float>(options_.erase_scale);
  }

  // [N] or [N, T]
  IndexTensor indices(View const& view) {
    if (!view.given) {
      return {};
    }
    need(view.is_index() && view.device == x_.q.device);
    return {.data = view.data,
            .stride_sequence = small_stride(view, 0),
            .stride_position = view.ndim == 2 ? small_stride(view, 1) : 0,
            .is_64_bit = view.kind == Kind::kInt64};
  }

  void fill_sequences(RecurrentParams& params) {
    CallShape& shape = params.shape;
    params.cu_seqlens = indices(x_.cu_seqlens);
    shape.num_sequences = shape.batch;
    if (x_.cu_seqlens.given) {
      need(x_.cu_seqlens.ndim == 1 && x_.cu_seqlens.shape[0] >= 2 && shape.batch == 1);
      shape.num_sequences = small(x_.cu_seqlens.shape[0] - 1);
    }
  }

  // v_first: what the caller says of the order of dimensions; what the memory says afterwards, for a transposed view is
  // the other order.
  StateTensor states(View const& view, std::int64_t rows, CallShape const& shape, bool& v_first) {
    if (!view.given) {
      return {};
    }
    int const matrix[] = {v_first ? shape.dim_v : shape.dim_k, v_first ? shape.dim_k : shape.dim_v};
    need(view.has_shape(rows, shape.num_value_heads, matrix[0], matrix[1]) && view.device == x_.q.device);
    bool const transposed = view.strides[3] != 1 && view.shape[3] != 1;
    need(!transposed || view.strides[2] == 1 || view.shape[2] == 1);
    v_first = v_first != transposed;
    return {.data = view.data,
            .stride_slot = view.strides[0] * bytes_of(view.kind),
            .stride_head = small_stride(view, 1),
            .stride_row = small_stride(view, transposed ? 3 : 2)};
  }

  void fill_states(RecurrentParams& params) {
    CallShape& shape = params.shape;
    View const &pool = x_.states, &slots = x_.state_indices, &accepted = x_.num_accepted_tokens;
    bool states_v_first = options_.state_v_first, final_v_first = options_.state_v_first;
    shape.num_slots = pool.given ? small(pool.shape[0]) : 0;
    params.states = states(pool, slots.given ? pool.shape[0] : shape.num_sequences, shape, states_v_first);
    params.state_element = pool.given ? static_cast<ElementType>(pool.kind) : ElementType::kFloat32;
    need(!pool.given || pool.kind == Kind::kFloat32 || (pool.kind == Kind::kBFloat16 && slots.given));
    params.final_state = states(x_.final_state, shape.num_sequences, shape, final_v_first);
    need(!x_.final_state.given || x_.final_state.kind == Kind::kFloat32);
    need(!pool.given || !x_.final_state.given || states_v_first == final_v_first);
    params.state_v_first = pool.given ? states_v_first : final_v_first;

    params.state_indices = indices(slots);
    if (slots.given) {
      need(pool.given && shape.num_slots > 0 && slots.ndim > 0 && slots.shape[0] == shape.num_sequences);
      need(slots.ndim == 1 || (slots.ndim == 2 && slots.shape[1] > 0));
      params.index_columns = slots.ndim == 2 ? small(slots.shape[1]) : 0;
      bool const dense = shape.batch == shape.num_sequences;
      need(slots.ndim == 1 || !dense || shape.seqlen <= params.index_columns);
    }
    params.num_accepted_tokens = indices(accepted);
    need(!accepted.given || (params.index_columns > 0 && accepted.has_shape(shape.num_sequences)));
    params.inplace = options_.inplace;
    need(!options_.inplace || (slots.given && !x_.final_state.given));
  }
};

bool is_current_hopper(int device) {
  int current = -1, major = 0, minor = 0;
  throw_on_error(cudaGetDevice(&current), "recurrent");
  if (current != device) {
    return false;
  }
  throw_on_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "recurrent");
  throw_on_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "recurrent");
  return major == 9 && minor == 0;
}

// Arguments in the order of gdn2_ext/cuda_recurrent.py.
bool launch(Arguments& from) {
  TensorReader const reader(from.object());
  if (!reader.usable()) {
    return false;
  }
  Tensors x;
  for (View* view : {&x.q, &x.k, &x.v, &x.g, &x.b, &x.w, &x.o, &x.A_log, &x.dt_bias, &x.states,
                     &x.final_state, &x.cu_seqlens, &x.state_indices, &x.num_accepted_tokens}) {
    *view = reader.read(from.object());
  }
  Options options;
  options.has_scale = from.number(options.scale);
  options.use_qk_l2norm = from.flag();
  options.use_gate = from.flag();
  options.has_lower_bound = from.number(options.lower_bound);
  options.use_gate_sigmoid = from.flag();
  options.erase_scale = from.number();
  options.state_v_first = from.flag();
  options.inplace = from.flag();
  auto stream = reinterpret_cast<cudaStream_t>(from.integer());
  if (PyErr_Occurred()) {
    if (reader.reads_objects()) {
      PyErr_Clear();  // the caller goes on to say more precisely what is wrong
    }
    return false;
  }
  RecurrentParams params;
  if (!Parameters(x, options).fill(params)) {
    return false;
  }
  if (reader.reads_objects()) {
    if (!is_current_hopper(x.q.device)) {
      return false;
    }
    stream = reader.current_stream(x.q.device);
  }
  pybind11::gil_scoped_release const release;  // a full queue makes a launch wait
  run_recurrent(params, stream);
  return true;
}

PyObject* recurrent_forward(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  if (number != kNumArguments) {
    return PyErr_Format(PyExc_TypeError, "recurrent_forward: expected %zd arguments, got %zd", kNumArguments,
                        number);
  }
  try {
    Arguments from(arguments);
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
     "A decoding step on the current device; see csrc/api/recurrent.h for shapes. False, and nothing launched, where "
     "an argument is not as the kernel needs it."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_recurrent_forward(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) {
    throw pybind11::error_already_set();
  }
}

}  // namespace gdn2
