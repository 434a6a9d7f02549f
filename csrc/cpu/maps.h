// What the operations on channels_last maps share: an image's positions cut into blocks that depend on its
// size alone, so that sums over positions come out the same for every number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "aligned.h"
#include "rounding.h"

namespace pydefect::cpu {

// The sizes of maps [images, height, width, channels].
struct MapSize {
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;

  explicit MapSize(const torch::stable::Tensor& map)
      : images(map.size(0)), height(map.size(1)), width(map.size(2)), channels(map.size(3)) {}

  int64_t positions() const { return height * width; }
  int64_t image() const { return positions() * channels; }
};

// A map like `map`, not initialised. Where it is so large that malloc takes it fresh from the system (32 MiB
// with glibc), huge pages are asked for: the first touch of 4 KB pages costs several times what writing them
// does.
inline torch::stable::Tensor new_map(const torch::stable::Tensor& map) {
  torch::stable::Tensor result = torch::stable::empty_like(map);
#ifdef __linux__
  constexpr size_t kFresh = size_t{32} << 20;
  constexpr size_t kPage = 4096;
  const size_t bytes = static_cast<size_t>(result.numel()) * sizeof(float);
  if (bytes >= kFresh) {
    char* data = static_cast<char*>(result.mutable_data_ptr());
    const size_t skipped = (kPage - reinterpret_cast<uintptr_t>(data) % kPage) % kPage;
    // Only advice: where it is not taken, nothing changes.
    madvise(data + skipped, (bytes - skipped) / kPage * kPage, MADV_HUGEPAGE);
  }
#endif
  return result;
}

// Whether `count` maps of this size are more than caches hold until somebody reads them: half of the 32 MiB
// that eight cores share in today's servers.
inline bool past_caches(const MapSize& size, int64_t count) {
  return count * size.images * size.image() * static_cast<int64_t>(sizeof(float)) >= int64_t{16} << 20;
}

// Fixed cuts of 0..length.
class Blocks {
 public:
  Blocks(int64_t length, int64_t size) : length_(length), size_(size), count_(divide_up(length, size)) {}

  int64_t count() const { return count_; }

  // Calls body(block, first, last) for every block.
  template <class Body>
  void for_each(const Body& body) const {
    torch::stable::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        body(block, block * size_, std::min((block + 1) * size_, length_));
      }
    });
  }

 private:
  int64_t length_;
  int64_t size_;
  int64_t count_;
};

// Blocks of the positions of an image: of 64, which are 96 KB at 384 channels.
inline Blocks position_blocks(const MapSize& size) {
  return {size.positions(), 64};
}

// A sum of vectors of `length` over blocks: each block adds to its own, and they are added up in order.
class BlockSums {
 public:
  BlockSums(int64_t blocks, int64_t length) : blocks_(blocks), length_(length), sums_(blocks * length) {}

  // The block's sums, set to zero.
  float* start(int64_t block) {
    float* sums = sums_.data() + block * length_;
    std::fill(sums, sums + length_, 0.0f);
    return sums;
  }

  void add_to(float* total) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      const float* sums = sums_.data() + block * length_;
      for (int64_t i = 0; i < length_; ++i) total[i] += sums[i];
    }
  }

 private:
  int64_t blocks_;
  int64_t length_;
  AlignedBuffer<float> sums_;
};

}  // namespace pydefect::cpu
