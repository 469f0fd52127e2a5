// The micro-kernels of csrc/common as private ops, for tests and benchmarks only: each op is one
// call of the header's function on the tensors' memory.
#include <vector>

#include "common/bits.h"
#include "common/convert.h"
#include "common/gemm.h"
#include "common/limits.h"
#include "common/math.h"
#include "common/reduce.h"
#include "common/segments.h"
#include "common/transpose.h"
#include "cpu/registration.h"

namespace weft {
namespace {

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// Seconds of `repeats` products c (+)= a b, the packing of packed operands not counted.
template <typename A, typename T>
double time_gemm(Matrix<A> a, Matrix<T> b, Acc<T>* c, int64_t ldc, bool accumulate, bool pack_left,
                 bool pack_right, int64_t repeats) {
  Scratch left_memory, right_memory;
  const PackedLeft<T> left(
      pack_left ? a : a.block(0, 0, 0, 0),
      left_memory.get<typename PackedLeft<T>::Packed>(PackedLeft<T>::size(a.rows, a.cols)));
  const PackedRight<T> right(
      pack_right ? b : b.block(0, 0, 0, 0),
      right_memory.get<typename PackedRight<T>::Packed>(PackedRight<T>::size(b.rows, b.cols)));
  const ProductSession<T> session;
  const double start = thread_seconds();
  for (int64_t i = 0; i < repeats; ++i) {
    if (pack_left && pack_right) {
      gemm(left, right, c, ldc, accumulate);
    } else if (pack_left) {
      gemm(left, b, c, ldc, accumulate);
    } else if (pack_right) {
      gemm(a, right, c, ldc, accumulate);
    } else {
      gemm(a, b, c, ldc, accumulate);
    }
  }
  return thread_seconds() - start;
}

double gemm_op(const Tensor& a, const Tensor& b, const Tensor& c, bool accumulate, bool pack_left,
               bool pack_right, int64_t repeats) {
  STD_TORCH_CHECK(a.size(1) == b.size(0) && a.size(0) == c.size(0) && b.size(1) == c.size(1) &&
                      (c.size(1) <= 1 || c.stride(1) == 1),
                  "microkernel_gemm: shapes");
  double seconds = 0;
  with_float(b, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto left) {
      seconds = time_gemm(left, matrix<T>(b), mutable_data<Acc<T>>(c), c.stride(0), accumulate,
                          pack_left, pack_right, repeats);
    };
    if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, half>) {
      if (a.scalar_type() == ScalarType::Float) return run(matrix<float>(a));
    }
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "microkernel_gemm: dtypes");
    run(matrix<T>(a));
  });
  return seconds;
}

template <typename F>
Tensor map(const Tensor& x, F f) {
  Tensor out = torch::stable::new_empty(x, {x.numel()});
  const auto run = [&](auto t) {
    using T = decltype(t);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(out);
    const int64_t n = x.numel();
    for (int64_t i = 0; i < n; i += Vec<T>::size) {
      const int64_t lanes = std::min<int64_t>(Vec<T>::size, n - i);
      f(Vec<T>::load(from + i, lanes)).store(to + i, lanes);
    }
  };
  if (x.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "float32 or float64");
    run(float{});
  }
  return out;
}
Tensor exp_op(const Tensor& x) {
  return map(x, [](auto v) { return exp(v); });
}
Tensor exp_or_zero_op(const Tensor& x) {
  return map(x, [](auto v) { return exp_or_zero(v); });
}
Tensor log_op(const Tensor& x) {
  return map(x, [](auto v) { return log(v); });
}
Tensor tanh_op(const Tensor& x) {
  return map(x, [](auto v) { return tanh(v); });
}

template <typename F>
double reduce(const Tensor& x, F f) {
  double result = 0;
  with_float(x, [&](auto t) { result = double(f(data<decltype(t)>(x), x.numel())); });
  return result;
}
double sum_op(const Tensor& x) {
  return reduce(x, [](auto* p, int64_t n) { return sum(p, n); });
}
double sum_of_squares_op(const Tensor& x) {
  return reduce(x, [](auto* p, int64_t n) { return sum_of_squares(p, n); });
}
double max_op(const Tensor& x) {
  return reduce(x, [](auto* p, int64_t n) { return max(p, n); });
}
double dot_op(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type() && x.numel() == y.numel(), "like tensors");
  double result = 0;
  with_float(x, [&](auto t) {
    using T = decltype(t);
    result = double(dot(data<T>(x), data<T>(y), x.numel()));
  });
  return result;
}

void convert_op(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.numel() == y.numel(), "like tensors");
  with_float(x, [&](auto from) {
    with_float(y, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      if constexpr (!std::is_same_v<From, double> && !std::is_same_v<To, double>)
        convert(data<From>(x), mutable_data<To>(y), x.numel());
    });
  });
}

