#include "metrics.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace pydefect {
namespace {

// Pixels that are sorted together: keys and their spare copy stay in the second-level cache, more or less.
constexpr int64_t kChunk = 1 << 19;

// A run numbers its regions with 16 bits.
constexpr int64_t kRegionsOfRun = 1 << 16;

// A window is sorted if it has at most this many scores, and else counted key by key, bin by bin.
constexpr int64_t kSmallestWindow = 1 << 14;

// So many windows at most, or nearly: each looks its part up in every run.
constexpr int64_t kWindows = 1 << 11;

constexpr uint32_t kSign = uint32_t{1} << 31;

// Keys order like scores; -0 and 0 have one key.
uint32_t key_of_score(float score) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | kSign);
}

float score_of_key(uint32_t key) {
  return std::bit_cast<float>(key & kSign ? key ^ kSign : ~key);
}

// The threshold that a score must exceed to be called together with `key`.
float threshold_under(uint32_t key) {
  return std::nextafter(score_of_key(key), -std::numeric_limits<float>::infinity());
}

uint32_t key_of(uint32_t key) {
  return key;
}
uint32_t key_of(uint64_t key_and_region) {
  return static_cast<uint32_t>(key_and_region >> 32);
}

uint64_t with_region(uint32_t key, int64_t region) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(region);
}

uint32_t bin_of(uint32_t key) {
  return key >> 16;
}

// Writes the keys of `count` scores; false if one is not finite.
bool write_keys(const std::byte* scores, int64_t stride, int64_t count, uint32_t* keys) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t not_finite = 0;
  const auto write = [&](int64_t i, int64_t step) {
    float score;
    std::memcpy(&score, scores + i * step, sizeof(score));
    not_finite |= static_cast<uint32_t>((std::bit_cast<uint32_t>(score) & kExponent) == kExponent);
    keys[i] = key_of_score(score);
  };
  if (stride == sizeof(float)) {  // a constant, so that the compiler uses vectors
    for (int64_t i = 0; i < count; ++i) write(i, sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) write(i, stride);
  }
  return not_finite == 0;
}

// Sorts by key >> drop, where all keys are at least `low` and key - low has `bits` bits; stable. Returns
// where the result lies: in `values` or in `spare`.
template <class Value>
Value* radix_sort(Value* values, Value* spare, int64_t size, uint32_t low, int bits, int drop = 0) {
  constexpr int kDigit = 11;
  if (size < 256) {  // clearing counters would take longer
    std::sort(values, values + size);
    return values;
  }
  const int passes = (std::max(bits - drop, 0) + kDigit - 1) / kDigit;
  const int digit = passes == 0 ? 0 : (bits - drop + passes - 1) / passes;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = drop + pass * digit;
    const uint32_t mask = (uint32_t{1} << digit) - 1;
    const auto place = [&](Value value) { return (key_of(value) - low) >> shift & mask; };
    std::array<int64_t, 1 << kDigit> starts{};
    for (int64_t i = 0; i < size; ++i) ++starts[place(values[i])];
    int64_t start = 0;
    for (auto& count : starts) count = std::exchange(start, start + count);
    for (int64_t i = 0; i < size; ++i) spare[starts[place(values[i])]++] = values[i];
    std::swap(values, spare);
  }
  return values;
}

struct KeyRange {
  uint32_t least = ~uint32_t{0}, largest = 0;
};

template <class Value>
KeyRange range_of(const Value* values, int64_t size) {
  KeyRange range;
  for (int64_t i = 0; i < size; ++i) {
    range.least = std::min(range.least, key_of(values[i]));
    range.largest = std::max(range.largest, key_of(values[i]));
  }
  return range;
}

// Sorts by bin alone.
template <class Value>
Value* group_by_bin(Value* values, Value* spare, int64_t size, KeyRange range) {
  const uint32_t low = bin_of(range.least) << 16;
  return radix_sort(values, spare, size, low, std::bit_width(range.largest - low), 16);
}

