// What belongs to the same key, side by side: a stable counting sort of keys, and sums over what
// has the same one. The gradients of selected rows and the statistics of classes are made of it.
//
//   segment_sum(segments, D, term, out)      out_k = Σ_{e: key_e = k} weight_e · row_e
//
// Repeatable: a stable sort has one result; a sum runs over blocks of kSegmentBlock elements in the
// order of the input, merged in order, whatever the threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/convert.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace weft {

// Elements 0 ... n - 1 sorted by key, those of one key in their order. A key outside [0, num_keys)
// drops its element. The memory is the caller's, and outlives this.
class Segments {
 public:
  Segments(const int64_t* keys, int64_t n, int64_t num_keys, Scratch& order_memory,
           Scratch& start_memory)
      : num_keys(num_keys),
        order_(order_memory.get<int64_t>(n)),
        start_(start_memory.get<int64_t>(num_keys + 1)) {
    // Each chunk counts its keys; prefix sums over (key, chunk) say where it writes.
    constexpr int64_t kChunk = 1 << 16, kMostChunks = 64;
    const int64_t wanted = std::min(ceil_div(n, kChunk), n / std::max<int64_t>(num_keys, 1));
    const int64_t chunks = std::clamp<int64_t>(wanted, 1, kMostChunks);
    const int64_t per_chunk = ceil_div(std::max<int64_t>(n, 1), chunks);
    std::vector<int64_t> next(size_t(chunks * num_keys));
    const auto for_chunks = [&](auto visit) {
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          int64_t* of_chunk = next.data() + c * num_keys;
          for (int64_t e = c * per_chunk; e < std::min(n, (c + 1) * per_chunk); ++e)
            if (uint64_t(keys[e]) < uint64_t(num_keys)) visit(of_chunk[keys[e]], e);
        }
      });
    };
    for_chunks([](int64_t& count, int64_t) { ++count; });
    int64_t total = 0;
    for (int64_t k = 0; k < num_keys; ++k) {
      start_[k] = total;
      for (int64_t c = 0; c < chunks; ++c) {
        int64_t& slot = next[size_t(c * num_keys + k)];
        const int64_t count = slot;
        slot = total;
        total += count;
      }
    }
    start_[num_keys] = total;
    int64_t* order = order_;
    for_chunks([order](int64_t& slot, int64_t e) { order[slot++] = e; });
  }

  int64_t num_keys;
  int64_t count(int64_t key) const { return start_[key + 1] - start_[key]; }
  const int64_t* begin(int64_t key) const { return order_ + start_[key]; }
  const int64_t* end(int64_t key) const { return order_ + start_[key + 1]; }

 private:
  int64_t *order_, *start_;
};

// A part of a segment that one task takes: long segments are shared by the threads, and the parts
// of one key are merged in their order.
inline constexpr int64_t kSegmentBlock = 1024;

struct SegmentBlock {
  int64_t key;
  const int64_t *begin, *end;
  int64_t partial;  // which partial result it makes; -1: it is the whole segment
};

// Every key has a block, also if it is empty. Returns the number of partial results.
inline int64_t segment_blocks(const Segments& segments, std::vector<SegmentBlock>& blocks) {
  int64_t partials = 0;
  for (int64_t k = 0; k < segments.num_keys; ++k) {
    const int64_t *begin = segments.begin(k), *end = segments.end(k);
    const bool whole = end - begin <= kSegmentBlock;
    do {
      const int64_t* stop = begin + std::min(kSegmentBlock, end - begin);
      blocks.push_back({k, begin, stop, whole ? -1 : partials++});
      begin = stop;
    } while (begin < end);
  }
  return partials;
}

