// recurrent_forward as a plain C function of Python: a decoding step is called once a layer, and asking
// Python for the shapes, strides, types and addresses of a dozen tensors takes longer than the kernel.
#include "api/recurrent_binding.h"

#include "api/call_checks.h"
#include "api/recurrent.h"

namespace gdn2 {
namespace {

using namespace python;

// How many there are: how tensors are read, 14 tensors, 9 others.
constexpr Py_ssize_t kNumArguments = 24;

struct Tensors : TokenViews {
  View A_log, dt_bias, states, final_state, cu_seqlens, state_indices, num_accepted_tokens;
};

struct Options : GateOptions {
  bool state_v_first, inplace;

  explicit Options(Arguments& from) : GateOptions(from), state_v_first(from.flag()), inplace(from.flag()) {}
};

// Fills the launcher's parameters. False: something is not as the kernel needs it, or as the op's contract
// has it.
class Parameters : public CallChecks {
 public:
  Parameters(Tensors const& tensors, Options const& options) : x_(tensors), options_(options) {}

  bool fill(RecurrentParams& params) {
    params = {};
    fill_sizes(params.shape, x_);
    need_output(x_.o, x_.v);
    if (!good()) {
      return false;
    }
    fill_tokens(params, x_, [this](View const& view) { return tokens(view); });
    params.o = tokens(x_.o);
    fill_gates(params.gates, params.scale, options_, params.shape, x_.A_log, x_.dt_bias, x_.q.device);
    fill_sequences(params);
    fill_states(params);
    return good();
  }

 private:
  Tensors const& x_;
  Options const& options_;

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

  // v_first: what the caller says of the order of dimensions; what the memory says afterwards, for a
  // transposed view is the other order.
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
  Options const options(from);
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
  return call_kernel("recurrent_forward", arguments, number, kNumArguments, launch);
}

PyMethodDef methods[] = {
    method("recurrent_forward", &recurrent_forward,
           "A decoding step on the current device; see csrc/api/recurrent.h for shapes. False, and nothing "
           "launched, where an argument is not as the kernel needs it."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_recurrent_forward(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) {
    throw pybind11::error_already_set();
  }
}

}  // namespace gdn2
