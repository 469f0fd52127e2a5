// x / epsilon + shift with one rounding, that of the result. 1 / epsilon is in two parts, since its
// own rounding error times a large score would be the largest error of an exponential; and shifts
// are integers, so that those of a row and of a column have an exact sum.
#pragma once
#include <cmath>

#include "common/simd.h"

namespace weft {

template <typename A>
struct Temperature {
  // Both parts are positive, so that −infinity stays what it is.
  explicit Temperature(double epsilon) {
    const double inverse = 1 / epsilon;
    high = A(inverse);
    if (double(high) > inverse) high = std::nextafter(high, A(0));
    low = A(inverse - double(high));
    if (low == A(0)) low = high * A(1e-30);
  }
  Vec<A> of(Vec<A> x, Vec<A> shift) const {
    return fma(x, Vec<A>(low), fma(x, Vec<A>(high), shift));
  }
  // The nearest integer, where adding 1.5 times the first number without a fraction drops one; a
  // neighbour where there is none to drop; infinities and NaN stay.
  static Vec<A> nearest(Vec<A> x) {
    const Vec<A> drop(sizeof(A) == 4 ? A(12582912) : A(6755399441055744));
    return (x + drop) - drop;
  }

  A high, low;
};

}  // namespace weft