// Memory that is not touched before it is written.
template <class Value>
struct Buffer {
  std::unique_ptr<Value[]> data;
  int64_t size = 0;

  Value* at_least(int64_t wanted) {
    if (wanted > size) {
      data.reset();
      data = std::make_unique_for_overwrite<Value[]>(wanted);
      size = wanted;
    }
    return data.get();
  }
};

// The part of a run's keys in the bins from `first` to `last`. Bins are grouped: all keys before a bin's
// first one are smaller.
std::array<int64_t, 2> part_of(const uint32_t* keys, int64_t size, uint32_t first, uint32_t last) {
  const auto begin = std::lower_bound(keys, keys + size, first << 16);
  const auto end =
      std::partition_point(begin, keys + size, [&](uint32_t key) { return bin_of(key) <= last; });
  return {begin - keys, end - keys};
}

using Wide = unsigned __int128;

struct Called {
  int64_t hits = 0, false_alarms = 0;
  uint32_t key = 0;

  // F1 is 2 hits / (hits + false alarms + defective): compared without rounding, so that ties are ties.
  bool at_least_as_good_as(const Called& other, int64_t defective) const {
    return static_cast<Wide>(hits) * (other.hits + other.false_alarms + defective) >=
           static_cast<Wide>(other.hits) * (hits + false_alarms + defective);
  }
};

// The area under a curve of overlap over false positives, up to so many false positives.
struct Area {
  double limit;
  double value = 0;

  double within(int64_t false_positives) const {
    return std::min(static_cast<double>(false_positives), limit);
  }
  void add_level(int64_t from, int64_t count, double height) {
    value += (within(from + count) - within(from)) * height;
  }
  void add_rise(int64_t from, int64_t count, double height, double rise) {
    const double length = within(from + count) - within(from);
    if (length > 0) value += length * (height + rise * (length / static_cast<double>(count)) / 2);
  }
};

std::vector<Area> areas_up_to(const std::vector<double>& limits, int64_t normal) {
  std::vector<Area> areas;
  for (const double limit : limits) areas.push_back({limit * static_cast<double>(normal)});
  return areas;
}

}  // namespace

// Neighbouring bins that are evaluated together, and what lies above them.
struct ScoreSet::Window {
  uint32_t first_bin, last_bin;
  bool counted;
  int64_t true_positives, false_positives;  // scores of higher bins
  int64_t normal;                           // scores in the window
};

// What a thread needs for its windows.
struct ScoreSet::Workspace {
  Buffer<uint32_t> normal, normal_spare;
  Buffer<uint64_t> defective, defective_spare, saturated, saturated_spare;
  // By the lower 16 bits of a key, all 0 between two windows.
  std::vector<int64_t> normal_counts, defective_counts;
  std::vector<double> component_shares, region_shares;
};

// What is to become part of the set when nothing can fail any more.
struct ScoreSet::Added {
  std::vector<Run> normal, defective, saturated;
  std::vector<double> component_shares, region_shares;
};

