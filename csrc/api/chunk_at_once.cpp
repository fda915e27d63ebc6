#include "api/chunk_at_once.h"

#include <array>

#include "api/chunk_checks.h"
#include "api/device.h"
#include "api/sequence_split.h"

namespace gdn2 {
namespace {

namespace py = pybind11;
using namespace python;

constexpr std::size_t kNumInputs = std::size(kInputs);
constexpr std::size_t kNumGradients = kNumInputs - 1;  // none for cu_seqlens

// Makes what the caller gets, by PyTorch's own functions: a tensor that came through DLPack would not hear of
// the streams that it is used on (Tensor.record_stream). Throws Python's errors.
class TensorMaker {
 public:
  // (empty_like(x), new_empty(x, shape), new_empty_float32(x, shape))
  explicit TensorMaker(PyObject* how) {
    if (!PyTuple_Check(how) || PyTuple_GET_SIZE(how) != 3) {
      throw py::type_error("expected three functions that make tensors");
    }
    empty_like_ = PyTuple_GET_ITEM(how, 0);
    new_empty_ = PyTuple_GET_ITEM(how, 1);
    new_empty_float32_ = PyTuple_GET_ITEM(how, 2);
  }

  // Of x's shape, type and device, without gaps.
  py::object like(PyObject* x, View const& view) const {
    if (view.is_contiguous()) {  // empty_like keeps other orders of dimensions, and is called sooner
      return checked(PyObject_CallOneArg(empty_like_, x));
    }
    return make(new_empty_, x, view.shape, view.shape + view.ndim);
  }

  // Of x's type and device.
  py::object empty(PyObject* x, std::int64_t size) const { return make(new_empty_, x, &size, &size + 1); }

  template <class... Sizes>
  py::object empty_float32(PyObject* x, Sizes... sizes) const {
    std::array const shape{static_cast<std::int64_t>(sizes)...};
    return make(new_empty_float32_, x, shape.begin(), shape.end());
  }

 private:
  PyObject *empty_like_, *new_empty_, *new_empty_float32_;

  static py::object make(PyObject* function, PyObject* x, std::int64_t const* first,
                         std::int64_t const* last) {
    py::tuple shape(last - first);
    for (std::int64_t i = 0; i < last - first; ++i) {
      shape[i] = first[i];
    }
    PyObject* const arguments[] = {x, shape.ptr()};
    return checked(PyObject_Vectorcall(function, arguments, 2, nullptr));
  }

  static py::object checked(PyObject* made) {
    if (made == nullptr) {
      throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(made);
  }
};

// Where inputs lie and what they are, in the order of kInputs.
struct Inputs {
  std::array<PyObject*, kNumInputs> objects;

