// Dropout as a function of a seed and of the place (weft/reference/attention/dropout.py): the
// weight of query i and key j of head b H + h is kept where
//   h(h(h(low ^ 2654435761 (b H + h)) ^ high ^ 2246822519 i) ^ 3266489917 j) >= threshold.
#pragma once
#include <cstdint>

#include "cpu/attention/problem.h"

namespace weft {

// The finalizer of MurmurHash3 for 32 bits.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// Of 64 queries of one head.
class DropoutTile {
 public:
  DropoutTile() = default;
  DropoutTile(const DropoutView& view, int64_t head, int64_t q0) : view_(view) {
    const uint32_t of_head = mix(view.low ^ 2654435761u * uint32_t(head)) ^ view.high;
    for (int r = 0; r < 64; ++r) hash_[r] = mix(of_head ^ 2246822519u * uint32_t(q0 + r));
  }

  // factor[r] of the weight of query q0 + r and key j: 0 or 1 / (1 - p).
  template <typename A>
  void factors(int64_t j, A* factor) const {
    const uint32_t of_key = 3266489917u * uint32_t(j);
    const A kept = A(view_.factor);
    for (int r = 0; r < 64; ++r)
      factor[r] = mix(hash_[r] ^ of_key) >= view_.threshold ? kept : A(0);
  }

 private:
  DropoutView view_;
  uint32_t hash_[64];
};

}  // namespace weft
