// Connected components of a mask, as stretches of rows: what is no defect costs no memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pydefect {

// A borrowed image of any strides (bytes). Masks have values of 1 or 2 bytes; all but 0 is a defect.
struct View {
  const std::byte* data = nullptr;  // null: an empty mask
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 0;
  int item_size = 0;
};

// Defective pixels [begin, end) of one row.
struct Stretch {
  int64_t row, begin, end;
  int64_t component;
};

struct Components {
  std::vector<Stretch> stretches;  // by row, then by column
  std::vector<int64_t> areas;      // pixels of every component
};

// 8-neighbourhood; components are numbered by their first pixel in reading order.
Components find_components(const View& mask);

}  // namespace pydefect