namespace {

template <class Value>
void reserve_for(std::vector<Value>& values, size_t more) {
  if (values.capacity() < values.size() + more)
    values.reserve(std::max(values.size() + more, 2 * values.size()));
}

// A run of keys that need no number of a region, or all have the same.
template <class Run>
Run plain_run(uint32_t* keys, int64_t size, int64_t region = 0) {
  Run run;
  run.keys.reset(new uint32_t[size]);
  run.size = size;
  run.first_region = region;
  const KeyRange range = range_of(keys, size);
  run.least = range.least;
  run.largest = range.largest;
  const uint32_t* grouped = group_by_bin(keys, run.keys.get(), size, range);
  if (grouped != run.keys.get()) std::copy_n(grouped, size, run.keys.get());
  return run;
}

// A run of keys with the numbers of their regions, which count from `first_region`.
template <class Run>
Run numbered_run(std::vector<uint64_t>& entries, int64_t first_region) {
  std::vector<uint64_t> spare(entries.size());
  const auto size = static_cast<int64_t>(entries.size());
  const KeyRange range = range_of(entries.data(), size);
  const uint64_t* grouped = group_by_bin(entries.data(), spare.data(), size, range);
  Run run;
  run.keys.reset(new uint32_t[size]);
  run.regions.reset(new uint16_t[size]);
  run.size = size;
  run.first_region = first_region;
  run.least = range.least;
  run.largest = range.largest;
  for (int64_t i = 0; i < size; ++i) {
    run.keys[i] = key_of(grouped[i]);
    run.regions[i] = static_cast<uint16_t>(grouped[i]);
  }
  return run;
}

const std::byte* pixel(const View& view, int64_t row, int64_t column) {
  return view.data + row * view.row_stride + column * view.column_stride;
}

void require_finite(bool finite) {
  if (!finite) throw std::domain_error("some are not finite");
}

}  // namespace

void ScoreSet::add_labelled(const float* scores, const uint8_t* labels, int64_t count, int threads) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  Added added;
  added.normal.resize(chunks);
  added.defective.resize(chunks);
  std::atomic<bool> finite{true};
  std::vector<Buffer<uint32_t>> spaces(threads);
  share_out(chunks, threads, [&](int64_t chunk, int thread) {
    const int64_t begin = chunk * kChunk, size = std::min(kChunk, count - begin);
    // All keys, then the normal ones from the front and the defective ones from the back.
    uint32_t* keys = spaces[thread].at_least(2 * size);
    uint32_t* split = keys + size;
    if (!write_keys(reinterpret_cast<const std::byte*>(scores + begin), sizeof(float), size, keys))
      finite = false;
    int64_t normal = 0;
    for (int64_t i = 0; i < size; ++i) {
      const bool defective = labels[begin + i] != 0;
      split[defective ? size - 1 - (i - normal) : normal] = keys[i];
      normal += !defective;
    }
    added.normal[chunk] = plain_run<Run>(split, normal);
    added.defective[chunk] = plain_run<Run>(split + normal, size - normal);
  });
  require_finite(finite);
  commit(std::move(added));
}

