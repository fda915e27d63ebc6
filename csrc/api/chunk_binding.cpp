// chunk_forward and chunk_backward as plain C functions of Python, which check tensors where they read them: a short call
// takes the GPU twenty microseconds, and asking Python for shapes, strides and addresses takes longer.
#include "api/chunk_binding.h"

#include "api/call_checks.h"
#include "api/chunk_backward.h"
#include "api/chunk_forward.h"

namespace gdn2 {
namespace {

using namespace python;

constexpr std::int64_t kChunk = 64, kSlice = 64;
constexpr std::int64_t kAlignment = 16;       // bytes: what a bulk tensor copy asks of addresses and strides
constexpr std::int64_t kRoomAlignment = 256;  // of what is carved out of the workspace
constexpr std::int64_t kMaxSegments = 65535;  // a grid's height
constexpr std::int64_t kElementBytes = 2;     // of q, and of all tiles

struct CallViews : TokenViews {
  View A_log, dt_bias, initial_state, cu_seqlens, A_minus_I, P, split, workspace;
};

struct ForwardViews : CallViews {
  View final_state, chunk_states;
};

struct BackwardViews : CallViews {
  View d_final_state;  // o is the gradient of the output
  View dq, dk, dv, dg, db, dw, dA_log, d_dt_bias, d_initial_state;
};

struct Options : GateOptions {
  bool state_v_first;
  std::int64_t num_segments;

  explicit Options(Arguments& from)
      : GateOptions(from), state_v_first(from.flag()), num_segments(from.integer()) {}
};

// Carves room out of one allocation. Without an address it only counts.
class Workspace {
 public:
  explicit Workspace(std::uint8_t* first) : first_(first) {}

  template <class T = void>
  T* take(std::int64_t bytes) {
    std::int64_t const at = size_;
    size_ += (bytes + kRoomAlignment - 1) / kRoomAlignment * kRoomAlignment;
    return reinterpret_cast<T*>(first_ == nullptr ? nullptr : first_ + at);
  }
  std::int64_t size() const { return size_; }

 private:
  std::uint8_t* first_;
  std::int64_t size_ = 0;
};

std::int64_t padded_k(CallShape const& shape) {
  return shape.dim_k <= 64 ? 64 : 128;
}

std::int64_t num_slots(std::int64_t batch, std::int64_t seqlen, std::int64_t num_sequences, bool packed) {
  return packed ? seqlen / kChunk + num_sequences : batch * ((seqlen + kChunk - 1) / kChunk);
}

// Room for what a call needs besides its inputs and outputs; A - I and P where the caller does not keep them.
void take_call_room(Workspace& room, CallShape const& shape, bool packed, bool keeps_matrices,
                    ChunkCall& call) {
  std::int64_t const slot_heads = std::int64_t{shape.num_slots} * shape.num_gate_heads;
  call.tiles.factors = room.take(slot_heads * 3 * kChunk * padded_k(shape) * kElementBytes);
  call.tiles.gamma_last = room.take<float>(slot_heads * padded_k(shape) * sizeof(float));
  call.ready = room.take<std::uint32_t>(slot_heads * sizeof(std::uint32_t));
  if (packed) {
    call.plan.slots = room.take<ChunkSlot>(shape.num_slots * sizeof(ChunkSlot));
    call.plan.spans = room.take<SequenceSpan>(shape.num_sequences * sizeof(SequenceSpan));
    call.plan.sequences = room.take<std::int32_t>(shape.num_sequences * sizeof(std::int32_t));
  }
  if (!keeps_matrices) {
    call.tiles.A_minus_I = room.take(slot_heads * kChunk * kChunk * kElementBytes);
    call.tiles.P = room.take(slot_heads * kChunk * kChunk * kElementBytes);
  }
}

// What a split call keeps for its backward: M of the segments and the states that they start from; and the room that
// each direction needs for N and, in the reverse, for gradients like those states.
struct SplitSizes {
  std::int64_t M = 0, states = 0;  // floats

