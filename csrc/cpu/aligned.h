// Memory that vector loads never straddle cache lines in: packed panels read from anywhere else cost twice
// the time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace pydefect::cpu {

// `size` values, not initialised, beginning at a multiple of 64 bytes.
template <class Value>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t size)
      : data_(static_cast<Value*>(::operator new(static_cast<size_t>(size) * sizeof(Value), kAlignment))) {}

  Value* data() { return data_.get(); }
  const Value* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(Value* data) const { ::operator delete(data, kAlignment); }
  };

  std::unique_ptr<Value, Free> data_;
};

}  // namespace pydefect::cpu
