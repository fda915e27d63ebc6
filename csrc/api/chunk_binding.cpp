// chunk_forward and chunk_backward as plain C functions of Python, for the operators: tensors come as tuples,
// and the caller has made all of them. And what the caller needs for that.
#include "api/chunk_binding.h"

#include "api/chunk_at_once.h"
#include "api/chunk_checks.h"
#include "api/device.h"
#include "api/sequence_split.h"
#include "sm90/chunk_order.h"

namespace gdn2 {
namespace {

using namespace python;

using F = ForwardViews;
constexpr View F::* kForwardOrder[] = {&F::q,
                                       &F::k,
                                       &F::v,
                                       &F::g,
                                       &F::b,
                                       &F::w,
                                       &F::A_log,
                                       &F::dt_bias,
                                       &F::initial_state,
                                       &F::cu_seqlens,
                                       &F::o,
                                       &F::final_state,
                                       &F::chunk_states,
                                       &F::kept,
                                       &F::workspace};

using B = BackwardViews;
constexpr View B::* kBackwardOrder[] = {&B::o,
                                        &B::d_final_state,
                                        &B::q,
                                        &B::k,
                                        &B::v,
                                        &B::g,
                                        &B::b,
                                        &B::w,
                                        &B::A_log,
                                        &B::dt_bias,
                                        &B::initial_state,
                                        &B::cu_seqlens,
                                        &B::kept,
                                        &B::workspace,
                                        &B::dq,
                                        &B::dk,
                                        &B::dv,
                                        &B::dg,
                                        &B::db,
                                        &B::dw,
                                        &B::dA_log,
                                        &B::d_dt_bias,
                                        &B::d_initial_state};

void take_all_room(Workspace& room, ChunkForwardParams& params, ForwardViews const& x) {
  take_room(room, params, x.cu_seqlens.given, x.kept.given);
}
void take_all_room(Workspace& room, ChunkBackwardParams& params, BackwardViews const& x) {
  take_room(room, params, x.cu_seqlens.given);
}

// Reads tensors and options in the order of gdn2_ext/cuda_backend.py, and launches.
template <class Views, class Params, std::size_t kNumViews>
bool launch(Arguments& from, View Views::* const (&order)[kNumViews],
            void (*run)(Params const&, cudaStream_t)) {
  TensorReader const reader(Py_None);
  Views x;
  for (auto const view : order) {
    x.*view = reader.read(from.object());
  }
  Options const options(from);
  auto const stream = reinterpret_cast<cudaStream_t>(from.integer());
  Parameters parameters(x, options);
  Params params{};
  if (PyErr_Occurred() || !parameters.fill(params.call) || !parameters.fill(params, x)) {
    return false;
  }
  Workspace needed(nullptr), room(x.workspace.data);
  take_all_room(needed, params, x);
  if (!parameters.has_room(needed.size())) {
    return false;
  }
  take_all_room(room, params, x);
  params.call.gpu = gpu(current_device());
  pybind11::gil_scoped_release const release;  // a full queue makes a launch wait
  run(params, stream);
  return true;
}

constexpr Py_ssize_t kNumOthers = 9;  // 8 options, the stream

PyObject* forward_of_python(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return call_kernel("chunk_forward", arguments, number, std::size(kForwardOrder) + kNumOthers,
                     [](Arguments& from) { return launch<F>(from, kForwardOrder, chunk_forward); });
}

PyObject* backward_of_python(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return call_kernel("chunk_backward", arguments, number, std::size(kBackwardOrder) + kNumOthers,
                     [](Arguments& from) { return launch<B>(from, kBackwardOrder, chunk_backward); });
}

// (batch, seqlen, num_sequences, gate heads, value heads, K, V, packed, keeps, backward, segments, keeps
// tiles) to bytes.
PyObject* workspace_bytes(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  if (number != 12) {
    return PyErr_Format(PyExc_TypeError, "chunk_workspace_bytes: expected 12 arguments, got %zd", number);
  }
  Arguments from(arguments);
  std::int64_t const batch = from.integer(), seqlen = from.integer(), sequences = from.integer();
  ChunkCall call{};
  CallShape& shape = call.shape;
  shape.num_sequences = static_cast<std::int32_t>(sequences);
  shape.num_gate_heads = static_cast<std::int32_t>(from.integer());
  shape.num_value_heads = static_cast<std::int32_t>(from.integer());
  shape.dim_k = static_cast<std::int32_t>(from.integer());
  shape.dim_v = static_cast<std::int32_t>(from.integer());
  bool const packed = from.flag(), keeps = from.flag(), backward = from.flag();
  call.num_segments = static_cast<int>(from.integer());
  bool const keeps_tiles = from.flag();
  if (PyErr_Occurred()) {
    return nullptr;
  }
  shape.num_slots = static_cast<std::int32_t>(num_slots(batch, seqlen, sequences, packed));
  Workspace room(nullptr);
  ChunkForwardParams forward_params{};
  ChunkBackwardParams backward_params{};
  forward_params.call = backward_params.call = call;
  forward_params.keeps_tiles = backward_params.has_tiles = keeps_tiles;
  backward ? take_room(room, backward_params, packed) : take_room(room, forward_params, packed, keeps);
  return PyLong_FromLongLong(room.size());
}

// (seqlen, num_sequences, gate heads, value heads, K, V, packed, SMs, memory bandwidth) to what choose
// makes of them.
template <int (*choose)(SplitChoice const&)>
PyObject* choice_of_python(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  if (number != 9) {
    return PyErr_Format(PyExc_TypeError, "expected 9 arguments, got %zd", number);
  }
  Arguments from(arguments);
  SplitChoice const call{.seqlen = from.integer(),
                         .num_sequences = from.integer(),
                         .num_gate_heads = from.integer(),
                         .num_value_heads = from.integer(),
                         .dim_k = from.integer(),
                         .dim_v = from.integer(),
                         .packed = from.flag(),
                         .gpu = {.num_sms = static_cast<int>(from.integer()),
                                 .memory_bandwidth = static_cast<int>(from.integer())}};
  return PyErr_Occurred() ? nullptr : PyLong_FromLong(choose(call));
}

PyObject* gpu_of_python(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return call_kernel("gpu", arguments, number, 1, [](Arguments& from) {
    Gpu const found = gpu(static_cast<int>(from.integer()));
    return pybind11::object(pybind11::make_tuple(found.num_sms, found.memory_bandwidth));
  });
}

template <ChunkOrder kOrder>
PyObject* chunk_order(int batch, int num_chunks, int num_segments) {
  DenseChunks const chunks(batch, num_chunks, num_segments);
  PyObject* const slots = PyList_New(batch * num_chunks);
  for (int i = 0; slots != nullptr && i < batch * num_chunks; ++i) {
    int of_batch, chunk;
    PyList_SET_ITEM(slots, i, PyLong_FromLong(chunks.find<kOrder>(i, of_batch, chunk)));
  }
  return slots;
}

// The same of whole sequences, as a grid of sequences and ranks finds them.
template <ChunkOrder kOrder>
PyObject* grid_order(int batch, int num_chunks, int) {
  DenseChunks const chunks(batch, num_chunks, 1);
  PyObject* const slots = PyList_New(batch * num_chunks);
  for (int i = 0; slots != nullptr && i < batch * num_chunks; ++i) {
    int const slot = i % batch * num_chunks + chunks.chunk_of_rank<kOrder>(i / batch);
    PyList_SET_ITEM(slots, i, PyLong_FromLong(slot));
  }
  return slots;
}

PyObject* chunk_order_of_python(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  if (number != 5) {
    return PyErr_Format(PyExc_TypeError, "chunk_order: expected 5 arguments, got %zd", number);
  }
  Arguments from(arguments);
  auto const batch = static_cast<int>(from.integer()), num_chunks = static_cast<int>(from.integer()),
             num_segments = static_cast<int>(from.integer());
  PyObject* const order = from.object();
  bool const as_grid = from.flag();
  if (PyErr_Occurred()) {
    return nullptr;
  }
  using Slots = PyObject* (*)(int batch, int num_chunks, int num_segments);
  auto const either = [&](Slots in_a_row, Slots of_grid) { return as_grid ? of_grid : in_a_row; };
  for (auto const& [name, slots] :
       {std::pair{"up", either(&chunk_order<ChunkOrder::kUp>, &grid_order<ChunkOrder::kUp>)},
        std::pair{"down", either(&chunk_order<ChunkOrder::kDown>, &grid_order<ChunkOrder::kDown>)},
        std::pair{"inwards", either(&chunk_order<ChunkOrder::kInwards>, &grid_order<ChunkOrder::kInwards>)},
        std::pair{"outwards",
                  either(&chunk_order<ChunkOrder::kOutwards>, &grid_order<ChunkOrder::kOutwards>)}}) {
    if (PyUnicode_Check(order) && PyUnicode_CompareWithASCIIString(order, name) == 0) {
      return slots(batch, num_chunks, num_segments);
    }
  }
  return PyErr_Format(PyExc_ValueError, "chunk_order: unknown order %R", order);
}

PyMethodDef methods[] = {
    method(
        "chunk_forward", &forward_of_python,
        "The chunk forward on the current device. False, and nothing launched, where an argument is not as "
        "the kernels need it."),
    method(
        "chunk_backward", &backward_of_python,
        "The chunk backward on the current device. False, and nothing launched, where an argument is not as "
        "the kernels need it."),
    method("chunk_workspace_bytes", &workspace_bytes, "The least size of the workspace of either."),
    method("gpu", &gpu_of_python, "(number of SMs, memory bandwidth in GB/s) of a device."),
    method("num_segments", &choice_of_python<num_segments>,
           "Into how many segments sequences are cut by default."),
    method("sms_beside_scan", &choice_of_python<sms_beside_scan>,
           "On how many SMs prepare runs beside scan where sequences stay whole; 0: before it."),
    method("chunk_order", &chunk_order_of_python,
           "(batch, chunks, segments, \"up\", \"down\", \"inwards\" or \"outwards\", as a grid of whole "
           "sequences) to slots, in the order in which kernels take them."),
    method(
        "chunk_forward_at_once", &chunk_forward_at_once,
        "The chunk forward of plain tensors on the current device: (o, final_state or None), and with keep "
        "also what is kept for the backward. None, and nothing done, where an argument is not as the kernels "
        "need it."),
    method("chunk_backward_at_once", &chunk_backward_at_once,
           "The chunk backward of the same: a tuple of gradients, with None for those that nobody asked for. "
           "None, and nothing done, where an argument is not as the kernels need it."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_chunk_functions(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) {
    throw pybind11::error_already_set();
  }
  module.attr("MOST_TILES_KEPT") = kMostTilesKept;
}

}  // namespace gdn2
