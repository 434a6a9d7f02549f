#include "convolution.h"

#include <cstdint>
#include <cstring>

#include "register_tile.h"
#include "simd.h"

namespace pydefect::cpu::PYDEFECT_LEVEL {
namespace {

// The transforms are Toom and Cook's with the points 0, 1, -1, 2, -1/2 and infinity, for which rounding
// errors are smallest (with 1/2 and -1/2, or 2 and -2, they are half again as large): all numbers are exact.

// B^T x
template <class V>
void to_points(const typename V::type (&x)[6], typename V::type (&to)[6]) {
  using T = typename V::type;
  const T half = V::broadcast(0.5f), two = V::broadcast(2.0f);
  const T three_halves = V::broadcast(1.5f), five_halves = V::broadcast(2.5f);
  const T odd = x[3] - x[1];
  const T even = x[4] - x[2];
  to[0] = x[0] - x[2] + even - three_halves * odd;
  to[1] = even - three_halves * x[2] - (x[1] + half * x[3]);
  to[2] = V::multiply_add(three_halves, x[2], even) + (x[1] - five_halves * x[3]);
  to[3] = V::multiply_add(half, odd, even);
  to[4] = even - two * odd;
  to[5] = x[5] - x[3] - odd - three_halves * even;
}

// A^T x
template <class V, int side>
void from_points(const typename V::type (&x)[6], typename V::type (&to)[side]) {
  using T = typename V::type;
  const T sum = x[1] + x[2];
  const T difference = x[1] - x[2];
  to[0] = x[0] + sum + (x[3] + x[4]);
  to[1] = difference + V::multiply_add(V::broadcast(-0.5f), x[4], x[3] + x[3]);
  const T quadratic = sum + V::multiply_add(V::broadcast(4.0f), x[3], V::broadcast(0.25f) * x[4]);
  if constexpr (side == 3) {
    to[2] = quadratic + x[5];
  } else {
    to[2] = quadratic;
    to[3] = difference + V::multiply_add(V::broadcast(8.0f), x[3], V::broadcast(-0.125f) * x[4]) + x[5];
  }
}

// G x; by the side of the kernel. Row i of G is what a point's powers are divided by: the product of its
// differences from the others.
template <class V, int side>
void weight_points(const typename V::type (&x)[4], typename V::type (&to)[6]) {
  using T = typename V::type;
  const T zero = V::zero();
  const T cubic = side == 4 ? x[3] : zero;
  const T even = x[0] + x[2], odd = x[1] + cubic;
  const T third = V::broadcast(1.0f / 3.0f);
  to[0] = x[0];
  to[1] = (zero - third) * (even + odd);
  to[2] = third * (even - odd);
  // At 2 and -1/2, x0 + 2 x1 + 4 x2 + 8 x3 and 8 x0 - 4 x1 + 2 x2 - x3.
  const T two = V::broadcast(2.0f);
  to[3] = V::broadcast(1.0f / 15.0f) *
          V::multiply_add(two, V::multiply_add(two, V::multiply_add(two, cubic, x[2]), x[1]), x[0]);
  to[4] = V::broadcast(-2.0f / 15.0f) *
          (V::multiply_add(two, V::multiply_add(two, V::multiply_add(two, x[0], zero - x[1]), x[2]),
                           zero - cubic));
  to[5] = x[side - 1];
}

template <class V, int side>
void transform_kernels(const float* kernels, float* to, int64_t number_stride) {
  constexpr int columns = ConvolutionKernel::columns;
  for (int c = 0; c < columns; c += V::lanes) {
    typename V::type half_way[4][6];  // by column of the kernel
    for (int column = 0; column < side; ++column) {
      typename V::type values[4] = {};
      for (int row = 0; row < side; ++row) {
        values[row] = V::load(kernels + (row * side + column) * columns + c);
      }
      weight_points<V, side>(values, half_way[column]);
    }
    for (int row = 0; row < 6; ++row) {
      typename V::type values[4] = {}, numbers[6];
      for (int column = 0; column < side; ++column) values[column] = half_way[column][row];
      weight_points<V, side>(values, numbers);
      for (int column = 0; column < 6; ++column) {
        V::store(to + (row * 6 + column) * number_stride + c, numbers[column]);
      }
    }
  }
}

template <class V>
void transform_weights(const float* kernels, int64_t side, float* to, int64_t number_stride) {
  if (side == 3) {
    transform_kernels<V, 3>(kernels, to, number_stride);
  } else {
    transform_kernels<V, 4>(kernels, to, number_stride);
  }
}

template <class V>
void transform_input(const float* const* pixels, int64_t channels, float* to, int64_t block_stride,
                     int64_t number_stride) {
  constexpr int depth = ConvolutionKernel::depth;
  for (int64_t block = 0; block < channels; block += depth, to += block_stride) {
    for (int64_t c = 0; c < depth; c += V::lanes) {
      const int64_t count = channels - block - c;
      float* const part = to + c;
      if (count <= 0) {
        for (int64_t n = 0; n < kTileNumbers; ++n) V::store(part + n * number_stride, V::zero());
        continue;
      }
      typename V::type half_way[6][6];  // by column of the tile
      for (int column = 0; column < 6; ++column) {
        typename V::type values[6];
#pragma GCC unroll 6
        for (int row = 0; row < 6; ++row) {
          values[row] = V::load_some(pixels[row * 6 + column] + block + c, count);
        }
        to_points<V>(values, half_way[column]);
      }
#pragma GCC unroll 6
      for (int row = 0; row < 6; ++row) {
        typename V::type values[6], numbers[6];
#pragma GCC unroll 6
        for (int column = 0; column < 6; ++column) values[column] = half_way[column][row];
        to_points<V>(values, numbers);
#pragma GCC unroll 6
        for (int column = 0; column < 6; ++column) {
          V::store(part + (row * 6 + column) * number_stride, numbers[column]);
        }
      }
    }
  }
}

template <class V, int rows, int vectors>
void multiply_rows(const float* tiles, const float* panel, int64_t blocks, float* out) {
  constexpr int columns = ConvolutionKernel::columns;
  for (int first = 0; first < columns; first += vectors * V::lanes) {
    typename V::type sums[rows][vectors] = {};
    add_products<V, rows, vectors, ConvolutionKernel::depth>(tiles, panel + first, columns, blocks, sums);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) V::store(out + r * columns + first + v * V::lanes, sums[r][v]);
    }
  }
}