  Inputs(Arguments& from, TensorReader const& reader, CallViews& x) {
    for (std::size_t i = 0; i < kNumInputs; ++i) {
      objects[i] = from.object();
      x.*kInputs[i] = reader.read(objects[i]);
    }
  }
  PyObject* q() const { return objects[0]; }
  PyObject* v() const { return objects[2]; }
  PyObject* initial_state() const { return objects[8]; }
};

// Whether the arguments, all read now, are of a call that the kernels take; what is wrong with one that they
// do not, the caller goes on to say more precisely. Where Python asked for 0 segments they are as many as are
// quickest, and in any case one where a forward has kept no more than all do.
bool takes(Parameters& parameters, ChunkCall& call, CallViews const& x) {
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  CallShape const& shape = call.shape;
  if (!parameters.fill(call) || shape.seqlen == 0 || !is_current_hopper(x.q.device)) {
    return false;
  }
  call.gpu = gpu(x.q.device);
  if (x.kept.given && x.kept.shape[0] * kKeptBytes == least_kept_size(call)) {
    call.num_segments = 1;
  } else if (call.num_segments == 0) {
    call.num_segments = num_segments(split_choice(call));
  }
  return true;
}

// take(room) carves all that the kernels use among themselves, run(stream) launches.
template <class Take, class Run>
void launch(TensorReader const& reader, TensorMaker const& maker, PyObject* q, int device, Take take,
            Run run) {
  Workspace needed(nullptr);
  take(needed);
  cudaStream_t const stream = reader.current_stream(device);
  if (needed.size() == 0) {
    py::gil_scoped_release_simple const release;
    run(stream);
    return;
  }
  // A workspace that is no object of Python's costs half as much. PyTorch's own function says best why there
  // is none.
  Memory const memory = reader.allocate(needed.size(), device);
  py::object const tensor = memory ? py::object() : maker.empty(q, needed.size() / kElementBytes);
  Workspace room(memory ? address_of(memory->tensor) : reader.read(tensor.ptr()).data);
  take(room);
  py::gil_scoped_release_simple const release;  // a full queue makes a launch wait
  run(stream);
}

py::object forward(Arguments& from, TensorReader const& reader, TensorMaker const& maker) {
  ForwardViews x;
  Inputs const inputs(from, reader, x);
  Options const options(from);
  bool const output_final_state = from.flag(), keep = from.flag(), keep_tiles = from.flag();
  Parameters parameters(x, options);
  ChunkForwardParams params{};
  ChunkCall& call = params.call;
  if (!takes(parameters, call, x)) {
    return py::none();
  }

  CallShape const& shape = call.shape;
  py::object final_state = py::none(), kept;
  py::object o = maker.like(inputs.v(), x.v);
  x.o = reader.read(o.ptr());
  if (output_final_state) {
    final_state = x.initial_state.given ? maker.like(inputs.initial_state(), x.initial_state)
                  : options.state_v_first
                      ? maker.empty_float32(inputs.q(), shape.num_sequences, shape.num_value_heads,
                                            shape.dim_v, shape.dim_k)
                      : maker.empty_float32(inputs.q(), shape.num_sequences, shape.num_value_heads,
                                            shape.dim_k, shape.dim_v);
    x.final_state = reader.read(final_state.ptr());
  }
  if (keep) {
    Workspace needed(nullptr);
    take_kept(needed, params, keep_tiles || keeps_tiles(shape, call.num_segments));
    kept = maker.empty_float32(inputs.q(), needed.size() / kKeptBytes);
    x.kept = reader.read(kept.ptr());
  }
  if (!parameters.fill(params, x)) {
    return py::none();
  }
  launch(
      reader, maker, inputs.q(), x.q.device,
      [&](Workspace& room) { take_room(room, params, x.cu_seqlens.given, keep); },
      [&](cudaStream_t stream) { chunk_forward(params, stream); });
  if (!keep) {
    return py::make_tuple(o, final_state);
  }
  return py::make_tuple(o, final_state, kept);
}

// Where the kernels write a gradient. With gates per value head those of q and k are float32 and of every one
// of them, to be summed.
py::object new_gradient(TensorMaker const& maker, Inputs const& inputs, std::size_t n, View const& input,
                        CallShape const& shape) {
  View CallViews::* const which = kInputs[n];
  if ((which == kInputs[0] || which == kInputs[1]) && shape.num_gate_heads != shape.num_heads) {
    return maker.empty_float32(inputs.q(), shape.batch, shape.seqlen, shape.num_gate_heads, shape.dim_k);
  }
  return maker.like(inputs.objects[n], input);
}

constexpr View BackwardViews::* kGradients[kNumGradients] = {
    &BackwardViews::dq,     &BackwardViews::dk,        &BackwardViews::dv,
    &BackwardViews::dg,     &BackwardViews::db,        &BackwardViews::dw,
    &BackwardViews::dA_log, &BackwardViews::d_dt_bias, &BackwardViews::d_initial_state};

py::object backward(Arguments& from, TensorReader const& reader, TensorMaker const& maker) {
  BackwardViews x;
  x.o = reader.read(from.object());
  x.d_final_state = reader.read(from.object());
  Inputs const inputs(from, reader, x);
  x.kept = reader.read(from.object());
  Options const options(from);
  std::array<bool, kNumGradients> needed;
  for (bool& asked : needed) {
    asked = from.flag();
  }
  Parameters parameters(x, options);
  ChunkBackwardParams params{};
  ChunkCall& call = params.call;
  if (!takes(parameters, call, x)) {
    return py::none();
  }

  py::tuple gradients(kNumGradients);
  for (std::size_t n = 0; n < kNumGradients; ++n) {
    View const& input = x.*kInputs[n];
    py::object gradient = py::none();
    if (needed[n] && input.given) {
      gradient = new_gradient(maker, inputs, n, input, call.shape);
      x.*kGradients[n] = reader.read(gradient.ptr());
    }
    gradients[n] = std::move(gradient);
  }
  if (!parameters.fill(params, x)) {
    return py::none();
  }
  launch(
      reader, maker, inputs.q(), x.q.device,
      [&](Workspace& room) { take_room(room, params, x.cu_seqlens.given); },
      [&](cudaStream_t stream) { chunk_backward(params, stream); });
  return gradients;
}

// A function of Python's that is body(arguments, reader, maker): the first arguments say how tensors are read
// and made.
template <class Body>
PyObject* call_at_once(char const* name, PyObject* const* arguments, Py_ssize_t given, Py_ssize_t number,
                       Body body) {
  return call_kernel(name, arguments, given, number, [&](Arguments& from) -> py::object {
    TensorReader const reader(from.object());
    TensorMaker const maker(from.object());
    return reader.usable() ? body(from, reader, maker) : py::none();
  });
}

// How tensors are read and made, 10 inputs, 8 options; and output_final_state, keep, keep tiles.
constexpr Py_ssize_t kNumForward = 2 + kNumInputs + 8 + 3;
// The same; and do, d_final_state, what is kept, which gradients are needed.
constexpr Py_ssize_t kNumBackward = 2 + kNumInputs + 8 + 3 + kNumGradients;

}  // namespace

PyObject* chunk_forward_at_once(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return call_at_once("chunk_forward_at_once", arguments, number, kNumForward, forward);
}

PyObject* chunk_backward_at_once(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return call_at_once("chunk_backward_at_once", arguments, number, kNumBackward, backward);
}

}  // namespace gdn2
