// gdn2_ext._C. Addresses, sizes, strides and the stream come as integers: nothing here knows torch, so the
// module works with every version of it. Device guard, dtypes and shapes are the caller's business
// (gdn2_ext/cuda_backend.py).
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "api/chunk_backward.h"
#include "api/chunk_forward.h"
#include "api/recurrent_binding.h"
#include "api/tile_product.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Address = std::uintptr_t;
// address, and strides of batch, token and head in elements
using TokenTensorTuple = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

gdn2::TokenTensor token_tensor(TokenTensorTuple const& x) {
  return {pointer<void const>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

// Arguments in the order of gdn2_ext/cuda_backend.py; addresses of absent tensors are 0.
gdn2::ChunkCall make_chunk_call(
    int element, int gate_element, std::int32_t batch, std::int32_t seqlen, std::int32_t num_sequences,
    std::int32_t num_heads, std::int32_t num_gate_heads, std::int32_t num_value_heads, std::int32_t dim_k,
    std::int32_t dim_v, std::int32_t num_slots, TokenTensorTuple const& q, TokenTensorTuple const& k,
    TokenTensorTuple const& v, TokenTensorTuple const& g, TokenTensorTuple const& b,
    TokenTensorTuple const& w, Address A_log, Address dt_bias, Address initial_state, Address cu_seqlens,
    bool offsets_are_64_bit, Address plan_slots, Address plan_spans, Address factors, Address gamma_last,
    Address A_minus_I, Address P, float scale, bool use_qk_l2norm, int decay_gate, float lower_bound,
    bool use_gate_sigmoid, float erase_scale, bool state_v_first) {
  return {.shape = {.element = static_cast<gdn2::ElementType>(element),
                    .batch = batch,
                    .seqlen = seqlen,
                    .num_sequences = num_sequences,
                    .num_heads = num_heads,
                    .num_gate_heads = num_gate_heads,
                    .num_value_heads = num_value_heads,
                    .dim_k = dim_k,
                    .dim_v = dim_v,
                    .num_slots = num_slots},
          .q = token_tensor(q),
          .k = token_tensor(k),
          .g = token_tensor(g),
          .b = token_tensor(b),
          .v = token_tensor(v),
          .w = token_tensor(w),
          .gate_element = static_cast<gdn2::ElementType>(gate_element),
          .gates = {.use_qk_l2norm = use_qk_l2norm,
                    .decay_gate = static_cast<gdn2::DecayGate>(decay_gate),
                    .lower_bound = lower_bound,
                    .use_gate_sigmoid = use_gate_sigmoid,
                    .erase_scale = erase_scale,
                    .A_log = pointer<float const>(A_log),
                    .dt_bias = pointer<float const>(dt_bias)},
          .scale = scale,
          .cu_seqlens = pointer<void const>(cu_seqlens),
          .offsets_are_64_bit = offsets_are_64_bit,
          .plan = {.slots = pointer<gdn2::ChunkSlot>(plan_slots),
                   .spans = pointer<gdn2::SequenceSpan>(plan_spans)},
          .tiles = {.factors = pointer<void>(factors),
                    .gamma_last = pointer<float>(gamma_last),
                    .A_minus_I = pointer<void>(A_minus_I),
                    .P = pointer<void>(P)},
          .initial_state = pointer<float const>(initial_state),
          .state_v_first = state_v_first};
}

void chunk_forward(gdn2::ChunkCall const& call, Address o, Address final_state, Address chunk_states,
                   Address stream) {
  gdn2::chunk_forward({.call = call,
                       .o = pointer<void>(o),
                       .final_state = pointer<float>(final_state),
                       .chunk_states = pointer<float>(chunk_states)},
                      pointer<CUstream_st>(stream));
}

void chunk_backward(gdn2::ChunkCall const& call, TokenTensorTuple const& dO, Address d_final_state, Address S,
                    Address dS, Address R, Address dX, Address row_norms, Address dq, Address dk, Address dv,
                    Address dg, Address db, Address dw, Address dA_log, Address d_dt_bias,
                    Address d_initial_state, Address stream) {
  gdn2::chunk_backward({.call = call,
                        .dO = token_tensor(dO),
                        .d_final_state = pointer<float const>(d_final_state),
                        .tiles = {.S = pointer<void>(S),
                                  .dS = pointer<void>(dS),
                                  .R = pointer<void>(R),
                                  .dX = pointer<void>(dX)},
                        .row_norms = pointer<float>(row_norms),
                        .dq = pointer<void>(dq),
                        .dk = pointer<void>(dk),
                        .dv = pointer<void>(dv),
                        .dg = pointer<void>(dg),
                        .db = pointer<void>(db),
                        .dw = pointer<void>(dw),
                        .dA_log = pointer<float>(dA_log),
                        .d_dt_bias = pointer<float>(d_dt_bias),
                        .d_initial_state = pointer<float>(d_initial_state)},
                       pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels of gdn2_ext for sm_90a. Internal: call the functions of gdn2_ext.";
  m.attr("arch") = "sm_90a";
  m.attr("cuda_runtime_version") = CUDART_VERSION;
  m.attr("cutlass_version") = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." +
                              std::to_string(CUTLASS_PATCH);

  m.def("tile_product", &gdn2::tile_product, "a"_a, "b"_a, "c"_a, "rows"_a, "depth"_a, "b_is_mn_major"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(),
        R"(C = A B, or C = A B^T, on the current device.

a             address of A [rows, depth] bf16
b             address of B bf16: [depth, 128] where b_is_mn_major (C = A B), else [128, depth] (C = A B^T)
c             address of C [rows, 128] float32, written
rows, depth   multiples of 64
stream        cudaStream_t as an integer

Tensors are row-major and contiguous, addresses aligned to 16 bytes. ValueError names a bad argument,
RuntimeError the CUDA error of a failed launch.)");

  py::class_<gdn2::ChunkCall>(m, "ChunkCall",
                              "What forward and backward of a call share; see csrc/params.h for shapes.")
      .def(py::init(&make_chunk_call));
  m.def("chunk_forward", &chunk_forward, py::call_guard<py::gil_scoped_release>(),
        "The chunk forward of a ChunkCall on the current device. Checks nothing.");
  m.def("chunk_backward", &chunk_backward, py::call_guard<py::gil_scoped_release>(),
        "The chunk backward of a ChunkCall on the current device. Checks nothing.");

  gdn2::add_recurrent_forward(m);
}