// Fewer tiles take less time: chooses the loop that is compiled for `count`.
template <class V, int rows, int vectors>
void multiply(int count, const float* tiles, const float* panel, int64_t blocks, float* out) {
  if constexpr (rows > 1) {
    if (count < rows) {
      multiply<V, rows - 1, vectors>(count, tiles, panel, blocks, out);
      return;
    }
  }
  multiply_rows<V, rows, vectors>(tiles, panel, blocks, out);
}

template <class V, int side>
void transform_output(const OutputTile& tile) {
  const typename V::type zero = V::zero();
  for (int64_t c = 0; c < tile.channels; c += V::lanes) {
    const int64_t count = tile.channels - c;
    const size_t bytes = static_cast<size_t>(count < V::lanes ? count : V::lanes) * sizeof(float);
    typename V::type half_way[6][side];  // by column of the tile
    for (int column = 0; column < 6; ++column) {
      typename V::type values[6];
#pragma GCC unroll 6
      for (int row = 0; row < 6; ++row) {
        values[row] = V::load(tile.products + (row * 6 + column) * tile.number_stride + c);
      }
      from_points<V, side>(values, half_way[column]);
    }
    const typename V::type bias = V::load_some(tile.bias + c, count);
    for (int64_t row = 0; row < tile.rows; ++row) {
      typename V::type values[6], pixels[side];
#pragma GCC unroll 6
      for (int column = 0; column < 6; ++column) values[column] = half_way[column][row];
      from_points<V, side>(values, pixels);
      for (int64_t column = 0; column < tile.columns; ++column) {
        const int64_t at = row * tile.row_stride + column * tile.pixel_stride + c;
        typename V::type value = pixels[column] + bias;
        if (tile.residual != nullptr) value += V::load_some(tile.residual + at, count);
        // NaN stays: of it and zero, `maximum` takes the second.
        if (tile.relu) value = V::maximum(zero, value);
        if (count >= V::lanes) {
          V::store(tile.out + at, value);
        } else {
          std::memcpy(tile.out + at, &value, bytes);
        }
      }
    }
  }
}

// A x
template <class V, int side>
void gradient_points(const typename V::type (&x)[4], typename V::type (&to)[6]) {
  using T = typename V::type;
  const T cubic = side == 4 ? x[3] : V::zero();
  const T even = x[0] + x[2], odd = x[1] + cubic;
  const T two = V::broadcast(2.0f), minus_half = V::broadcast(-0.5f);
  to[0] = x[0];
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = V::multiply_add(two, V::multiply_add(two, V::multiply_add(two, cubic, x[2]), x[1]), x[0]);
  to[4] = V::multiply_add(minus_half,
                          V::multiply_add(minus_half, V::multiply_add(minus_half, cubic, x[2]), x[1]), x[0]);
  to[5] = x[side - 1];
}

// G^T x
template <class V, int side>
void points_of_weight(const typename V::type (&x)[6], typename V::type (&to)[side]) {
  using T = typename V::type;
  const T third = V::broadcast(1.0f / 3.0f), fifteenth = V::broadcast(1.0f / 15.0f);
  const T even = third * (x[2] - x[1]);
  const T odd = third * (V::zero() - x[1] - x[2]);
  const T at_two = fifteenth * x[3], at_half = fifteenth * x[4];
  const T four = V::broadcast(4.0f);
  to[0] = x[0] + even + V::multiply_add(V::broadcast(-16.0f), at_half, at_two);
  to[1] = odd + V::multiply_add(V::broadcast(8.0f), at_half, at_two + at_two);
  to[2] = even + four * (at_two - at_half);
  if constexpr (side == 3) {
    to[2] += x[5];
  } else {
    to[3] = odd + V::multiply_add(V::broadcast(8.0f), at_two, at_half + at_half) + x[5];
  }
}

