// When may a k-NN search trust the expanded form |x|^2 - 2 s(y), s(y) = x.y - |y|^2 / 2 ?
//
// The search keeps the rows with the largest computed scores s, measures those directly as sum (x_i - y_i)^2
// and orders them by that. A row that was not kept has a computed score of at most `worst`. Three things move
// a computed score or what it stands for. |x|, |Y|: the norms of the query and of the bank's largest row.
//
// 1. Scores of rounded vectors. Where the product is made of bf16(x) and bf16(y), with the roundings
//    e = x - bf16(x) and f = y - bf16(y), whose norms the search computes (|F|: the bank's largest),
//        |x.y - bf16(x).bf16(y)| = |e.y + bf16(x).f| <= |e| |Y| + (|x| + |e|) |F|     (Cauchy-Schwarz).
//    In float32 both roundings are zero.
// 2. Rounding of the sums, at most g(D + 8) B (B + X) with X = |x| + |e| and B = |Y| + |F|, the largest norms
//    that the rounded vectors can have, and g(n) = n u / (1 - n u), u = 2^-24: an inner product of D terms
//    and one start value, in any order of summation, with or without FMA; the start value carries the error
//    of its own sum. Products of two bf16 numbers are exact in float32. Where underflow is flushed, the
//    smallest normal number comes on top for each operation. The sum of 1 and 2 is E. The true |x - y|^2 is
//    then at least L = |x|^2 - 2 (worst + E).
// 3. Centring. Where x and y are the given vectors less a common centre, each subtraction rounds; by the
//    triangle inequality the given vectors' distance is at least sqrt(L) - u (|x| + |Y|), however far from
//    the origin they lie.
//
// Where only heads are scored, the first elements h and the norm r of the others, these stand for x and y:
// |(h, r)| = |x|, and their product (h, r).(h', r') is at least x.y (Cauchy-Schwarz), so every score is an
// upper bound of what it stands for and L remains one. Rounding r counts into e and f.
//
// And the directly computed squared distance is at least (1 - g(D + 8)) of the true one. If that bound
// exceeds the k-th distance found, no row outside the kept ones belongs in the answer, and the answer equals,
// bit for bit, that of measuring every row directly. Otherwise the query is searched again, exhaustively.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pydefect {

// How many rows more than k a search with lists of fixed length keeps, so that near ties of the k-th seldom
// need the exhaustive search.
constexpr int kSpareCandidates = 4;

// Of a vector, or the largest of several vectors.
struct VectorSize {
  double norm;
  double rounding = 0.0;  // norm of what rounding to bf16 takes away
};

// g(D + 8); infinite where that many roundings are too many for the argument.
PYDEFECT_HOST_DEVICE inline double rounding_growth(int64_t width) {
  const double roundings = (static_cast<double>(width) + 8.0) * 0x1p-24;
  return roundings < 0.5 ? roundings / (1.0 - roundings) : HUGE_VAL;
}

// E.
PYDEFECT_HOST_DEVICE inline double score_error(VectorSize query, VectorSize bank, int64_t width) {
  const double bank_norm = bank.norm + bank.rounding;
  const double query_norm = query.norm + query.rounding;
  return query.rounding * bank.norm + query_norm * bank.rounding +
         rounding_growth(width) * bank_norm * (bank_norm + query_norm) +
         4.0 * static_cast<double>(width) * FLT_MIN;
}

PYDEFECT_HOST_DEVICE inline bool no_closer_row_outside(VectorSize query, VectorSize bank, double worst,
                                                       double kth_distance, int64_t width, bool centred) {
  const double growth = rounding_growth(width);
  const double largest_score =
      (bank.norm + bank.rounding) * (bank.norm + bank.rounding + query.norm + query.rounding);
  // Beyond this a float may have overflowed on the way; the negated form also catches NaN.
  if (!(growth < 1.0 && largest_score < static_cast<double>(FLT_MAX) / 4.0)) return false;
  const double squared_norm = query.norm * query.norm;
  // The last term, 4 (D + 8) times 2^-53, covers the roundings of the norms and of this very expression.
  const double bound = squared_norm - 2.0 * (worst + score_error(query, bank, width)) -
                       0x1p-27 * growth * (squared_norm + largest_score);
  if (!(bound > 0.0)) return false;
  if (!centred) return bound * (1.0 - growth) > kth_distance;
  const double distance = std::sqrt(bound) - 0x1.001p-24 * (query.norm + bank.norm);
  return distance > 0.0 && distance * distance * (1.0 - growth) > kth_distance;
}

// How far below the k-th best score a row's score may lie if the certificate above is to hold with every row
// further below left out: the k rows' own error, the left out rows' error, and what centring and measuring
// add, for which (|x| + |Y|)^2 stands in for the distances. A guess would do: it proves nothing itself.
PYDEFECT_HOST_DEVICE inline double score_margin(VectorSize query, VectorSize bank, int64_t width) {
  const double reach = query.norm + bank.norm;
  return 2.0 * score_error(query, bank, width) + 2.0 * rounding_growth(width) * reach * reach;
}

}  // namespace pydefect
