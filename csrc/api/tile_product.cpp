#include "api/tile_product.h"

#include <stdexcept>
#include <string>

namespace gdn2 {
namespace {

constexpr std::int64_t kTile = 64;            // rows of A that a CTA owns, and depth of one stage
constexpr std::uintptr_t kTmaAlignment = 16;  // bytes: what a tensor map asks of a base address

void check_extent(char const* name, std::int64_t extent) {
  if (extent <= 0 || extent % kTile != 0) {
    throw std::invalid_argument(std::string("tile_product: ") + name + " must be a positive multiple of " +
                                std::to_string(kTile) + ", got " + std::to_string(extent));
  }
}

void check_address(char const* name, std::uintptr_t address) {
  if (address == 0 || address % kTmaAlignment != 0) {
    throw std::invalid_argument(std::string("tile_product: ") + name +
                                " must be a non-null address aligned to " + std::to_string(kTmaAlignment) +
                                " bytes, got " + std::to_string(address));
  }
}

}  // namespace

void tile_product(std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, std::int64_t rows, std::int64_t depth,
                  bool b_is_mn_major, std::uintptr_t stream) {
  check_extent("rows", rows);
  check_extent("depth", depth);
  check_address("a", a);
  check_address("b", b);
  check_address("c", c);

  TileProductParams const params{
      .a = reinterpret_cast<void const*>(a),
      .b = reinterpret_cast<void const*>(b),
      .c = reinterpret_cast<float*>(c),
      .rows = rows,
      .depth = depth,
      .b_is_mn_major = b_is_mn_major,
  };
  run_tile_product(params, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace gdn2
