// Products on the tensor cores: D [64, kN] += A [64, 16] B [16, kN] a warpgroup and instruction, A in
// registers.
//
// Which element lies where, for lane l of warp i in the warpgroup:
//     accumulator  acc[4*j + 2*half + c]        row 16*i + l/4 + 8*half   column 8*j + 2*(l%4) + c
//     A fragment   a[2*kk + half], kk = 0, 1    row 16*i + l/4 + 8*half   column 8*kk + 2*(l%4) + c, c = 0, 1
// so the accumulators of 16 columns are, rounded and packed in pairs, the A fragment of the next product's 16
// steps.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

#include "tile/arch.cuh"
#include "tile/tma.cuh"

namespace gdn2 {

// How B lies in shared memory: KMajor [kN, depth], one row a column of B; MNMajor [depth, kN].
using Major = cute::SM90::GMMA::Major;
using ScaleIn = cute::SM90::GMMA::ScaleIn;

// A fragment of 16 columns: 16-bit pairs in the order above.
struct FragmentA {
  std::uint32_t pairs[4];
};

namespace detail {

template <class Element, int kN, Major kMajorB, ScaleIn kSignA>
struct AtomRS;
template <class Element, int kN, Major kMajorA>
struct AtomSS;

#define GDN2_WGMMA_ATOM(ELEMENT, NAME, N)                                                                \
  template <Major kMajorB, ScaleIn kSignA>                                                               \
  struct AtomRS<ELEMENT, N, kMajorB, kSignA> {                                                           \
    using Type =                                                                                         \
        cute::SM90::GMMA::MMA_64x##N##x16_F32##NAME##NAME##_RS<Major::K, kMajorB, kSignA, ScaleIn::One>; \
  };                                                                                                     \
  template <Major kMajorA>                                                                               \
  struct AtomSS<ELEMENT, N, kMajorA> {                                                                   \
    using Type = cute::SM90::GMMA::MMA_64x##N##x16_F32##NAME##NAME##_SS<kMajorA, Major::K, ScaleIn::One, \
                                                                        ScaleIn::One>;                   \
  };
GDN2_WGMMA_ATOM(__nv_bfloat16, BF16, 16)
GDN2_WGMMA_ATOM(__nv_bfloat16, BF16, 32)
GDN2_WGMMA_ATOM(__nv_bfloat16, BF16, 64)
GDN2_WGMMA_ATOM(__nv_bfloat16, BF16, 128)
GDN2_WGMMA_ATOM(__half, F16, 16)
GDN2_WGMMA_ATOM(__half, F16, 32)
GDN2_WGMMA_ATOM(__half, F16, 64)
GDN2_WGMMA_ATOM(__half, F16, 128)
#undef GDN2_WGMMA_ATOM

constexpr cute::SM90::GMMA::ScaleOut scale_out(bool accumulate) {
  return accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
}

template <class Atom, int kRegisters, std::size_t... kIndex>
__device__ void fma(float (&acc)[kRegisters], FragmentA const& a, std::uint64_t descriptor_b, bool accumulate,
                    std::index_sequence<kIndex...>) {
  Atom::fma(a.pairs[0], a.pairs[1], a.pairs[2], a.pairs[3], descriptor_b, acc[kIndex]...,
            scale_out(accumulate));
}

template <class Atom, int kRegisters, std::size_t... kIndex>
__device__ void fma(float (&acc)[kRegisters], std::uint64_t descriptor_a, std::uint64_t descriptor_b,
                    bool accumulate, std::index_sequence<kIndex...>) {
  Atom::fma(descriptor_a, descriptor_b, acc[kIndex]..., scale_out(accumulate));
}

}  // namespace detail

// The shared-memory descriptor of B, or of an A (K-major as B, or MN-major: [depth, 64]), for one
// instruction's 16 steps of depth. `smem` is where the first of them starts: KMajor: boxes of 64 depth steps,
// `kN` rows each; 16 steps further is 32 bytes further inside a box. MNMajor: boxes of 64 columns,
// `mn_box_bytes` apart; 16 steps further is 16 rows further inside every box.
template <Major kMajorB>
__device__ std::uint64_t shared_descriptor(void const* smem, int mn_box_bytes = 0) {
  std::uint64_t const start = static_cast<std::uint64_t>(__cvta_generic_to_shared(smem)) >> 4;
  std::uint64_t const leading = kMajorB == Major::K ? 1 : static_cast<std::uint64_t>(mn_box_bytes) >> 4;
  constexpr std::uint64_t kStride = kSwizzleAtomBytes >> 4;
  constexpr std::uint64_t kSwizzle128B = 1;
  return (start & 0x3fff) | (leading << 16) | (kStride << 32) | (kSwizzle128B << 62);
}

// acc = A B, or += where accumulate: issued, not waited for (see wgmma_fence, wgmma_commit, wgmma_wait).
// kSignA Neg subtracts, at no cost.
template <class Element, Major kMajorB, ScaleIn kSignA = ScaleIn::One, int kRegisters>
__device__ void wgmma(float (&acc)[kRegisters], FragmentA const& a, std::uint64_t descriptor,
                      bool accumulate) {
  using Atom = typename detail::AtomRS<Element, 2 * kRegisters, kMajorB, kSignA>::Type;
  detail::fma<Atom>(acc, a, descriptor, accumulate, std::make_index_sequence<kRegisters>{});
}

// The same with A [64, 16] from shared memory, and B K-major.
template <class Element, Major kMajorA = Major::K, int kRegisters>
__device__ void wgmma_shared(float (&acc)[kRegisters], std::uint64_t descriptor_a, std::uint64_t descriptor_b,
                             bool accumulate) {
  using Atom = typename detail::AtomSS<Element, 2 * kRegisters, kMajorA>::Type;
  detail::fma<Atom>(acc, descriptor_a, descriptor_b, accumulate, std::make_index_sequence<kRegisters>{});
}

// Orders this warpgroup's writes to accumulators and A fragments before the wgmma that follow.
__device__ inline void wgmma_fence() {
  cute::warpgroup_arrive();
}
__device__ inline void wgmma_commit() {
  cute::warpgroup_commit_batch();
}
// Returns when at most kPending committed groups are unfinished; accumulators of finished ones may then be
// read.
template <int kPending>
__device__ void wgmma_wait() {
  cute::warpgroup_wait<kPending>();
}

}  // namespace gdn2
