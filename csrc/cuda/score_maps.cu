// Patch scores, bilinear upsampling and Gaussian smoothing on CUDA. The last two are linear and separable:
// along each axis they are one banded matrix. It is made on the device in every call, which costs less than a
// copy from the host, and which a CUDA graph can capture.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../checks.h"
#include "bilinear.cuh"
#include "common.cuh"

namespace pydefect::cuda {
namespace {

constexpr int kThreads = 128;

// Pixel p is the sum of weights[p, i] * patch i over first <= i < end.
struct Band {
  const float* weights;  // [pixels, patches]
  const int* ends;       // [pixels, 2]: first, end
};

// The border repeats the picture mirrored, its last pixel included, as often as needed.
__device__ int64_t mirrored(int64_t index, int64_t size) {
  const int64_t within = ((index % (2 * size)) + 2 * size) % (2 * size);
  return within < size ? within : 2 * size - 1 - within;
}

// One block a pixel. scipy.ndimage.gaussian_filter1d(truncate=4, mode="reflect") after the upsampling, in
// double like there. The block computes its threads' number of Gaussian weights at a time, for all patches.
__global__ void make_band(int patches, int pixels, double sigma,
                          float* weights,  // [pixels, patches]
                          int* ends) {     // [pixels, 2]
  __shared__ double gaussians[kThreads];
  __shared__ Between<double> places[kThreads];
  __shared__ int low;
  __shared__ int high;
  const int64_t pixel = blockIdx.x;
  const auto radius = static_cast<int64_t>(4.0 * sigma + 0.5);
  if (threadIdx.x == 0) {
    low = patches;
    high = 0;
  }
  for (int first_patch = 0; first_patch < patches; first_patch += kThreads) {
    const int patch = first_patch + static_cast<int>(threadIdx.x);
    double sum = 0.0;
    double total = 0.0;
    for (int64_t first = -radius; first <= radius; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      const auto x = static_cast<double>(i);
      __syncthreads();  // the last round's readers are done
      gaussians[threadIdx.x] = sigma > 0.0 ? exp(-0.5 * x * x / (sigma * sigma)) : 1.0;
      places[threadIdx.x] = between<double>(mirrored(pixel + i, pixels), patches, pixels);
      __syncthreads();
      const auto count = static_cast<int>(min(radius - first + 1, int64_t{kThreads}));
      for (int j = 0; j < count; ++j) {
        const Between<double>& place = places[j];
        total += gaussians[j];
        sum += gaussians[j] * ((place.low == patch ? place.low_weight : 0.0) +
                               (place.high == patch ? place.high_weight : 0.0));
      }
    }
    if (patch >= patches) continue;
    weights[pixel * patches + patch] = static_cast<float>(sum / total);
    if (sum > 0.0) {
      atomicMax(&high, patch + 1);
      atomicMin(&low, patch);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ends[2 * pixel] = low;
    ends[2 * pixel + 1] = high;
  }
}

// Equation (9) for every patch: exp(-S) / sum exp(-D_k), divided through by exp(-S), so that nothing
// underflows.
__global__ void find_scores(const float* distances,  // [count, neighbours]
                            int64_t count, int neighbours, bool certainty,
                            float* scores) {  // [count]
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    const float* own = distances + i * neighbours;
    float nearest = own[0];
    for (int k = 1; k < neighbours; ++k) {
      // NaN wins.
      nearest = own[k] < nearest || own[k] != own[k] ? own[k] : nearest;
    }
    if (certainty) {
      float sum = 0.0f;
      for (int k = 0; k < neighbours; ++k) sum += expf(nearest - own[k]);
      nearest /= sum;
    }
    scores[i] = nearest;
  }
}

// lines[line, pixel] = sum over the pixel's patches of weight * scores[line, patch].
__global__ void spread_columns(const float* scores,  // [lines, patches]
                               Band band, int64_t lines, int patches, int pixels,
                               float* spread) {  // [lines, pixels]
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < lines * pixels;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t line = i / pixels;
    const int64_t pixel = i % pixels;
    const float* weights = band.weights + pixel * patches;
    float sum = 0.0f;
    for (int p = band.ends[2 * pixel]; p < band.ends[2 * pixel + 1]; ++p) {
      sum = fmaf(weights[p], scores[line * patches + p], sum);
    }
    spread[i] = sum;
  }
}

// maps[image, y, x] = sum over the row's lines of weight * spread[image, line, x].
__global__ void spread_rows(const float* spread,  // [batch, lines, width]
                            Band band, int64_t batch, int lines, int64_t height, int64_t width,
                            float* maps) {  // [batch, height, width]
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < batch * height * width;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t x = i % width;
    const int64_t y = i / width % height;
    const int64_t image = i / width / height;
    const float* weights = band.weights + y * lines;
    float sum = 0.0f;
    for (int line = band.ends[2 * y]; line < band.ends[2 * y + 1]; ++line) {
      sum = fmaf(weights[line], spread[(image * lines + line) * width + x], sum);
    }
    maps[i] = sum;
  }
}

class Axis {
 public:
  Axis(const Device& device, const Tensor& like, int64_t patches, int64_t pixels, double sigma)
      : weights_(new_floats(like, {pixels, patches})),
        ends_(new_of(like, {pixels, 2}, torch::headeronly::ScalarType::Int)) {
    device.launch("score_maps: make_band", make_band, pixels, kThreads, 0, patches, pixels, sigma,
                  weights_.mutable_data_ptr<float>(), ends_.mutable_data_ptr<int32_t>());
  }

  Band band() const { return {weights_.const_data_ptr<float>(), ends_.const_data_ptr<int32_t>()}; }

 private:
  Tensor weights_;
  Tensor ends_;
};

std::tuple<Tensor, Tensor> score_maps(const Tensor& distances_given, int64_t height, int64_t width,
                                      double sigma, bool certainty) {
  check_score_maps(distances_given, height, width, sigma);
  const Device device(distances_given);
  const Tensor distances = in_order("score_maps", "distances", distances_given);
  const int64_t batch = distances.size(0);
  const int64_t rows = distances.size(1);
  const int64_t columns = distances.size(2);
  Tensor scores = new_floats(distances, {batch, rows, columns});
  Tensor maps = new_floats(distances, {batch, height, width});
  if (batch == 0) return {scores, maps};

  const Axis row_axis(device, distances, rows, height, sigma);
  const Axis column_axis(device, distances, columns, width, sigma);
  const Tensor spread = new_floats(distances, {batch, rows, width});
  const auto blocks = [&](int64_t count) { return blocks_for(device, divide_up(count, kThreads)); };
  device.launch("score_maps: find_scores", find_scores, blocks(batch * rows * columns), kThreads, 0,
                distances.const_data_ptr<float>(), batch * rows * columns, distances.size(3), certainty,
                scores.mutable_data_ptr<float>());
  device.launch("score_maps: spread_columns", spread_columns, blocks(batch * rows * width), kThreads, 0,
                scores.const_data_ptr<float>(), column_axis.band(), batch * rows, columns, width,
                spread.mutable_data_ptr<float>());
  device.launch("score_maps: spread_rows", spread_rows, blocks(batch * height * width), kThreads, 0,
                spread.const_data_ptr<float>(), row_axis.band(), batch, rows, height, width,
                maps.mutable_data_ptr<float>());
  return {scores, maps};
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("score_maps", TORCH_BOX(&score_maps));
}

}  // namespace
}  // namespace pydefect::cuda