  SplitSizes(CallShape const& shape, std::int64_t num_segments) {
    std::int64_t const rows = shape.num_sequences * std::max<std::int64_t>(num_segments - 1, 0),
                       k = padded_k(shape);
    M = rows * shape.num_gate_heads * k * k;
    states = rows * shape.num_value_heads * shape.dim_v * k;
  }
};

void take_backward_room(Workspace& room, CallShape const& shape, bool use_qk_l2norm, BackwardTiles& tiles,
                        float*& row_norms) {
  std::int64_t const slices =
      std::int64_t{shape.num_slots} * shape.num_value_heads * ((shape.dim_v + kSlice - 1) / kSlice);
  std::int64_t const state = kSlice * padded_k(shape) * kElementBytes,
                     square = kChunk * kSlice * kElementBytes;
  tiles.S = room.take(slices * state);
  tiles.dS = room.take(slices * state);
  tiles.R = room.take(slices * square);
  tiles.dX = room.take(slices * square);
  row_norms = nullptr;
  if (use_qk_l2norm) {
    row_norms =
        room.take<float>(std::int64_t{shape.num_slots} * shape.num_gate_heads * 2 * kChunk * sizeof(float));
  }
}

class Parameters : public CallChecks {
 public:
  Parameters(CallViews const& views, Options const& options) : x_(views), options_(options) {}

  bool fill(ChunkForwardParams& params, ForwardViews const& x) {
    params = {};
    Workspace room(x.workspace.data);
    if (!fill_call(params.call, room)) {
      return false;
    }
    CallShape const& shape = params.call.shape;
    params.o = contiguous(x.o);
    params.final_state = states(x.final_state, shape.num_sequences, shape);
    params.chunk_states = states(x.chunk_states, shape.num_slots, shape);
    if (params.call.num_segments > 1) {
      SplitSizes const sizes(shape, params.call.num_segments);
      params.segment_N = room.take<float>(sizes.states * sizeof(float));
      params.segment_M = split_of(x.split, sizes);
      params.segment_states = params.segment_M + sizes.M;
    }
    need_room(room);
    return good();
  }

  bool fill(ChunkBackwardParams& params, BackwardViews const& x) {
    params = {};
    need(x.A_minus_I.given && x.P.given);
    Workspace room(x.workspace.data);
    if (!good() || !fill_call(params.call, room)) {
      return false;
    }
    CallShape const& shape = params.call.shape;
    take_backward_room(room, shape, options_.use_qk_l2norm, params.tiles, params.row_norms);
    if (params.call.num_segments > 1) {
      SplitSizes const sizes(shape, params.call.num_segments);
      params.segment_N = room.take<float>(sizes.states * sizeof(float));
      params.segment_gradients = room.take<float>(sizes.states * sizeof(float));
      params.segment_M = split_of(x.split, sizes);
      params.segment_states = params.segment_M + sizes.M;
    }
    need_room(room);
    params.dO = tokens(x.o);
    params.d_final_state = states(x.d_final_state, shape.num_sequences, shape);
    params.d_initial_state = states(x.d_initial_state, shape.num_sequences, shape);
    params.dq = summed_gradient(x.dq, shape);
    params.dk = summed_gradient(x.dk, shape);
    params.dv = gradient(x.dv, x.v);
    params.dg = gradient(x.dg, x.g);
    params.db = gradient(x.db, x.b);
    params.dw = gradient(x.dw, x.w);
    params.dA_log = per_slot(x.dA_log, shape);
    params.d_dt_bias = per_slot(x.d_dt_bias, shape);
    return good();
  }

 private:
  CallViews const& x_;
  Options const& options_;

  bool fill_call(ChunkCall& call, Workspace& room) {
    CallShape& shape = call.shape;
    fill_sizes(shape, x_);
    need(shape.batch > 0);
    if (!good()) {
      return false;
    }
    fill_gates(call.gates, call.scale, options_, shape, x_.A_log, x_.dt_bias, x_.q.device);
    fill_sequences(call);
    // Without tokens there is nothing to split.
    call.num_segments = shape.seqlen > 0 ? small(options_.num_segments) : 1;
    need(options_.num_segments >= 1 && options_.num_segments <= kMaxSegments);
    call.q = tokens(x_.q);
    call.k = tokens(x_.k);
    call.v = tokens(x_.v);
    call.g = tokens(x_.g);
    call.b = tokens(x_.b);
    call.w = tokens(x_.w);
    call.gate_element = static_cast<ElementType>(x_.g.kind);
    call.initial_state = states(x_.initial_state, shape.num_sequences, shape);
    call.state_v_first = options_.state_v_first;
    need(x_.A_minus_I.given == x_.P.given);
    take_call_room(room, shape, x_.cu_seqlens.given, x_.P.given, call);
    if (x_.P.given) {
      call.tiles.A_minus_I = matrices(x_.A_minus_I, shape);
      call.tiles.P = matrices(x_.P, shape);
    }
    return good();
  }