// `block(b, partial)` computes a block, into the given partial result or, where that is -1, the
// key's own; then `merge(key, first, last)` joins the partial results [first, last) of a key.
template <typename Block, typename Merge>
void for_segment_blocks(const std::vector<SegmentBlock>& blocks, Block block, Merge merge) {
  const int64_t n = int64_t(blocks.size());
  torch::stable::parallel_for(0, n, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) block(blocks[size_t(i)]);
  });
  std::vector<int64_t> split;  // the first blocks of the keys that have several
  for (int64_t i = 0; i < n; ++i)
    if (blocks[size_t(i)].partial >= 0 &&
        (i == 0 || blocks[size_t(i - 1)].key != blocks[size_t(i)].key))
      split.push_back(i);
  torch::stable::parallel_for(0, int64_t(split.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      int64_t i = split[size_t(s)];
      const int64_t key = blocks[size_t(i)].key, first = blocks[size_t(i)].partial;
      while (i < n && blocks[size_t(i)].key == key) ++i;
      merge(key, first, blocks[size_t(i - 1)].partial + 1);
    }
  });
}

// One element of a sum: a contiguous row, times a weight.
template <typename T>
struct WeightedRow {
  const T* row;
  Acc<T> weight;
};

namespace segments {

// sum[0, D) = Σ weight · row over the elements [begin, end), in runs of 64 from which the chains
// of additions start anew.
template <typename T, typename Term>
void sum_rows(const int64_t* begin, const int64_t* end, int64_t D, Term term, Acc<T>* sum) {
  using A = Acc<T>;
  constexpr int64_t W = Vec<A>::size, kRun = 64, kAhead = 4;
  std::fill_n(sum, D, A(0));
  for (const int64_t* run = begin; run < end; run += kRun) {
    const int64_t m = std::min(kRun, end - run);
    const auto columns = [&](int64_t d, auto width, int64_t n) {
      constexpr int V = decltype(width)::value;
      Vec<A> part[V];
      for (int64_t i = 0; i < m; ++i) {
        if (run + i + kAhead < end)
          for (int64_t line = 0; line < V * W * int64_t(sizeof(T)); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(term(run[i + kAhead]).row + d) + line);
        const WeightedRow<T> now = term(run[i]);
        const Vec<A> weight(now.weight);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const T* from = now.row + d + v * W;
          part[v] = fma(weight, n == V * W ? Vec<A>::load(from) : Vec<A>::load(from, n), part[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        A* to = sum + d + v * W;
        if (n == V * W)
          (Vec<A>::load(to) + part[v]).store(to);
        else
          (Vec<A>::load(to, n) + part[v]).store(to, n);
      }
    };
    int64_t d = 0;
    for (; d + 4 * W <= D; d += 4 * W) columns(d, std::integral_constant<int, 4>{}, 4 * W);
    for (; d < D; d += W) columns(d, std::integral_constant<int, 1>{}, std::min(W, D - d));
  }
}

}  // namespace segments

// out (num_keys, D), row-major: out_k = Σ weight_e · row_e over the elements e of key k, where
// `term(e)` is a WeightedRow<T>. A key without elements has 0.
template <typename T, typename Term>
void segment_sum(const Segments& keys, int64_t D, Term term, T* out) {
  using A = Acc<T>;
  std::vector<SegmentBlock> blocks;
  static thread_local Scratch memory;
  A* partials = memory.get<A>(segment_blocks(keys, blocks) * D);
  for_segment_blocks(
      blocks,
      [&](const SegmentBlock& b) {
        if (b.partial >= 0) {
          segments::sum_rows<T>(b.begin, b.end, D, term, partials + b.partial * D);
        } else if constexpr (std::is_same_v<T, A>) {
          segments::sum_rows<T>(b.begin, b.end, D, term, out + b.key * D);
        } else {
          static thread_local Scratch row;
          A* sum = row.get<A>(D);
          segments::sum_rows<T>(b.begin, b.end, D, term, sum);
          convert(sum, out + b.key * D, D);
        }
      },
      [&](int64_t key, int64_t first, int64_t last) {
        A* sum = partials + first * D;
        for (int64_t p = first + 1; p < last; ++p)
          for (int64_t d = 0; d < D; ++d) sum[d] += partials[p * D + d];
        convert(sum, out + key * D, D);
      });
}

}  // namespace weft