void transpose_op(const Tensor& x, const Tensor& y) {
  const auto run = [&](auto t) {
    using T = decltype(t);
    transpose(data<T>(x), x.stride(0), x.size(0), x.size(1), mutable_data<T>(y), y.stride(0));
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

void transpose_bits_op(const Tensor& words) { transpose_bits(mutable_data<uint64_t>(words)); }
Tensor bytes_to_bits_op(const Tensor& bytes) {
  Tensor out = torch::stable::new_empty(bytes, {1}, ScalarType::Long);
  *mutable_data<uint64_t>(out) = bytes_to_bits(data<uint8_t>(bytes), bytes.numel());
  return out;
}
// x where the bits of the word say so, else 0; the word starts anew every 64 elements.
Tensor select_by_bits_op(const Tensor& x, int64_t word) {
  Tensor out = torch::stable::new_empty(x, {x.numel()});
  const auto run = [&](auto t) {
    using T = decltype(t);
    constexpr int64_t W = Vec<T>::size;
    for (int64_t i = 0; i + W <= x.numel(); i += W)
      select(lanes_from_bits<T>(uint64_t(word) >> i % 64), Vec<T>::load(data<T>(x) + i), Vec<T>())
          .store(mutable_data<T>(out) + i);
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

// out_k = Σ weight_e · rows_e over the rows of key k.
void segment_sum_op(const Tensor& rows, const Tensor& keys, const Tensor& weights,
                    const Tensor& out) {
  static thread_local Scratch order, start;
  const Segments segments(data<int64_t>(keys), keys.numel(), out.size(0), order, start);
  with_float(rows, [&](auto t) {
    using T = decltype(t);
    const T* first = data<T>(rows);
    const T* weight = data<T>(weights);
    const int64_t stride = rows.stride(0);
    segment_sum(
        segments, rows.size(1),
        [=](int64_t e) { return WeightedRow<T>{first + e * stride, Acc<T>(weight[e])}; },
        mutable_data<T>(out));
  });
}

double fma_rate_op(const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? fma_rate<double>() : fma_rate<float>();
}
double bfloat16_rate_op(const Tensor&) { return bfloat16_rate(); }
double copy_bandwidth_op(const Tensor& from, const Tensor& to) {
  return copy_bandwidth(data<uint8_t>(from), mutable_data<uint8_t>(to), to.numel());
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def(
      "microkernel_gemm(Tensor a, Tensor b, Tensor(a!) c, bool accumulate, bool pack_left, "
      "bool pack_right, int repeats) -> float");
  m.def("microkernel_exp(Tensor x) -> Tensor");
  m.def("microkernel_exp_or_zero(Tensor x) -> Tensor");
  m.def("microkernel_log(Tensor x) -> Tensor");
  m.def("microkernel_tanh(Tensor x) -> Tensor");
  m.def("microkernel_sum(Tensor x) -> float");
  m.def("microkernel_sum_of_squares(Tensor x) -> float");
  m.def("microkernel_max(Tensor x) -> float");
  m.def("microkernel_dot(Tensor x, Tensor y) -> float");
  m.def("microkernel_convert(Tensor x, Tensor(a!) y) -> ()");
  m.def("microkernel_transpose(Tensor x, Tensor(a!) y) -> ()");
  m.def("microkernel_transpose_bits(Tensor(a!) words) -> ()");
  m.def("microkernel_bytes_to_bits(Tensor bytes) -> Tensor");
  m.def("microkernel_select_by_bits(Tensor x, int word) -> Tensor");
  m.def("microkernel_segment_sum(Tensor rows, Tensor keys, Tensor weights, Tensor(a!) out) -> ()");
  m.def("microkernel_fma_rate(Tensor like) -> float");
  m.def("microkernel_bfloat16_rate(Tensor like) -> float");
  m.def("microkernel_copy_bandwidth(Tensor source, Tensor(a!) target) -> float");
}
WEFT_CPU_KERNELS(m) {
  m.impl("microkernel_gemm", TORCH_BOX(&gemm_op));
  m.impl("microkernel_exp", TORCH_BOX(&exp_op));
  m.impl("microkernel_exp_or_zero", TORCH_BOX(&exp_or_zero_op));
  m.impl("microkernel_log", TORCH_BOX(&log_op));
  m.impl("microkernel_tanh", TORCH_BOX(&tanh_op));
  m.impl("microkernel_sum", TORCH_BOX(&sum_op));
  m.impl("microkernel_sum_of_squares", TORCH_BOX(&sum_of_squares_op));
  m.impl("microkernel_max", TORCH_BOX(&max_op));
  m.impl("microkernel_dot", TORCH_BOX(&dot_op));
  m.impl("microkernel_convert", TORCH_BOX(&convert_op));
  m.impl("microkernel_transpose", TORCH_BOX(&transpose_op));
  m.impl("microkernel_transpose_bits", TORCH_BOX(&transpose_bits_op));
  m.impl("microkernel_bytes_to_bits", TORCH_BOX(&bytes_to_bits_op));
  m.impl("microkernel_select_by_bits", TORCH_BOX(&select_by_bits_op));
  m.impl("microkernel_segment_sum", TORCH_BOX(&segment_sum_op));
  m.impl("microkernel_fma_rate", TORCH_BOX(&fma_rate_op));
  m.impl("microkernel_bfloat16_rate", TORCH_BOX(&bfloat16_rate_op));
  m.impl("microkernel_copy_bandwidth", TORCH_BOX(&copy_bandwidth_op));
}

}  // namespace weft