void ScoreSet::add_images(const std::vector<ScoredImage>& images, int threads) {
  struct Band {
    size_t image;
    int64_t first_row, end_row;
  };
  std::vector<Components> components(images.size());
  share_out(static_cast<int64_t>(images.size()), threads,
            [&](int64_t image, int) { components[image] = find_components(images[image].mask); });

  Added added;
  std::vector<Band> bands;
  std::vector<int64_t> first_component, first_region;
  std::vector<size_t> first_run;
  size_t defective_runs = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    const View& scores = images[i].scores;
    const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, scores.columns));
    for (int64_t row = 0; row < scores.rows; row += rows)
      bands.push_back({i, row, std::min(row + rows, scores.rows)});
    first_component.push_back(static_cast<int64_t>(added.component_shares.size()));
    for (const int64_t area : components[i].areas)
      added.component_shares.push_back(1.0 / static_cast<double>(area));
    first_run.push_back(defective_runs);
    defective_runs += (components[i].areas.size() + kRegionsOfRun - 1) / kRegionsOfRun;
    first_region.push_back(static_cast<int64_t>(added.region_shares.size()));
    for (const auto& region : images[i].regions)
      added.region_shares.push_back(1.0 / static_cast<double>(region.saturation));
  }
  added.normal.resize(bands.size());
  added.defective.resize(defective_runs);
  added.saturated.resize(added.region_shares.size());

  std::atomic<bool> finite{true};
  std::vector<Buffer<uint32_t>> spaces(threads);
  share_out(static_cast<int64_t>(bands.size()), threads, [&](int64_t task, int thread) {
    const auto& [image, first_row, end_row] = bands[task];
    const View& scores = images[image].scores;
    const auto& stretches = components[image].stretches;
    uint32_t* keys = spaces[thread].at_least((end_row - first_row) * scores.columns);
    int64_t size = 0;
    auto stretch = std::partition_point(stretches.begin(), stretches.end(),
                                        [&](const Stretch& one) { return one.row < first_row; });
    for (int64_t row = first_row; row < end_row; ++row) {
      int64_t column = 0;
      const auto write_up_to = [&](int64_t end) {
        if (!write_keys(pixel(scores, row, column), scores.column_stride, end - column, keys + size))
          finite = false;
        size += end - column;
      };
      for (; stretch != stretches.end() && stretch->row == row; ++stretch) {
        write_up_to(stretch->begin);
        column = stretch->end;
      }
      write_up_to(scores.columns);
    }
    added.normal[task] = plain_run<Run>(keys, size);
  });

  share_out(static_cast<int64_t>(images.size()), threads, [&](int64_t image, int) {
    const ScoredImage& from = images[image];
    const auto number = static_cast<int64_t>(components[image].areas.size());
    size_t run = first_run[image];
    std::vector<uint32_t> keys;
    for (int64_t first = 0; first < number; first += kRegionsOfRun) {
      std::vector<uint64_t> entries;
      for (const auto& [row, begin, end, component] : components[image].stretches) {
        if (component < first || component >= first + kRegionsOfRun) continue;
        keys.resize(end - begin);
        if (!write_keys(pixel(from.scores, row, begin), from.scores.column_stride, end - begin, keys.data()))
          finite = false;
        for (const uint32_t key : keys) entries.push_back(with_region(key, component - first));
      }
      added.defective[run++] = numbered_run<Run>(entries, first_component[image] + first);
    }
    for (size_t i = 0; i < from.regions.size(); ++i) {
      std::vector<uint32_t> all;
      for (const auto& [row, begin, end, component] : find_components(from.regions[i].mask).stretches) {
        all.resize(all.size() + (end - begin));
        write_keys(pixel(from.scores, row, begin), from.scores.column_stride, end - begin,
                   all.data() + all.size() - (end - begin));
      }
      // Pixels beyond the saturation add nothing, whichever of equal ones they are.
      const auto saturation = from.regions[i].saturation;
      if (saturation < 1 || saturation > static_cast<int64_t>(all.size()))
        throw std::invalid_argument("a region's saturation must be 1 to its number of pixels");
      std::nth_element(all.begin(), all.begin() + (saturation - 1), all.end(), std::greater<>());
      const int64_t region = first_region[image] + static_cast<int64_t>(i);
      added.saturated[region] = plain_run<Run>(all.data(), saturation, region);
    }
  });
  require_finite(finite);
  commit(std::move(added));
}

void ScoreSet::commit(Added&& added) {
  const std::lock_guard lock(guard_);
  reserve_for(normal_, added.normal.size());
  reserve_for(defective_, added.defective.size());
  reserve_for(saturated_, added.saturated.size());
  reserve_for(component_shares_, added.component_shares.size());
  reserve_for(region_shares_, added.region_shares.size());
  const auto take = [&](std::vector<Run>& from, std::vector<Run>& to, int64_t regions, Histogram* bins,
                        int64_t* count) {
    for (Run& run : from) {
      if (run.size == 0) continue;
      run.first_region += regions;
      least_ = std::min(least_, run.least);
      largest_ = std::max(largest_, run.largest);
      if (bins != nullptr) {
        *count += run.size;
        const uint32_t* const end = run.keys.get() + run.size;
        for (const uint32_t* key = run.keys.get(); key < end;) {
          const uint32_t bin = bin_of(*key);
          // The next bin begins soon more often than not: steps that double.
          int64_t step = 1;
          while (step < end - key && bin_of(key[step]) == bin) step *= 2;
          const auto next = std::partition_point(key + step / 2, key + std::min<int64_t>(step, end - key),
                                                 [&](uint32_t other) { return bin_of(other) == bin; });
          (*bins)[bin] += next - key;
          key = next;
        }
      }
      to.push_back(std::move(run));
    }
  };
  take(added.normal, normal_, 0, &normal_bins_, &normal_count_);
  take(added.defective, defective_, components(), &defective_bins_, &defective_count_);
  take(added.saturated, saturated_, regions(), nullptr, nullptr);
  component_shares_.insert(component_shares_.end(), added.component_shares.begin(),
                           added.component_shares.end());
  region_shares_.insert(region_shares_.end(), added.region_shares.begin(), added.region_shares.end());
}