  void fill_sequences(ChunkCall& call) {
    CallShape& shape = call.shape;
    View const& offsets = x_.cu_seqlens;
    shape.num_sequences = shape.batch;
    if (offsets.given) {
      need(offsets.is_index() && offsets.device == x_.q.device && offsets.ndim == 1 && offsets.shape[0] >= 2);
      need(offsets.strides[0] == 1 && shape.batch == 1);
      shape.num_sequences = good() ? small(offsets.shape[0] - 1) : 0;
      call.cu_seqlens = offsets.data;
      call.offsets_are_64_bit = offsets.kind == Kind::kInt64;
    }
    shape.num_slots = small(num_slots(shape.batch, shape.seqlen, shape.num_sequences, offsets.given));
  }

  void need_room(Workspace const& room) {
    View const& view = x_.workspace;
    need(view.given && view.ndim == 1 && view.strides[0] == 1 && view.device == x_.q.device);
    need(view.shape[0] * bytes_of(view.kind) >= room.size() &&
         reinterpret_cast<std::uintptr_t>(view.data) % kAlignment == 0);
  }

  // Contiguous channels and strides of whole 16 bytes are read as they are. Without tokens nothing is read.
  TokenTensor tokens(View const& view) {
    if (view.shape[1] == 0) {
      return {};
    }
    std::int64_t const width = kAlignment / bytes_of(view.kind);
    need(view.strides[3] == 1 || view.shape[3] == 1);
    need(reinterpret_cast<std::uintptr_t>(view.data) % kAlignment == 0);
    std::int64_t strides[3];
    for (int i = 0; i < 3; ++i) {
      // The stride of a dimension of one element is never used, but has to be valid.
      strides[i] = view.shape[i] > 1 ? view.strides[i] : width;
      need(strides[i] > 0 && strides[i] % width == 0);
    }
    return {
        .data = view.data, .stride_batch = strides[0], .stride_token = strides[1], .stride_head = strides[2]};
  }

  std::uint8_t* contiguous(View const& view, std::int64_t alignment = kAlignment) {
    bool const empty = std::find(view.shape, view.shape + view.ndim, 0) != view.shape + view.ndim;
    std::int64_t stride = 1;
    for (int i = view.ndim - 1; i >= 0 && !empty; --i) {
      need(view.shape[i] == 1 || view.strides[i] == stride);
      stride *= view.shape[i];
    }
    need(view.device == x_.q.device && reinterpret_cast<std::uintptr_t>(view.data) % alignment == 0);
    return view.data;
  }

  // [rows, HV, K, V] float32, or [.., V, K] where state_v_first; or null.
  float* states(View const& view, std::int64_t rows, CallShape const& shape) {
    if (!view.given) {
      return nullptr;
    }
    bool const v_first = options_.state_v_first;
    need(view.has_shape(rows, shape.num_value_heads, v_first ? shape.dim_v : shape.dim_k,
                        v_first ? shape.dim_k : shape.dim_v));
    need(view.kind == Kind::kFloat32);
    return reinterpret_cast<float*>(contiguous(view, sizeof(float)));
  }

  // M and first states of segments, one after the other.
  float* split_of(View const& view, SplitSizes const& sizes) {
    need(view.given && view.has_shape(sizes.M + sizes.states) && view.kind == Kind::kFloat32);
    return reinterpret_cast<float*>(contiguous(view));
  }

  // [slots, gate heads, 64, 64]
  void* matrices(View const& view, CallShape const& shape) {
    need(view.has_shape(shape.num_slots, shape.num_gate_heads, kChunk, kChunk) && view.kind == x_.q.kind);
    return contiguous(view);
  }

  // Of an input and like it; or null.
  void* gradient(View const& view, View const& input) {
    if (!view.given) {
      return nullptr;
    }
    need(view.has_shape_of(input) && view.kind == input.kind);
    return contiguous(view);
  }

  // Of q or k; float32 and for every gate head, where those are more; or null.
  void* summed_gradient(View const& view, CallShape const& shape) {
    if (shape.num_gate_heads == shape.num_heads || !view.given) {
      return gradient(view, x_.q);
    }
    need(view.has_shape(shape.batch, shape.seqlen, shape.num_gate_heads, shape.dim_k));
    need(view.kind == Kind::kFloat32);
    return contiguous(view);
  }

