#include "components.h"

#include <cstring>
#include <utility>

namespace pydefect {
namespace {

// Where the next pixel from `column` on is that is a defect (or is none); the number of columns if nowhere.
template <class Value>
int64_t next_column(const std::byte* row, int64_t stride, int64_t column, int64_t columns, bool defect) {
  constexpr int64_t kWord = sizeof(uint64_t) / sizeof(Value);
  while (column < columns) {
    // Most of most masks is zero: eight bytes at a time.
    if (defect && stride == sizeof(Value) && column + kWord <= columns) {
      uint64_t word;
      std::memcpy(&word, row + column * stride, sizeof(word));
      if (word == 0) {
        column += kWord;
        continue;
      }
    }
    Value value;
    std::memcpy(&value, row + column * stride, sizeof(Value));
    if ((value != 0) == defect) return column;
    ++column;
  }
  return columns;
}

template <class Value>
void append_stretches(const View& mask, int64_t row, std::vector<Stretch>& stretches) {
  const std::byte* data = mask.data + row * mask.row_stride;
  for (int64_t end = 0; end < mask.columns;) {
    const int64_t begin = next_column<Value>(data, mask.column_stride, end, mask.columns, true);
    if (begin == mask.columns) return;
    end = next_column<Value>(data, mask.column_stride, begin, mask.columns, false);
    stretches.push_back({row, begin, end, 0});
  }
}

int64_t root(std::vector<int64_t>& parents, int64_t index) {
  while (parents[index] != index) {
    parents[index] = parents[parents[index]];
    index = parents[index];
  }
  return index;
}

// The smaller index stays the root, so that a component's root is its first stretch.
void join(std::vector<int64_t>& parents, int64_t a, int64_t b) {
  a = root(parents, a);
  b = root(parents, b);
  if (a < b)
    parents[b] = a;
  else
    parents[a] = b;
}

}  // namespace

Components find_components(const View& mask) {
  Components found;
  if (mask.data == nullptr) return found;
  auto& stretches = found.stretches;
  std::vector<int64_t> parents;
  size_t above_begin = 0, above_end = 0;  // the stretches of the row above
  for (int64_t row = 0; row < mask.rows; ++row) {
    const size_t here = stretches.size();
    if (mask.item_size == 1)
      append_stretches<uint8_t>(mask, row, stretches);
    else
      append_stretches<uint16_t>(mask, row, stretches);
    size_t above = above_begin;
    for (size_t i = here; i < stretches.size(); ++i) {
      parents.push_back(static_cast<int64_t>(i));
      // Corners touch: [begin, end) meets what begins at its end or ends at its begin.
      while (above < above_end && stretches[above].end < stretches[i].begin) ++above;
      for (size_t other = above; other < above_end && stretches[other].begin <= stretches[i].end; ++other)
        join(parents, static_cast<int64_t>(i), static_cast<int64_t>(other));
    }
    above_begin = here;
    above_end = stretches.size();
  }
  std::vector<int64_t> numbers(stretches.size());
  for (size_t i = 0; i < stretches.size(); ++i) {
    const int64_t first = root(parents, static_cast<int64_t>(i));
    if (first == static_cast<int64_t>(i)) {
      numbers[i] = static_cast<int64_t>(found.areas.size());
      found.areas.push_back(0);
    }
    stretches[i].component = numbers[first];
    found.areas[numbers[first]] += stretches[i].end - stretches[i].begin;
  }
  return found;
}

}  // namespace pydefect
