// The part of DLPack's C interface that reads tensors of Python without copies or reference counts, and
// allocates memory that is no object of Python's: what `__dlpack_c_exchange_api__` of a tensor type points to
// (https://dmlc.github.io/dlpack, version 1). PyTorch has it from 2.10 on.
#pragma once

#include <cstdint>

namespace gdn2::dlpack {

constexpr std::int32_t kCuda = 2;                                     // Device::type
constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4;  // DataType::code
constexpr std::uint32_t kMajorVersion = 1;
constexpr char kCapsuleName[] = "dlpack_exchange_api";

struct Device {
  std::int32_t type, id;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;    // [ndim]
  std::int64_t* strides;  // [ndim], in elements
  std::uint64_t byte_offset;
};

// A tensor that its holder gives back.
struct ManagedTensor {
  std::uint32_t major_version, minor_version;
  void* context;
  void (*give_back)(ManagedTensor* self);  // or null
  std::uint64_t flags;
  Tensor tensor;
};

using SetError = void(void* context, char const* kind, char const* message);

struct ExchangeApi {
  std::uint32_t major_version, minor_version;
  ExchangeApi* previous;
  // Of the prototype's type, shape and device, for the device's current stream; 0, or another number after
  // set_error.
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context, SetError* set_error);
  void *export_managed, *import_managed;  // not used here
  // A view of a tensor object, valid while nobody else runs; 0, or -1 with Python's error set.
  int (*view)(void* object, Tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace gdn2::dlpack
