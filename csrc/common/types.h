// The element types of the kernels, and the type that each accumulates in.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace weft {

using bfloat16 = c10::BFloat16;
using half = c10::Half;

// Sums of double are double; sums of float, bfloat16 and half are float.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace weft
