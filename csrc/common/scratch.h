// Scratch memory that outlives a call: 64-byte aligned, grows and never shrinks. A kernel keeps one
// per thread and purpose (`static thread_local Scratch buffer;`), because fresh pages cost more
// than the work that small kernels do in them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/types.h"

namespace weft {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Room for `count` elements. The contents are unspecified, and an earlier pointer is void.
  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = count * int64_t(sizeof(T));
    if (bytes > capacity_) grow(bytes);
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int64_t kPage = 4096, kHugePage = int64_t(1) << 21;

  void grow(int64_t bytes) {
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    const int64_t alignment = bytes >= kHugePage / 4 ? kHugePage : kPage;
    bytes = round_up(bytes, alignment);
    data_ = std::aligned_alloc(size_t(alignment), size_t(bytes));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    // Packed panels are read with long strides: large pages spare the TLB.
    if (alignment == kHugePage) madvise(data_, size_t(bytes), MADV_HUGEPAGE);
#endif
    capacity_ = bytes;
  }

  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace weft
