// Loops over the channels of positions that lie one after the other: [positions, channels], as channels_last
// tensors are stored. As simd.h, everything sits in an unnamed namespace and includes no PyTorch header.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// A whole vector of channels.
struct Whole {
  static Simd::type load(const float* from) { return Simd::load(from); }
  static void store(float* to, Simd::type value) { Simd::store(to, value); }
};

// The first `count` lanes of a vector: the last channels where their number is no multiple of the lanes. The
// other lanes load as zero.
struct Part {
  size_t count;

  Simd::type load(const float* from) const {
    float lanes[Simd::lanes] = {};
    std::memcpy(lanes, from, count * sizeof(float));
    return Simd::load(lanes);
  }
  void store(float* to, Simd::type value) const {
    float lanes[Simd::lanes];
    Simd::store(lanes, value);
    std::memcpy(to, lanes, count * sizeof(float));
  }
};

// Calls body(first channel, how to load and store) for every vector of channels.
template <class Body>
inline void over_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + Simd::lanes <= channels; c += Simd::lanes) body(c, Whole{});
  if (c < channels) body(c, Part{static_cast<size_t>(channels - c)});
}

// Calls body.template operator()<n>(first position) for groups of `group` positions, then for single ones.
template <int group, class Body>
inline void over_positions(int64_t positions, const Body& body) {
  int64_t p = 0;
  for (; p + group <= positions; p += group) body.template operator()<group>(p);
  for (; p < positions; ++p) body.template operator()<1>(p);
}

// sums[c] += sum_p a[p][c] * b[p][c]
inline void add_products(const float* a,     // [positions, channels]
                         const float* b,     // [positions, channels]
                         int64_t positions,  //
                         int64_t channels,   //
                         float* sums) {      // [channels]
  // Four positions share one load and store of the sums.
  over_positions<4>(positions, [&]<int group>(int64_t p) {
    over_channels(channels, [&](int64_t c, auto part) {
      Simd::type sum = part.load(sums + c);
#pragma GCC unroll 4
      for (int i = 0; i < group; ++i) {
        const int64_t at = (p + i) * channels + c;
        sum = Simd::multiply_add(part.load(a + at), part.load(b + at), sum);
      }
      part.store(sums + c, sum);
    });
  });
}

}  // namespace
}  // namespace pydefect::cpu::PYDEFECT_LEVEL