template <class V, int side>
void transform_gradient_tile(const float* const* pixels, int64_t channels, float* to, int64_t panel_stride,
                             int64_t number_stride) {
  constexpr int columns = ConvolutionKernel::columns;
  for (int64_t panel = 0; panel < channels; panel += columns, to += panel_stride) {
    for (int64_t c = 0; c < columns; c += V::lanes) {
      const int64_t count = channels - panel - c;
      float* const part = to + c;
      if (count <= 0) {
        for (int64_t n = 0; n < kTileNumbers; ++n) V::store(part + n * number_stride, V::zero());
        continue;
      }
      typename V::type half_way[side][6];  // by column of the tile
      for (int column = 0; column < side; ++column) {
        typename V::type values[4] = {};
#pragma GCC unroll 4
        for (int row = 0; row < side; ++row) {
          values[row] = V::load_some(pixels[row * side + column] + panel + c, count);
        }
        gradient_points<V, side>(values, half_way[column]);
      }
#pragma GCC unroll 6
      for (int row = 0; row < 6; ++row) {
        typename V::type values[4] = {}, numbers[6];
#pragma GCC unroll 4
        for (int column = 0; column < side; ++column) values[column] = half_way[column][row];
        gradient_points<V, side>(values, numbers);
#pragma GCC unroll 6
        for (int column = 0; column < 6; ++column) {
          V::store(part + (row * 6 + column) * number_stride, numbers[column]);
        }
      }
    }
  }
}

template <class V>
void transform_gradient(const float* const* pixels, int64_t side, int64_t channels, float* to,
                        int64_t panel_stride, int64_t number_stride) {
  if (side == 3) {
    transform_gradient_tile<V, 3>(pixels, channels, to, panel_stride, number_stride);
  } else {
    transform_gradient_tile<V, 4>(pixels, channels, to, panel_stride, number_stride);
  }
}

template <class V, int rows, int vectors>
void add_outer(int64_t count, const float* inputs, const float* outputs, float* sums) {
  constexpr int depth = ConvolutionKernel::depth, columns = ConvolutionKernel::columns;
  for (int first = 0; first < columns; first += vectors * V::lanes) {
    for (int row = 0; row < depth; row += rows) {
      float* const to = sums + row * columns + first;
      // Sums of their own, which round less than ever longer ones.
      typename V::type added[rows][vectors] = {};
      for (int64_t t = 0; t < count; ++t) {
        typename V::type right[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) right[v] = V::load(outputs + t * columns + first + v * V::lanes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const typename V::type left = V::broadcast(inputs[t * depth + row + r]);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) added[r][v] = V::multiply_add(left, right[v], added[r][v]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          float* const sum = to + r * columns + v * V::lanes;
          V::store(sum, V::load(sum) + added[r][v]);
        }
      }
    }
  }
}

template <class V, int side>
void transform_kernel_sums(const float* sums, int64_t number_stride, float* kernels) {
  constexpr int columns = ConvolutionKernel::columns;
  for (int c = 0; c < columns; c += V::lanes) {
    typename V::type half_way[6][side];  // by column of the numbers
    for (int column = 0; column < 6; ++column) {
      typename V::type values[6];
#pragma GCC unroll 6
      for (int row = 0; row < 6; ++row) {
        values[row] = V::load(sums + (row * 6 + column) * number_stride + c);
      }
      points_of_weight<V, side>(values, half_way[column]);
    }
    for (int row = 0; row < side; ++row) {
      typename V::type values[6], pixels[side];
#pragma GCC unroll 6
      for (int column = 0; column < 6; ++column) values[column] = half_way[column][row];
      points_of_weight<V, side>(values, pixels);
      for (int column = 0; column < side; ++column) {
        V::store(kernels + (row * side + column) * columns + c, pixels[column]);
      }
    }
  }
}

template <class V>
void transform_sums(const float* sums, int64_t number_stride, int64_t side, float* kernels) {
  if (side == 3) {
    transform_kernel_sums<V, 3>(sums, number_stride, kernels);
  } else {
    transform_kernel_sums<V, 4>(sums, number_stride, kernels);
  }
}

// `outer`: of depth, so that twice as many sums, two vectors and a number fit into the registers.
template <class V, int rows, int outer>
constexpr ConvolutionKernel kernel() {
  static_assert(ConvolutionKernel::depth % outer == 0);
  return {rows,
          transform_weights<V>,
          transform_input<V>,
          multiply<V, rows, 2>,
          transform_output<V, 3>,
          transform_output<V, 4>,
          transform_gradient<V>,
          add_outer<V, outer, 2>,
          transform_sums<V>};
}

}  // namespace

// Two vectors of `rows` sums each leave registers for two vectors of the panel and a tile's number.
#if defined(__AVX512F__)
const ConvolutionKernel convolution_kernel = kernel<Simd, 14, 8>();
#elif defined(__AVX2__)
const ConvolutionKernel convolution_kernel = kernel<Simd, 6, 4>();
#else
const ConvolutionKernel convolution_kernel = kernel<Simd, 4, 4>();
#endif

}  // namespace pydefect::cpu::PYDEFECT_LEVEL