void ScoreSet::merge(const ScoreSet& other) {
  Added added;
  {
    const std::lock_guard lock(other.guard_);
    added = {other.normal_, other.defective_, other.saturated_, other.component_shares_,
             other.region_shares_};
  }
  commit(std::move(added));
}

std::vector<ScoreSet::Window> ScoreSet::windows() const {
  const int64_t most = std::max(kSmallestWindow, (normal_count_ + defective_count_) / kWindows);
  std::vector<Window> found;
  int64_t hits = 0, false_positives = 0;  // above the bin
  int64_t size = 0;                       // scores of the last window, and of the bins since then
  bool open = false;
  for (int bin = kBins - 1; bin >= 0; --bin) {
    const int64_t normal = normal_bins_[bin], defective = defective_bins_[bin];
    size += normal + defective;
    if (size > most) open = false;
    if (defective > 0) {
      const auto here = static_cast<uint32_t>(bin);
      if (open) {
        Window& window = found.back();
        window.first_bin = here;
        window.normal = false_positives + normal - window.false_positives;
      } else {
        size = normal + defective;
        found.push_back({here, here, size > most, hits, false_positives, normal});
        open = size <= most;
      }
    }
    hits += defective;
    false_positives += normal;
  }
  return found;
}

// Calls visit(key, gap, equal, hits, pro, spro) for every different key of a defective score, keys falling:
// `gap` normal scores lie between the key before (or the window's upper end) and this one, `equal` ones equal
// it, `hits` defective ones have it, and the overlap of components and of saturated regions grows by pro and
// spro.
template <class Visit>
void ScoreSet::walk(const Window& window, Workspace& space, const Visit& visit) const {
  if (window.counted)
    walk_counted(window, space, visit);
  else
    walk_sorted(window, space, visit);
}

template <class Visit>
void ScoreSet::walk_sorted(const Window& window, Workspace& space, const Visit& visit) const {
  const uint32_t low = window.first_bin << 16;
  const int bits = std::bit_width((window.last_bin << 16 | 0xffff) - low);
  const auto gather = [&](const std::vector<Run>& runs, auto& buffer, auto& spare, const auto& value) {
    std::vector<std::array<int64_t, 2>> parts;
    int64_t size = 0;
    for (const Run& run : runs) {
      parts.push_back(part_of(run.keys.get(), run.size, window.first_bin, window.last_bin));
      size += parts.back()[1] - parts.back()[0];
    }
    auto* values = buffer.at_least(size);
    int64_t filled = 0;
    for (size_t run = 0; run < runs.size(); ++run)
      for (int64_t i = parts[run][0]; i < parts[run][1]; ++i) values[filled++] = value(runs[run], i);
    return std::pair(radix_sort(values, spare.at_least(size), size, low, bits), size);
  };
  const auto entry = [](const Run& run, int64_t i) {
    return with_region(run.keys[i], run.first_region + (run.regions ? run.regions[i] : 0));
  };
  auto [normal, normal_left] = gather(normal_, space.normal, space.normal_spare,
                                      [](const Run& run, int64_t i) { return run.keys[i]; });
  auto [defective, defective_left] = gather(defective_, space.defective, space.defective_spare, entry);
  auto [saturated, saturated_left] = gather(saturated_, space.saturated, space.saturated_spare, entry);
  const bool has_components = !component_shares_.empty();
  while (defective_left > 0) {
    const uint32_t key = key_of(defective[defective_left - 1]);
    int64_t gap = 0, equal = 0, hits = 0;
    double pro = 0, spro = 0;
    for (; normal_left > 0 && normal[normal_left - 1] > key; --normal_left) ++gap;
    for (; normal_left > 0 && normal[normal_left - 1] == key; --normal_left) ++equal;
    for (; defective_left > 0 && key_of(defective[defective_left - 1]) == key; --defective_left) {
      ++hits;
      if (has_components) pro += component_shares_[static_cast<uint32_t>(defective[defective_left - 1])];
    }
    for (; saturated_left > 0 && key_of(saturated[saturated_left - 1]) == key; --saturated_left)
      spro += region_shares_[static_cast<uint32_t>(saturated[saturated_left - 1])];
    visit(key, gap, equal, hits, pro, spro);
  }
}

