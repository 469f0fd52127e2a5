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

// Each instruction-set level is a library of its own with a namespace of its own (weft_cpu_generic,
// weft_cpu_avx2, ...), so that one process can load several. Objects do not hold its name: several
// levels link the same one where they would not differ (setup.py).
#define WEFT_CPU_SCHEMAS(m) WEFT_CPU_LIBRARY(FRAGMENT, nullptr, m, C10_UID)
#define WEFT_CPU_KERNELS(m) WEFT_CPU_LIBRARY(IMPL, "CPU", m, C10_UID)
// Ops without a tensor among their arguments.
#define WEFT_CPU_FUNCTIONS(m) WEFT_CPU_LIBRARY(IMPL, "CompositeExplicitAutograd", m, C10_UID)

// STABLE_TORCH_LIBRARY_FRAGMENT and STABLE_TORCH_LIBRARY_IMPL, but for the namespace's name, which
// theirs take from the macro's argument.
#define WEFT_CPU_LIBRARY(kind, key, m, uid)                                                  \
  static void C10_CONCATENATE(declare_, uid)(torch::stable::detail::StableLibrary&);         \
  static const torch::stable::detail::StableTorchLibraryInit C10_CONCATENATE(library_, uid)( \
      torch::stable::detail::StableLibrary::Kind::kind, &C10_CONCATENATE(declare_, uid),     \
      kNamespace, key, __FILE__, __LINE__);                                                  \
  void C10_CONCATENATE(declare_, uid)(torch::stable::detail::StableLibrary & m)

namespace weft {

extern const char kNamespace[];  // in namespace.cpp

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
