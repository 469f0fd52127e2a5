// One step of momentum descent on the Grassmann manifold, in place: a block of threads per class.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cuda/pairwise/grassmann_class.h"

namespace weft {
namespace {

using grassmann::Reorth;
using grassmann::Step;
using torch::stable::Tensor;

__global__ void __launch_bounds__(grassmann::kThreads)
    step_kernel(const __grid_constant__ Step step) {
  extern __shared__ __align__(16) char shared[];
  grassmann::Class(step, shared).run();
}

grassmann::Operand operand(const Tensor& t) {
  return {static_cast<float*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
         a.size(2) == b.size(2) && a.scalar_type() == b.scalar_type();
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "grassmann_step: ", cudaGetErrorString(error));
}

void grassmann_step(const Tensor& basis, const Tensor& buffer, const std::optional<Tensor>& grad,
                    const std::optional<Tensor>& dims, double lr, double momentum, double dampening,
                    int64_t reorth, bool transport) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(same_shape(basis, buffer) && (!grad || same_shape(basis, *grad)) &&
                      basis.scalar_type() == ScalarType::Float,
                  "grassmann_step: basis, buffer and grad must be (C, D, k) float32");
  const int64_t C = basis.size(0), D = basis.size(1), k = basis.size(2);
  STD_TORCH_CHECK(k <= D && k <= grassmann::kMaxColumns,
                  "grassmann_step: k must be <= D and <= 32");
  STD_TORCH_CHECK(!dims || (dims->scalar_type() == ScalarType::Long && dims->is_contiguous() &&
                            dims->numel() == C),
                  "grassmann_step: dims must be (C,) int64 and contiguous");
  STD_TORCH_CHECK(reorth >= 0 && reorth <= int64_t(Reorth::gcr), "grassmann_step: reorth");
  if (C == 0 || k == 0) return;
  const int device = basis.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Step step{
      operand(basis),       operand(buffer), {},        nullptr, D, int(k), -lr, float(momentum),
      float(1 - dampening), Reorth(reorth),  transport, true};
  if (grad)
    step.grad = {static_cast<float*>(const_cast<void*>(grad->const_data_ptr())), grad->stride(0),
                 grad->stride(1), grad->stride(2)};
  if (dims) step.dims = static_cast<const int64_t*>(dims->const_data_ptr());
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  step.resident = grassmann::Layout(int(k), D, true).bytes <= most;
  const int64_t bytes = grassmann::Layout(int(k), D, step.resident).bytes;
  STD_TORCH_CHECK(bytes <= most, "grassmann_step: needs ", bytes, " bytes of shared memory of ",
                  most);
  check(cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  step_kernel<<<unsigned(C), grassmann::kThreads, size_t(bytes),
                static_cast<cudaStream_t>(stream)>>>(step);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(weft_cuda, m) {
  m.def(
      "grassmann_step_(Tensor(a!) basis, Tensor(b!) buffer, Tensor? grad, Tensor? dims, float lr, "
      "float momentum, float dampening, int reorth, bool transport) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(weft_cuda, CUDA, m) {
  m.impl("grassmann_step_", TORCH_BOX(&grassmann_step));
}

}  // namespace weft
