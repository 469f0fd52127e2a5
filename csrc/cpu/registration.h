// What an op's last lines need to meet torch's stable ABI; kernels above them see pointers only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>

// Each instruction-set level is a library of its own with a namespace of its own (WEFT_CPU is
// weft_cpu_generic, weft_cpu_avx2, ...), so that one process can load several.
#define WEFT_CPU_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(WEFT_CPU, m)
#define WEFT_CPU_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(WEFT_CPU, CPU, m)
// Ops without a tensor among their arguments.
#define WEFT_CPU_FUNCTIONS(m) STABLE_TORCH_LIBRARY_IMPL(WEFT_CPU, CompositeExplicitAutograd, m)

namespace weft {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls f with a value of the tensor's floating type.
template <typename F>
void with_float(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "weft: the dtype must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace weft
