// What a chunk call is checked for where it comes from Python, and the launchers' parameters that it becomes.
#pragma once

#include "api/call_checks.h"
#include "api/chunk_room.h"

namespace gdn2::python {

constexpr std::int64_t kAlignment = 16;       // bytes: what a bulk tensor copy asks of addresses and strides
constexpr std::int64_t kTileAlignment = 128;  // what images of shared memory ask, for their permutation
constexpr std::int64_t kMaxSegments = 65535;  // a grid's height

struct CallViews : TokenViews {
  View A_log, dt_bias, initial_state, cu_seqlens, kept, workspace;
};

struct ForwardViews : CallViews {
  View final_state, chunk_states;
};

struct BackwardViews : CallViews {
  View d_final_state;  // o is the gradient of the output
  View dq, dk, dv, dg, db, dw, dA_log, d_dt_bias, d_initial_state;
};

// The inputs in the order of gdn2_ext/cuda_backend.py.
constexpr View CallViews::* kInputs[] = {
    &CallViews::q,         &CallViews::k,       &CallViews::v,
    &CallViews::g,         &CallViews::b,       &CallViews::w,
    &CallViews::A_log,     &CallViews::dt_bias, &CallViews::initial_state,
    &CallViews::cu_seqlens};

struct Options : GateOptions {
  bool state_v_first;
  std::int64_t num_segments;

  explicit Options(Arguments& from)
      : GateOptions(from), state_v_first(from.flag()), num_segments(from.integer()) {}
};

class Parameters : public CallChecks {
 public:
  Parameters(CallViews const& views, Options const& options) : x_(views), options_(options) {}

  // The inputs. What the kernels use among themselves has no room yet.
  bool fill(ChunkCall& call) {
    call = {};
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
    need(options_.num_segments >= 0 && options_.num_segments <= kMaxSegments);
    fill_tokens(call, x_, [this](View const& view) { return tokens(view); });
    call.initial_state = states(x_.initial_state, shape.num_sequences, shape);
    call.state_v_first = options_.state_v_first;
    return good();
  }

  // Outputs, and what is kept for the backward. The inputs have been filled in.
  bool fill(ChunkForwardParams& params, ForwardViews const& x) {
    CallShape const& shape = params.call.shape;
    need(params.call.num_segments >= 1);
    need_output(x.o, x.v);
    params.o = contiguous(x.o);
    params.final_state = states(x.final_state, shape.num_sequences, shape);
    params.chunk_states = states(x.chunk_states, shape.num_slots, shape);
    if (x.kept.given) {
      params.keeps_tiles = fill_kept(params);
    }
    return good();
  }

  // Outputs, and what the forward has kept. The inputs have been filled in.
  bool fill(ChunkBackwardParams& params, BackwardViews const& x) {
    CallShape const& shape = params.call.shape;
    need(params.call.num_segments >= 1);
    need_output(x.o, x.v);
    need(x.kept.given);
    if (!good()) {
      return false;
    }
    params.has_tiles = fill_kept(params);
    params.dO = tokens(x.o);
    params.d_final_state = states(x.d_final_state, shape.num_sequences, shape);
    params.d_initial_state = states(x.d_initial_state, shape.num_sequences, shape);
    params.dq = summed_gradient(x.dq, shape);
    params.dk = summed_gradient(x.dk, shape);
    params.dv = gradient(x.dv, x.v);
    params.dg = gradient(x.dg, x.g);
    params.db = gradient(x.db, x.b);
    params.dw = gradient(x.dw, x.w);
    params.dA_log = reinterpret_cast<float*>(gradient(x.dA_log, x.A_log));
    params.d_dt_bias = reinterpret_cast<float*>(gradient(x.d_dt_bias, x.dt_bias));
    return good();
  }

  // A workspace of the caller's.
  bool has_room(std::int64_t bytes) {
    View const& view = x_.workspace;
    need(view.given && view.ndim == 1 && view.strides[0] == 1 && view.device == x_.q.device);
    need(view.shape[0] * bytes_of(view.kind) >= bytes &&
         reinterpret_cast<std::uintptr_t>(view.data) % kTileAlignment == 0);
    return good();
  }

 private:
  CallViews const& x_;
  Options const& options_;

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
    need(view.is_contiguous() && view.device == x_.q.device);
    need(reinterpret_cast<std::uintptr_t>(view.data) % alignment == 0);
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

  // Where the parts of what a forward keeps lie. Whether prepare's tiles are among them, which its size says.
  template <class Params>
  bool fill_kept(Params& params) {
    View const& view = x_.kept;
    need(view.kind == Kind::kFloat32 && view.ndim == 1);
    std::uint8_t* const first = contiguous(view, kTileAlignment);
    auto const fits = [&](bool tiles) {
      Workspace room(first);
      take_kept(room, params, tiles);
      return room.size() == view.shape[0] * kKeptBytes;
    };
    if (fits(false)) {
      return false;
    }
    need(fits(true));
    return true;
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
};

}  // namespace gdn2::python
