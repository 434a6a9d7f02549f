// When may a k-NN search trust the expanded form |x|^2 - 2 s(y), s(y) = x.y - |y|^2 / 2 ?
//
// The search keeps the rows with the largest computed scores s, measures those directly as sum (x_i - y_i)^2
// and orders them by that. A row that was not kept has a computed score of at most `worst`. Rounding moves a
// computed score by at most
//     E = g(D + 8) |Y| (|Y| + |x|),   g(n) = n u / (1 - n u),   u = 2^-24,
// where |Y| is the largest norm of the bank (an inner product of D terms and one start value, in any order of
// summation, with or without FMA; the start value carries the error of its own sum), plus the smallest normal
// number per operation where underflow is flushed. So its true squared distance is at least
// |x|^2 - 2 (worst + E), and its directly computed one at least (1 - g(D + 8)) of that. If this exceeds the
// k-th distance found, no row outside the kept ones belongs in the answer, and the answer equals, bit for
// bit, that of measuring every row directly. Otherwise the query is searched again, exhaustively.
#pragma once

#include <cfloat>
#include <cstdint>

#include "host_device.h"

namespace pydefect {

// How many rows more than k a search keeps, so that near ties of the k-th seldom need the exhaustive search.
constexpr int kSpareCandidates = 4;

PYDEFECT_HOST_DEVICE inline bool no_closer_row_outside(double query_norm, double bank_norm, double worst,
                                                       double kth_distance, int64_t width) {
  const double roundings = (static_cast<double>(width) + 8.0) * 0x1p-24;
  if (!(roundings < 0.5)) return false;
  const double growth = roundings / (1.0 - roundings);
  const double largest_score = bank_norm * (bank_norm + query_norm);
  // Beyond this a float may have overflowed on the way; the negated form also catches NaN.
  if (!(largest_score < static_cast<double>(FLT_MAX) / 4.0)) return false;
  const double score_error = growth * largest_score + 2.0 * static_cast<double>(width) * FLT_MIN;
  const double squared_norm = query_norm * query_norm;
  // The last factor covers the roundings of the norms and of this very expression, made in double precision.
  const double bound = squared_norm - 2.0 * (worst + score_error) - 1e-12 * (squared_norm + largest_score);
  return bound * (1.0 - growth) > kth_distance;
}

}  // namespace pydefect
