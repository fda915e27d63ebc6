// The slice of a state that a CTA of recurrent.cu keeps in registers: how its threads own it, load it and
// store it, and how they add up over its channels.
#pragma once

#include <type_traits>

#include <cute/arch/copy_sm90_desc.hpp>

#include "sm90/recurrent_token.cuh"
#include "tile/convert.cuh"
#include "tile/mma.cuh"

namespace gdn2::recurrent {

// kVFirst: states are [V, K] in memory. kOneToken: no sequence has more, and bfloat16 states go back as
// bfloat16. kAligned: rows are whole pieces, at addresses of whole pieces. kSlices: of a CTA, each with
// threads of its own.
//
// Results do not depend on the number of sequences, to the bit: whatever that decides (kColumns, kOneToken)
// leaves the order of the sums over channels as it is.
template <class State_, bool kVFirst_, int kDimK_, int kColumns_, bool kOneToken_, bool kAligned_,
          int kSlices_ = 1>
struct Config {
  using State = State_;
  static constexpr bool kVFirst = kVFirst_, kOneToken = kOneToken_, kAligned = kAligned_;
  static constexpr int kDimK = kDimK_, kColumns = kColumns_, kSlices = kSlices_;
  static constexpr int kThreads = kDimK;  // of a slice: one a channel
  static constexpr int kWarps = kThreads / kWarpThreads;
  // One token: wide slices of bfloat16 states stay as they are in 32 registers, and are unpacked and decayed
  // in both passes. That is twice the bytes in flight of an unpacked slice.
  static constexpr bool kPacked = kOneToken && kColumns == 64 && sizeof(State) < sizeof(float);
  static constexpr int kCtasPerSm = (kPacked ? 640 : kOneToken ? 768 : 512) / kThreads;  // by registers
  // A piece is what a thread loads at once: 16 bytes of wide slices. kPieces of them are side by side in a
  // row, and the CTA takes kRowsAtOnce rows at once, kVectors times.
  static constexpr int kVector = !kVFirst ? kColumns / 8 : kPacked ? 8 : 4;  // elements
  static constexpr int kPieces = (kVFirst ? kDimK : kColumns) / kVector;
  static constexpr int kRowsAtOnce = kThreads / kPieces;
  static constexpr int kVectors = (kVFirst ? kColumns : kDimK) / kRowsAtOnce;
  // What a thread owns of the slice, its sums r and p, and the lanes of a warp that share its columns.
  static constexpr int kOwnChannels = kVFirst ? kVector : kVectors;
  static constexpr int kOwnColumns = kVFirst ? kVectors : kVector;
  static constexpr int kSums = 2 * kOwnColumns;
  static constexpr int kSumLanes = kVFirst ? kPieces : kWarpThreads / kPieces;

  static_assert(kPieces <= kWarpThreads && kOwnColumns * kOwnChannels * kThreads == kDimK * kColumns);
  static_assert(kColumns <= kThreads && kThreads % kColumns == 0);
};

// Bits of a piece of so many bytes.
template <int kBytes>
struct PieceBits;
template <>
struct PieceBits<4> {
  using Type = std::uint32_t;
};
template <>
struct PieceBits<8> {
  using Type = uint2;
};
template <>
struct PieceBits<16> {
  using Type = uint4;
};

// How pieces of states come and go, as measured (docs/kernels.md). Of float32 states what is read stays in
// the L2 cache longer than what is written meanwhile; rows of bfloat16 states are 256 bytes, of which a warp
// asks for a part: the L2 cache fetches the rest with it, and lets go first of what is written.
template <class State, class Bits>
__device__ Bits load_piece(std::uint8_t const* address) {
  if constexpr (sizeof(Bits) < sizeof(uint4)) {
    return __ldcs(reinterpret_cast<Bits const*>(address));
  } else {
    uint4 x;
    if constexpr (sizeof(State) == sizeof(float)) {
      constexpr auto kKeep = static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
      asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "l"(address), "l"(kKeep));
    } else {
      asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "l"(address));
    }
    return x;
  }
}

template <class State, class Bits>
__device__ void store_piece(std::uint8_t* address, Bits bits) {
  if constexpr (sizeof(State) == sizeof(float)) {
    *reinterpret_cast<Bits*>(address) = bits;
  } else {
    __stcs(reinterpret_cast<Bits*>(address), bits);
  }
}

// What a thread owns: kVectors pieces, piece j of row `first_row + j * kRowsAtOnce`; packed, or as float32.
template <class Cfg>
struct StateSlice {
  static constexpr int kVector = Cfg::kVector, kVectors = Cfg::kVectors;
  using State = typename Cfg::State;
  using Bits = typename PieceBits<kVector * sizeof(State)>::Type;
  std::conditional_t<Cfg::kPacked, Bits, float[kVector]> pieces[kVectors];