template <class Visit>
void ScoreSet::walk_counted(const Window& window, Workspace& space, const Visit& visit) const {
  const uint32_t bin = window.first_bin;
  if (space.normal_counts.empty()) {
    space.normal_counts.resize(1 << 16);
    space.defective_counts.resize(1 << 16);
    space.component_shares.resize(1 << 16);
    space.region_shares.resize(1 << 16);
  }
  const auto count = [&](const std::vector<Run>& runs, const auto& add) {
    for (const Run& run : runs) {
      const auto [begin, end] = part_of(run.keys.get(), run.size, bin, bin);
      for (int64_t i = begin; i < end; ++i) add(run, i, run.keys[i] & 0xffff);
    }
  };
  const auto region = [](const Run& run, int64_t i) {
    return run.first_region + (run.regions ? run.regions[i] : 0);
  };
  const bool has_components = !component_shares_.empty();
  count(normal_, [&](const Run&, int64_t, uint32_t key) { ++space.normal_counts[key]; });
  count(defective_, [&](const Run& run, int64_t i, uint32_t key) {
    ++space.defective_counts[key];
    if (has_components) space.component_shares[key] += component_shares_[region(run, i)];
  });
  count(saturated_, [&](const Run& run, int64_t i, uint32_t key) {
    space.region_shares[key] += region_shares_[region(run, i)];
  });
  int64_t gap = 0;
  for (int32_t key = 0xffff; key >= 0; --key) {
    const int64_t equal = std::exchange(space.normal_counts[key], 0);
    const int64_t hits = std::exchange(space.defective_counts[key], 0);
    if (hits == 0) {
      gap += equal;
      continue;
    }
    visit(bin << 16 | static_cast<uint32_t>(key), std::exchange(gap, 0), equal, hits,
          std::exchange(space.component_shares[key], 0), std::exchange(space.region_shares[key], 0));
  }
}

