// Keys and values of one key head as left operands, in blocks: read in place where the engine can,
// otherwise packed when a block is first asked for and kept for the tiles of queries that follow.
//
// A hidden pair has weight 0, but 0 times NaN is NaN: with a mask, the blocks of values are looked
// through, and where one holds NaN or infinity the rows that no query sees count as 0.
#pragma once
#include <algorithm>
#include <vector>

#include "common/scratch.h"
#include "cpu/attention/panels.h"
#include "cpu/attention/problem.h"

namespace weft {

template <typename T>
class KeyBlocks {
 public:
  using P = Panels<T>;
  using Packed = typename P::Packed;
  using Left = typename P::Left;

  // Blocks begin at the multiples of `step` and are not longer.
  KeyBlocks(const AttentionProblem<T>& problem, int64_t step)
      : problem_(problem),
        step_(step),
        key_size_(round_up(P::left_size(step, problem.D), 32)),
        value_size_(round_up(P::left_size(step, problem.Dv), 32)),
        states_(size_t(ceil_div(problem.Nk, step))) {}

  void begin(int64_t b, int64_t kv_head) {
    if (b == b_ && kv_head == kv_head_) return;
    b_ = b, kv_head_ = kv_head;
    keys_ = problem_.key(b, kv_head), values_ = problem_.value(b, kv_head);
    seen_.clear();
    std::fill(states_.begin(), states_.end(), State{});
  }

  Left keys(int64_t first, int64_t n) {
    const Matrix<T> x = keys_.block(first, 0, n, problem_.D);
    if (P::in_place(x)) return P::keys(x, nullptr);
    bool& ready = states_[size_t(first / step_)].key;
    Packed* memory = of(key_memory_, key_size_, first);
    const Left packed = ready ? P::packed(memory, n, problem_.D) : P::keys(x, memory);
    ready = true;
    return packed;
  }

  // The transpose of the values.
  Left values(int64_t first, int64_t n) {
    const Matrix<T> x = values_.block(first, 0, n, problem_.Dv);
    State& state = states_[size_t(first / step_)];
    if (!state.looked_through) {
      state.looked_through = true;
      state.copied = !problem_.mask->everything() && !finite(x);
    }
    if (!state.copied && P::columns_in_place(x)) return P::columns_of(x, nullptr);
    Packed* memory = of(value_memory_, value_size_, first);
    if (!state.value) {
      state.value = true;
      if (state.copied)
        copy(x, first, memory);
      else
        P::columns_of(x, memory);
    }
    return P::packed(memory, problem_.Dv, n);
  }

 private:
  struct State {
    bool key = false, value = false, looked_through = false, copied = false;
  };

  Packed* of(Scratch& memory, int64_t size, int64_t first) {
    return memory.template get<Packed>(int64_t(states_.size()) * size) + first / step_ * size;
  }

  static bool finite(Matrix<T> x) {
    using Lanes = Vec<Acc<T>>;
    constexpr int64_t W = Lanes::size;
    if (x.col_stride != 1) {
      for (int64_t k = 0; k < x.rows; ++k)
        for (int64_t d = 0; d < x.cols; ++d)
          if (!std::isfinite(Acc<T>(*x.at(k, d)))) return false;
      return true;
    }
    Lanes total;  // x - x is 0 or NaN
    for (int64_t k = 0; k < x.rows; ++k) {
      int64_t d = 0;
      for (; d + W <= x.cols; d += W) {
        const Lanes part = Lanes::load(x.at(k, d));
        total += part - part;
      }
      if (d < x.cols) {
        const Lanes part = Lanes::load(x.at(k, d), x.cols - d);
        total += part - part;
      }
    }
    return all(total == Lanes());
  }

  // Packs the values with 0 in the rows that nobody sees.
  [[gnu::noinline]] void copy(Matrix<T> x, int64_t first, Packed* memory) {
    if (seen_.empty()) {
      seen_.resize(size_t(problem_.Nk));
      problem_.mask->visible_keys(b_, kv_head_, problem_.group, seen_.data());
    }
    std::vector<T> rows(size_t(x.rows * x.cols), T(0));
    for (int64_t k = 0; k < x.rows; ++k)
      for (int64_t d = 0; seen_[size_t(first + k)] && d < x.cols; ++d)
        rows[size_t(k * x.cols + d)] = *x.at(k, d);
    P::Engine::pack_left(row_major(rows.data(), x.rows, x.cols).transposed(), memory);
  }

  const AttentionProblem<T>& problem_;
  const int64_t step_, key_size_, value_size_;
  int64_t b_ = -1, kv_head_ = -1;
  Matrix<T> keys_{}, values_{};
  std::vector<State> states_;
  std::vector<uint8_t> seen_;
  inline static thread_local Scratch key_memory_, value_memory_;
};

}  // namespace weft