  __device__ static int piece() { return thread_of_slice<Cfg>() % Cfg::kPieces; }
  __device__ static int first_row() { return thread_of_slice<Cfg>() / Cfg::kPieces; }

  __device__ void get(float (&x)[kVector], int j) const {
    if constexpr (Cfg::kPacked) {
      unpack_piece(x, pieces[j]);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        x[e] = pieces[j][e];
      }
    }
  }

  __device__ void set(int j, float const (&x)[kVector]) {
    if constexpr (Cfg::kPacked) {
      pieces[j] = pack_piece<State>(x);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        pieces[j][e] = x[e];
      }
    }
  }

  __device__ void fill(float value) {
    float x[kVector];
#pragma unroll
    for (float& s : x) {
      s = value;
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      set(j, x);
    }
  }

  // Keeps the compiler from holding on to unpacked values across a token's sums: there is no room for them.
  __device__ void unpack_again() {
    if constexpr (Cfg::kPacked) {
#pragma unroll
      for (Bits& piece : pieces) {
        asm volatile("" : "+r"(piece.x), "+r"(piece.y), "+r"(piece.z), "+r"(piece.w));
      }
    }
  }

  // Where the thread's first piece lies, in slot 0 of a tensor of Element.
  template <class Element>
  __device__ static std::uint8_t* address(StateTensor const& x, Work const& work) {
    int const first = piece() * kVector + (Cfg::kVFirst ? 0 : work.first_column);
    int const row = first_row() + (Cfg::kVFirst ? work.first_column : 0);
    return x.data + wide_product(work.value_head, x.stride_head) + wide_product(row, x.stride_row) +
           first * static_cast<int>(sizeof(Element));
  }

  // Calls body(j, address, size) for the pieces that lie inside the matrix, or in part where they are not
  // aligned: how many of their elements do.
  template <class Body>
  __device__ static void for_each_piece(std::uint8_t* at, std::int32_t stride_row, CallShape const& shape,
                                        Work const& work, Body body) {
    int const row = first_row() + (Cfg::kVFirst ? work.first_column : 0);
    int const size = (Cfg::kVFirst ? shape.dim_k : shape.dim_v - work.first_column) - piece() * kVector;
    int const num_rows = size <= 0 ? 0 : Cfg::kVFirst ? shape.dim_v : shape.dim_k;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (row + j * Cfg::kRowsAtOnce < num_rows) {
        body(j, at, size);
      }
      at += wide_product(Cfg::kRowsAtOnce, stride_row);
    }
  }

  // Asks for all pieces before it looks at one.
  __device__ void load(std::uint8_t* address, std::int32_t stride_row, CallShape const& shape,
                       Work const& work) {
    if constexpr (Cfg::kAligned) {
      Bits bits[kVectors] = {};
      for_each_piece(address, stride_row, shape, work,
                     [&](int j, std::uint8_t const* at, int) { bits[j] = load_piece<State, Bits>(at); });
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if constexpr (Cfg::kPacked) {
          pieces[j] = bits[j];
        } else {
          unpack_piece(pieces[j], bits[j]);
        }
      }
    } else {
      fill(0.f);
      for_each_piece(address, stride_row, shape, work, [&](int j, std::uint8_t const* at, int size) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (e < size) {
            pieces[j][e] = static_cast<float>(reinterpret_cast<State const*>(at)[e]);
          }
        }
      });
    }
  }

  // From and to a square matrix in shared memory, its rows one after the other.
  __device__ void read_tile(std::uint8_t const* tile, int first_column) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      unpack_piece(pieces[j], *reinterpret_cast<Bits const*>(tile + tile_offset(first_column, j)));
    }
  }
  __device__ void write_tile(std::uint8_t* tile, int first_column) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      *reinterpret_cast<Bits*>(tile + tile_offset(first_column, j)) = pack_piece<State>(pieces[j]);
    }
  }

  // To a matrix of State or of float.
  template <class Out>
  __device__ void store(std::uint8_t* address, std::int32_t stride_row, CallShape const& shape,
                        Work const& work) const {
    for_each_piece(address, stride_row, shape, work, [&](int j, std::uint8_t* at, int size) {
      if constexpr (Cfg::kPacked) {
        store_piece<Out>(at, pieces[j]);
      } else if constexpr (Cfg::kAligned) {
        store_piece<Out>(at, pack_piece<Out>(pieces[j]));
      } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (e < size) {
            reinterpret_cast<Out*>(at)[e] = rounded<Out>(pieces[j][e]);
          }
        }
      }
    });
  }

 private:
  __device__ static int tile_offset(int first_column, int j) {
    constexpr int kRowLength = Cfg::kDimK;
    int const row = first_row() + j * Cfg::kRowsAtOnce + (Cfg::kVFirst ? first_column : 0);
    int const first = piece() * kVector + (Cfg::kVFirst ? 0 : first_column);
    return (row * kRowLength + first) * static_cast<int>(sizeof(State));
  }

  template <class Out>
  __device__ static Out rounded(float x) {
    if constexpr (sizeof(Out) == sizeof(float)) {
      return x;
    } else {
      return round_to<Out>(x);
    }
  }

  template <class Out>
  __device__ static auto pack_piece(float const (&x)[kVector]) {
    alignas(16) std::uint32_t words[kVector * sizeof(Out) / 4];
#pragma unroll
    for (int i = 0; i < kVector * sizeof(Out) / 4; ++i) {
      if constexpr (sizeof(Out) == sizeof(float)) {
        words[i] = __float_as_uint(x[i]);
      } else {
        words[i] = pack<Out>(x[2 * i], x[2 * i + 1]);
      }
    }
    return *reinterpret_cast<typename PieceBits<sizeof(words)>::Type const*>(words);
  }

  __device__ static void unpack_piece(float (&x)[kVector], Bits bits) {
    auto const* const words = reinterpret_cast<std::uint32_t const*>(&bits);
#pragma unroll
    for (int i = 0; i < sizeof(Bits) / 4; ++i) {
      if constexpr (sizeof(State) == sizeof(float)) {
        x[i] = __uint_as_float(words[i]);
      } else {
        float2 const pair = unpack<State>(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    }
  }
};

// ---- sums -------------------------------------------------------------------------------------------------

// kCount neighbours from shared memory, aligned to 16 bytes or their size.
template <int kCount>
__device__ void read_floats(float (&x)[kCount], float const* source) {
  using Bits = typename PieceBits<kCount >= 4 ? 16 : 4 * kCount>::Type;
  constexpr int kStep = sizeof(Bits) / sizeof(float);
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    Bits const bits = *reinterpret_cast<Bits const*>(source + i);
#pragma unroll
    for (int e = 0; e < kStep; ++e) {
      x[i + e] = reinterpret_cast<float const*>(&bits)[e];
    }
  }
}