  // [slots, gate heads, K] float32; or null.
  float* per_slot(View const& view, CallShape const& shape) {
    if (!view.given) {
      return nullptr;
    }
    need(view.has_shape(shape.num_slots, shape.num_gate_heads, shape.dim_k) && view.kind == Kind::kFloat32);
    return reinterpret_cast<float*>(contiguous(view));
  }
};

// Reads tensors and options in the order of gdn2_ext/cuda_backend.py, and launches.
template <class Views, class Params, std::size_t kNumViews>
bool launch(Arguments& from, View Views::* const (&order)[kNumViews],
            void (*run)(Params const&, cudaStream_t)) {
  TensorReader const reader(from.object());
  if (!reader.usable()) {
    return false;
  }
  Views x;
  for (auto const view : order) {
    x.*view = reader.read(from.object());
  }
  Options const options(from);
  auto stream = reinterpret_cast<cudaStream_t>(from.integer());
  if (PyErr_Occurred()) {
    if (reader.reads_objects()) {
      PyErr_Clear();  // the caller goes on to say more precisely what is wrong
    }
    return false;
  }
  Params params;
  if (!Parameters(x, options).fill(params, x)) {
    return false;
  }
  if (reader.reads_objects()) {
    if (!is_current_hopper(x.q.device)) {
      return false;
    }
    stream = reader.current_stream(x.q.device);
  }
  pybind11::gil_scoped_release const release;  // a full queue makes a launch wait
  run(params, stream);
  return true;
}

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
                                       &F::A_minus_I,
                                       &F::P,
                                       &F::split,
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
                                        &B::A_minus_I,
                                        &B::P,
                                        &B::split,
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

constexpr Py_ssize_t kNumOthers = 10;  // how tensors are read, 8 options, the stream

PyObject* chunk_forward_of_python(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return call_kernel("chunk_forward", arguments, number, std::size(kForwardOrder) + kNumOthers,
                     [](Arguments& from) { return launch<F>(from, kForwardOrder, chunk_forward); });
}

PyObject* chunk_backward_of_python(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  return call_kernel("chunk_backward", arguments, number, std::size(kBackwardOrder) + kNumOthers,
                     [](Arguments& from) { return launch<B>(from, kBackwardOrder, chunk_backward); });
}

// (batch, seqlen, num_sequences, gate heads, value heads, K, V, packed, keeps A - I and P, backward, L2 norm, segments)
// to bytes.
PyObject* workspace_bytes(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  if (number != 12) {
    return PyErr_Format(PyExc_TypeError, "chunk_workspace_bytes: expected 12 arguments, got %zd", number);
  }
  Arguments from(arguments);
  std::int64_t const batch = from.integer(), seqlen = from.integer(), sequences = from.integer();
  CallShape shape{};
  shape.num_sequences = static_cast<std::int32_t>(sequences);
  shape.num_gate_heads = static_cast<std::int32_t>(from.integer());
  shape.num_value_heads = static_cast<std::int32_t>(from.integer());
  shape.dim_k = static_cast<std::int32_t>(from.integer());
  shape.dim_v = static_cast<std::int32_t>(from.integer());
  bool const packed = from.flag(), keeps_matrices = from.flag(), backward = from.flag(), norms = from.flag();
  std::int64_t const num_segments = from.integer();
  if (PyErr_Occurred()) {
    return nullptr;
  }
  shape.num_slots = static_cast<std::int32_t>(num_slots(batch, seqlen, sequences, packed));
  Workspace room(nullptr);
  ChunkCall call;
  take_call_room(room, shape, packed, keeps_matrices, call);
  if (backward) {
    BackwardTiles tiles;
    float* row_norms;
    take_backward_room(room, shape, norms, tiles, row_norms);
  }
  // N, and in the backward gradients.
  room.take(num_segments > 1 ? SplitSizes(shape, num_segments).states * sizeof(float) : 0);
  room.take(num_segments > 1 && backward ? SplitSizes(shape, num_segments).states * sizeof(float) : 0);
  return PyLong_FromLongLong(room.size());
}

template <class Function>
PyMethodDef method(char const* name, Function* function, char const* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    method(
        "chunk_forward", &chunk_forward_of_python,
        "The chunk forward on the current device. False, and nothing launched, where an argument is not as the "
        "kernels need it."),
    method(
        "chunk_backward", &chunk_backward_of_python,
        "The chunk backward on the current device. False, and nothing launched, where an argument is not as the "
        "kernels need it."),
    method("chunk_workspace_bytes", &workspace_bytes, "The least size of the workspace of either."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_chunk_functions(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) {
    throw pybind11::error_already_set();
  }
}

}  // namespace gdn2
