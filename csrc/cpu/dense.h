// Fully connected layers on single vectors, forward and backward: the small part of a channel attention.
#pragma once

#include <cstdint>

namespace pydefect::cpu {

// Sixteen partial sums, so that the compiler may use vectors without changing the order of additions.
inline float dot(const float* a, const float* b, int64_t length) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (int j = 0; i + j < length; ++j) sums[j] += a[i + j] * b[i + j];
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// out = weight @ in + bias
inline void dense(const float* weight,  // [outputs, inputs]
                  const float* bias,    // [outputs]
                  const float* in,      // [inputs]
                  int64_t outputs, int64_t inputs, float* out) {
  for (int64_t o = 0; o < outputs; ++o) out[o] = dot(weight + o * inputs, in, inputs) + bias[o];
}

// Adds to the gradients of weight, bias and in.
inline void dense_backward(const float* d_out,   // [outputs]
                           const float* weight,  // [outputs, inputs]
                           const float* in,      // [inputs]
                           int64_t outputs, int64_t inputs, float* d_weight, float* d_bias, float* d_in) {
  for (int64_t o = 0; o < outputs; ++o) {
    const float* row = weight + o * inputs;
    float* d_row = d_weight + o * inputs;
    for (int64_t i = 0; i < inputs; ++i) {
      d_row[i] += d_out[o] * in[i];
      d_in[i] += d_out[o] * row[i];
    }
    d_bias[o] += d_out[o];
  }
}

// NaN stays NaN.
inline void relu(float* values, int64_t length) {
  for (int64_t i = 0; i < length; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
}

// The gradient before the ReLU, given its result.
inline void relu_backward(const float* result, int64_t length, float* gradient) {
  for (int64_t i = 0; i < length; ++i) gradient[i] = result[i] > 0.0f ? gradient[i] : 0.0f;
}

}  // namespace pydefect::cpu