// Sums of kSize values over kLanes lanes that are kStep apart, neighbours first, which end up spread over
// them: half of the values go to every other lane, and so on. x[0 .. max(1, kSize / kLanes)) then holds the
// values from spread_index(lane) on; where there are more lanes than values, several hold the same.
template <int kSize_, int kLanes_, int kStep_>
struct SpreadSum {
  static constexpr int kSize = kSize_, kLanes = kLanes_, kStep = kStep_;
  static constexpr int kLeft = kSize > kLanes ? kSize / kLanes : 1;
  static constexpr int kChoosing =
      (kSize < kLanes ? kSize : kLanes) - 1;  // bits of a lane that choose values

  // kNow values are left to this lane.
  template <int kBit = 1, int kNow = kSize>
  __device__ static void run(float (&x)[kSize]) {
    if constexpr (kBit < kLanes) {
      constexpr int kHalf = kNow > 1 ? kNow / 2 : 1;
      bool const upper = lane_index() & kBit * kStep;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        float const mine = kNow > 1 && upper ? x[i + kNow - kHalf] : x[i];
        float const other = kNow > 1 && !upper ? x[i + kNow - kHalf] : x[i];
        x[i] = mine + __shfl_xor_sync(kAllLanes, other, kBit * kStep);
      }
      run<2 * kBit, kHalf>(x);
    }
  }

  // Lower bits of the lane choose among larger parts.
  __device__ static int index(int lane) {
    int index = 0;
#pragma unroll
    for (int bit = 1, size = kSize / 2; bit & kChoosing; bit *= 2, size /= 2) {
      index += lane & bit * kStep ? size : 0;
    }
    return index;
  }

  // Of the lanes that hold the same values.
  __device__ static bool is_first(int lane) { return (lane / kStep % kLanes & ~kChoosing) == 0; }

  // The first lane that holds a value.
  __device__ static constexpr int lane_of(int index) {
    int lane = 0;
    for (int bit = 1, size = kSize / 2; bit & kChoosing; bit *= 2, size /= 2) {
      lane += index & size ? bit * kStep : 0;
    }
    return lane;
  }
};

}  // namespace gdn2::recurrent