MetricsSummary ScoreSet::summary(const std::vector<double>& pro_limits,
                                 const std::vector<double>& spro_limits, int threads) const {
  const std::lock_guard lock(guard_);
  // Heights of a window's own areas count from the overlap above it, which is not known yet.
  struct Part {
    Wide wins = 0;  // pairs in the right order count 2, ties 1
    double precisions = 0;
    Called best;
    double pro = 0, spro = 0;
    std::vector<Area> pro_areas, spro_areas;
  };
  const auto pro_areas = areas_up_to(pro_limits, normal_count_);
  const auto spro_areas = areas_up_to(spro_limits, normal_count_);
  const std::vector<Window> all = windows();
  std::vector<Part> parts(all.size());
  std::vector<Workspace> spaces(threads);
  share_out(static_cast<int64_t>(all.size()), threads, [&](int64_t index, int thread) {
    const Window& window = all[index];
    Part part;
    part.pro_areas = pro_areas;
    part.spro_areas = spro_areas;
    int64_t hits = window.true_positives, false_alarms = window.false_positives;
    walk(window, spaces[thread],
         [&](uint32_t key, int64_t gap, int64_t equal, int64_t more, double pro, double spro) {
           for (Area& area : part.pro_areas) {
             area.add_level(false_alarms, gap, part.pro);
             area.add_rise(false_alarms + gap, equal, part.pro, pro);
           }
           for (Area& area : part.spro_areas) {
             area.add_level(false_alarms, gap, part.spro);
             area.add_rise(false_alarms + gap, equal, part.spro, spro);
           }
           part.pro += pro;
           part.spro += spro;
           hits += more;
           false_alarms += gap + equal;
           const int64_t below = normal_count_ - false_alarms;
           part.wins += static_cast<Wide>(more) * (2 * below + equal);
           part.precisions += static_cast<double>(more) * static_cast<double>(hits) /
                              static_cast<double>(hits + false_alarms);
           const Called called{hits, false_alarms, key};
           if (called.at_least_as_good_as(part.best, defective_count_)) part.best = called;
         });
    const int64_t left = window.false_positives + window.normal - false_alarms;
    for (Area& area : part.pro_areas) area.add_level(false_alarms, left, part.pro);
    for (Area& area : part.spro_areas) area.add_level(false_alarms, left, part.spro);
    parts[index] = std::move(part);
  });

  Wide wins = 0;
  double precisions = 0, pro = 0, spro = 0;
  Called best;
  auto pro_total = pro_areas, spro_total = spro_areas;
  int64_t reached = 0;  // normal scores so far
  const auto add_level = [&](int64_t up_to) {
    for (Area& area : pro_total) area.add_level(reached, up_to - reached, pro);
    for (Area& area : spro_total) area.add_level(reached, up_to - reached, spro);
    reached = up_to;
  };
  for (size_t i = 0; i < all.size(); ++i) {
    add_level(all[i].false_positives + all[i].normal);
    for (size_t j = 0; j < pro_total.size(); ++j) pro_total[j].value += parts[i].pro_areas[j].value;
    for (size_t j = 0; j < spro_total.size(); ++j) spro_total[j].value += parts[i].spro_areas[j].value;
    wins += parts[i].wins;
    precisions += parts[i].precisions;
    pro += parts[i].pro;
    spro += parts[i].spro;
    if (parts[i].best.at_least_as_good_as(best, defective_count_)) best = parts[i].best;
  }
  add_level(normal_count_);

  MetricsSummary result;
  const auto normal = static_cast<double>(normal_count_), defective = static_cast<double>(defective_count_);
  result.auroc = static_cast<double>(wins) / (2 * normal * defective);
  result.average_precision = precisions / defective;
  result.f1 = 2 * static_cast<double>(best.hits) /
              static_cast<double>(best.hits + best.false_alarms + defective_count_);
  result.f1_threshold = threshold_under(best.key);
  for (const Area& area : pro_total)
    result.pro.push_back(area.value / (area.limit * static_cast<double>(components())));
  for (const Area& area : spro_total)
    result.spro.push_back(area.value / (area.limit * static_cast<double>(regions())));
  return result;
}

