// The best columns of a row, found in two steps: candidates by values that are off by a known bound
// (products lose digits), then their exact values, in double from differences.
//
// A candidate is an interval [lower, upper] around the exact value w. With `threshold` the k-th
// smallest upper bound so far, no column with lower > threshold is among the k best, so nothing
// that belongs to the result is dropped, and what is kept in between does not matter: the result
// does not depend on the order or the blocks in which columns come. Better is smaller here; a NaN
// is better than every number, and of equal values the lower column.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/types.h"

namespace weft {

struct Chosen {
  double value;
  int64_t column;

  bool operator<(const Chosen& other) const {
    const bool nan = std::isnan(value), other_nan = std::isnan(other.value);
    if (nan != other_nan) return nan;
    if (!nan && value != other.value) return value < other.value;
    return column < other.column;
  }
};

template <typename A>
struct Candidate {
  A lower, upper;
  int64_t column;
};

// The candidates of one row so far; memory for `capacity` of them is the caller's.
template <typename A>
struct Candidates {
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

  A threshold = kInfinity;
  int count = 0;
  bool finished = false;  // k NaN were found: nothing is better

  // Room for the k best and what comes before the next look at them.
  static int64_t capacity(int64_t k) { return 2 * k + 14; }

  // value is off by at most `error`. exact(column) is w.
  template <typename Exact>
  void add(A value, A error, int64_t column, int64_t k, Candidate<A>* memory, Exact exact) {
    // An infinity or a NaN of the products says nothing, nor does a bound that is one.
    const bool known = std::isfinite(value) && std::isfinite(error);
    memory[count++] = {known ? value - error : -kInfinity, known ? value + error : kInfinity,
                       column};
    if (k == 1) threshold = std::min(threshold, memory[count - 1].upper);
    if (count == capacity(k)) shrink(k, memory, exact);
  }

  // Drops what cannot be among the k best, by the bounds, and if too many are left exactly.
  template <typename Exact>
  void shrink(int64_t k, Candidate<A>* memory, Exact exact) {
    const auto by_upper = [](const Candidate<A>& a, const Candidate<A>& b) {
      return a.upper < b.upper;
    };
    std::nth_element(memory, memory + k - 1, memory + count, by_upper);
    threshold = std::min(threshold, memory[k - 1].upper);
    count = int(std::partition(memory + k, memory + count,
                               [&](const Candidate<A>& c) { return c.lower <= threshold; }) -
                memory);
    if (count <= k + 7) return;
    static thread_local std::vector<Chosen> chosen;
    chosen.clear();
    for (int i = 0; i < count; ++i) chosen.push_back({exact(memory[i].column), memory[i].column});
    std::nth_element(chosen.begin(), chosen.begin() + k - 1, chosen.end());
    count = int(k);
    A last = -kInfinity;
    finished = true;
    for (int64_t i = 0; i < k; ++i) {
      const double w = chosen[size_t(i)].value;
      const bool nan = std::isnan(w);
      finished &= nan;
      // As A it may have been rounded either way.
      const A near = nan ? -kInfinity : A(w);
      memory[i] = {std::nextafter(near, -kInfinity), std::nextafter(near, kInfinity),
                   chosen[size_t(i)].column};
      if (nan) memory[i].upper = -kInfinity;
      last = std::max(last, memory[i].upper);
    }
    threshold = std::min(threshold, last);
  }
};

}  // namespace weft
