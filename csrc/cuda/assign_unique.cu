// Algorithm 1's choice of patches on CUDA: the walk over the centres, by one block. A warp looks a centre's
// candidates, from a k-NN search, through for the first one that is free; where all are taken the whole block
// measures the centre against every free patch. All distances are measured directly, in the order of the
// CPU's kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "../ranking_key.h"
#include "common.cuh"
#include "reductions.cuh"

namespace pydefect::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kHalf = kWarp / 2;
constexpr int kHalves = kThreads / kHalf;

__global__ void __launch_bounds__(kThreads)
    walk(const float* bank,          // [centres, width]
         const float* patches,       // [patch_count, width]
         const int64_t* candidates,  // [centres, candidate_count]
         int64_t centres, int64_t patch_count, int width, int candidate_count,
         int* taken,         // [patch_count], zero before
         int64_t* chosen) {  // [centres]
  __shared__ int64_t found;
  __shared__ RankingKey keys[kHalves];
  const int lane = threadIdx.x % kWarp;
  const int half = threadIdx.x / kHalf;
  for (int64_t centre = 0; centre < centres; ++centre) {
    if (threadIdx.x < kWarp) {
      int64_t patch = -1;
      for (int first = 0; first < candidate_count && patch < 0; first += kWarp) {
        const int64_t mine =
            first + lane < candidate_count ? candidates[centre * candidate_count + first + lane] : -1;
        // Nobody has checked the indices: foreign ones are no candidates.
        const bool free = mine >= 0 && mine < patch_count && taken[mine] == 0;
        const unsigned lanes = __ballot_sync(kAllLanes, free);
        if (lanes != 0) patch = __shfl_sync(kAllLanes, mine, __ffs(lanes) - 1);
      }
      if (lane == 0) found = patch;
    }
    __syncthreads();
    if (found < 0) {
      RankingKey best = ~RankingKey{0};
      for (int64_t base = 0; base < patch_count; base += kHalves) {
        const int64_t i = base + half;
        const int64_t safe = i < patch_count ? i : patch_count - 1;
        const float distance = squared_distance(patches + safe * width, bank + centre * width, width);
        if (i >= patch_count || taken[i] != 0) continue;
        const RankingKey key = ranking_key(distance, i);
        best = key < best ? key : best;
      }
      if (threadIdx.x % kHalf == 0) keys[half] = best;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int h = 1; h < kHalves; ++h) best = keys[h] < best ? keys[h] : best;
        found = key_row(best);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      taken[found] = 1;
      chosen[centre] = found;
    }
    __syncthreads();
  }
}

Tensor assign_unique(const Tensor& bank_given, const Tensor& patches_given, const Tensor& candidates_given) {
  check_assign_unique(bank_given, patches_given, candidates_given);
  const Device device(bank_given);
  const Tensor bank = in_order("assign_unique", "bank", bank_given);
  const Tensor patches = in_order("assign_unique", "patches", patches_given);
  const Tensor candidates = in_order("assign_unique", "candidates", candidates_given);
  Tensor chosen = new_of(bank, {bank.size(0)}, torch::headeronly::ScalarType::Long);
  if (bank.size(0) == 0) return chosen;
  const Tensor taken = torch::stable::new_zeros(bank, {patches.size(0)}, torch::headeronly::ScalarType::Int);
  device.launch("assign_unique: walk", walk, 1, kThreads, 0, bank.const_data_ptr<float>(),
                patches.const_data_ptr<float>(), candidates.const_data_ptr<int64_t>(), bank.size(0),
                patches.size(0), static_cast<int>(patches.size(1)), static_cast<int>(candidates.size(1)),
                taken.mutable_data_ptr<int32_t>(), chosen.mutable_data_ptr<int64_t>());
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(pydefect, PYDEFECT_CUDA_KEY, library) {
  library.impl("assign_unique", TORCH_BOX(&assign_unique));
}

}  // namespace
}  // namespace pydefect::cuda