OperatingPoints ScoreSet::operating_points(double step, int threads) const {
  const std::lock_guard lock(guard_);
  const std::vector<Window> all = windows();
  std::vector<Workspace> spaces(threads);
  std::vector<double> pro_above(all.size() + 1), spro_above(all.size() + 1);
  share_out(static_cast<int64_t>(all.size()), threads, [&](int64_t index, int thread) {
    walk(all[index], spaces[thread], [&](uint32_t, int64_t, int64_t, int64_t, double pro, double spro) {
      pro_above[index + 1] += pro;
      spro_above[index + 1] += spro;
    });
  });
  for (size_t i = 0; i < all.size(); ++i) {
    pro_above[i + 1] += pro_above[i];
    spro_above[i + 1] += spro_above[i];
  }

  struct Corner {
    float threshold;
    int64_t hits, false_alarms;
    double pro, spro;
  };
  const auto normal = static_cast<double>(normal_count_), defective = static_cast<double>(defective_count_);
  const double per_component = components() > 0 ? 1 / static_cast<double>(components()) : 0;
  const double per_region = regions() > 0 ? 1 / static_cast<double>(regions()) : 0;
  const auto precision = [](const Corner& corner) {
    const int64_t called = corner.hits + corner.false_alarms;
    return called == 0 ? 1.0 : static_cast<double>(corner.hits) / static_cast<double>(called);
  };
  const auto far = [&](const Corner& a, const Corner& b) {
    return static_cast<double>(a.hits - b.hits) >= step * defective ||
           static_cast<double>(a.false_alarms - b.false_alarms) >= step * normal ||
           std::abs(precision(a) - precision(b)) >= step || a.pro - b.pro >= step || a.spro - b.spro >= step;
  };
  std::vector<std::vector<Corner>> parts(all.size());
  share_out(static_cast<int64_t>(all.size()), threads, [&](int64_t index, int thread) {
    const Window& window = all[index];
    std::vector<Corner>& kept = parts[index];
    Corner waiting{};
    bool waits = false;
    // The corner before a far one is kept too: a long edge starts where it starts.
    const auto offer = [&](const Corner& corner) {
      if (!kept.empty() && !far(corner, kept.back())) {
        waiting = corner;
        waits = true;
        return;
      }
      if (waits) kept.push_back(waiting);
      kept.push_back(corner);
      waits = false;
    };
    Corner now{0, window.true_positives, window.false_positives, pro_above[index] * per_component,
               spro_above[index] * per_region};
    walk(window, spaces[thread],
         [&](uint32_t key, int64_t gap, int64_t equal, int64_t more, double pro, double spro) {
           now.false_alarms += gap;
           now.threshold = score_of_key(key);
           if (gap > 0 || kept.empty()) offer(now);
           now.false_alarms += equal;
           now.hits += more;
           now.pro += pro * per_component;
           now.spro += spro * per_region;
           now.threshold = threshold_under(key);
           offer(now);
         });
    if (waits) kept.push_back(waiting);
  });

  OperatingPoints points;
  const auto add = [&](const Corner& corner) {
    points.thresholds.push_back(corner.threshold);
    points.true_positives.push_back(corner.hits);
    points.false_positives.push_back(corner.false_alarms);
    points.pro.push_back(std::min(corner.pro, 1.0));
    points.spro.push_back(std::min(corner.spro, 1.0));
  };
  add({score_of_key(largest_), 0, 0, 0, 0});
  for (const auto& part : parts)
    for (const Corner& corner : part)
      if (corner.hits != points.true_positives.back() || corner.false_alarms != points.false_positives.back())
        add(corner);
  if (points.false_positives.back() != normal_count_)
    add({threshold_under(least_), defective_count_, normal_count_, pro_above.back() * per_component,
         spro_above.back() * per_region});
  return points;
}

std::array<int64_t, 2> ScoreSet::count_above(float threshold) const {
  const std::lock_guard lock(guard_);
  const uint32_t limit = key_of_score(threshold), bin = bin_of(limit);
  const auto count = [&](const std::vector<Run>& runs, const Histogram& bins) {
    int64_t above = 0;
    for (int64_t higher = bin + 1; higher < kBins; ++higher) above += bins[higher];
    for (const Run& run : runs) {
      const auto [begin, end] = part_of(run.keys.get(), run.size, bin, bin);
      above += std::count_if(run.keys.get() + begin, run.keys.get() + end,
                             [&](uint32_t key) { return key > limit; });
    }
    return above;
  };
  return {count(defective_, defective_bins_), count(normal_, normal_bins_)};
}

}  // namespace pydefect
