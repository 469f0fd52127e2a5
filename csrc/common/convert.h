// Arrays from one element type to another: y[i] = x[i], to nearest even, NaN kept, for float to and
// from bfloat16 and half, and any of them to themselves. Through float, as every kernel computes.
#pragma once
#include <cstring>

#include "common/simd.h"

namespace weft {

template <typename From, typename To>
inline void convert(const From* x, To* y, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(static_cast<void*>(y), x, size_t(n) * sizeof(To));
  } else {
    constexpr int64_t W = VecF::size;
    int64_t i = 0;
    for (; i + W <= n; i += W) VecF::load(x + i).store(y + i);
    if (i < n) VecF::load(x + i, n - i).store(y + i, n - i);
  }
}

}  // namespace weft
