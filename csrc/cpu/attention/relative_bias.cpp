// A table read by relative position, and the gradient of its entries.
//
//   bias[h, p] = table[index[p], h]        p: a pair (query, key)
//   grad[t, h] = Σ_{p: index[p] = t} grad_bias[h, p], in the order of the pairs
//
// Heads are the outer loop: a row of the bias is written, or read, from one end to the other.
#include "common/convert.h"
#include "common/segments.h"
#include "cpu/registration.h"

namespace weft {
namespace {

void check_index(const Tensor& index) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 2,
                  "relative_bias: index must be (Nq, Nk) int64");
}

Tensor relative_bias(const Tensor& table, const Tensor& index) {
  check_index(index);
  STD_TORCH_CHECK(table.dim() == 2, "relative_bias: table must be (T, H)");
  const int64_t T = table.size(0), H = table.size(1), P = index.numel();
  Tensor out = torch::stable::new_empty(table, {1, H, index.size(0), index.size(1)});
  const Tensor places = torch::stable::contiguous(index);
  const int64_t* place = data<int64_t>(places);
  with_float(table, [&](auto type) {
    using S = decltype(type);
    const S* entries = data<S>(table);
    const int64_t row = table.stride(0), column = table.stride(1);
    S* bias = mutable_data<S>(out);
    parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t p = 0; p < P; ++p) {
          const int64_t t = std::min(std::max<int64_t>(place[p], 0), T - 1);
          bias[h * P + p] = entries[t * row + h * column];
        }
    });
  });
  return out;
}

Tensor relative_bias_backward(const Tensor& grad, const Tensor& index, int64_t T) {
  check_index(index);
  const int64_t H = grad.size(1), P = index.numel();
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == 1 && grad.numel() == H * P,
                  "relative_bias_backward: grad must be (1, H, Nq, Nk)");
  Tensor out = torch::stable::new_empty(grad, {T, H});
  const Tensor places = torch::stable::contiguous(index), given = torch::stable::contiguous(grad);
  static thread_local Scratch order, start;
  const Segments segments(data<int64_t>(places), P, T, order, start);
  with_float(grad, [&](auto type) {
    using S = decltype(type);
    const S* bias = data<S>(given);
    S* entries = mutable_data<S>(out);
    parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t t = 0; t < T; ++t) {
          Acc<S> sum = 0;
          for (const int64_t* p = segments.begin(t); p != segments.end(t); ++p)
            sum += Acc<S>(bias[h * P + *p]);
          entries[t * H + h] = S(sum);
        }
    });
  });
  return out;
}

}  // namespace

WEFT_CPU_SCHEMAS(m) {
  m.def("relative_bias(Tensor table, Tensor index) -> Tensor");
  m.def("relative_bias_backward(Tensor grad, Tensor index, SymInt T) -> Tensor");
}
WEFT_CPU_KERNELS(m) {
  m.impl("relative_bias", TORCH_BOX(&relative_bias));
  m.impl("relative_bias_backward", TORCH_BOX(&relative_bias_backward));
}

}  // namespace weft
