#include "fused.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "bf16_product.h"
#include "f16_product.h"
#include "kernels.h"
#include "mixer.h"
#include "product.h"
#include "sums.h"
#include "weight.h"

namespace mixout::cpu {

namespace {

using c10::BFloat16;
using c10::Half;

// A matrix whose rows or columns are contiguous; `transposed` if it is the columns.
template <typename T>
struct RightRows {
  std::unique_ptr<Rows<T>> rows;
  bool transposed;
};

template <typename T>
class DenseRows : public Rows<T> {
 public:
  explicit DenseRows(const Tensor& matrix) : matrix_(matrix) {}
  Strided<T> in_place() const override { return {matrix_.const_data_ptr<T>(), matrix_.stride(0), 1}; }
  void write(int64_t row, int64_t rows, int64_t column, int64_t columns, T* out, int64_t ld) const override {
    const int64_t stride = matrix_.stride(0);
    const T* from = matrix_.const_data_ptr<T>() + row * stride + column;
    for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * stride, columns, out + r * ld);
  }

 private:
  Tensor matrix_;
};

// A float32 matrix with contiguous rows, rounded as it is read.
class RoundedRows : public Rows<BFloat16> {
 public:
  explicit RoundedRows(const Tensor& matrix) : matrix_(matrix) {}
  void write(int64_t row, int64_t rows, int64_t column, int64_t columns, BFloat16* out, int64_t ld) const override {
    const int64_t stride = matrix_.stride(0);
    const float* from = matrix_.const_data_ptr<float>() + row * stride + column;
    for (int64_t r = 0; r < rows; ++r)
      mix_run<float, float, BFloat16>(from + r * stride, nullptr, out + r * ld, true, 1, columns);
  }

 private:
  Tensor matrix_;
};

template <typename T>
std::unique_ptr<Rows<T>> rows_as_they_lie(const Tensor& matrix) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (matrix.scalar_type() == at::kFloat) return std::make_unique<RoundedRows>(matrix);
  return std::make_unique<DenseRows<T>>(matrix);
}

template <typename T>
RightRows<T> dense_rows(const Tensor& matrix) {
  if (matrix.stride(1) == 1) return {rows_as_they_lie<T>(matrix), false};
  if (matrix.stride(0) == 1) return {rows_as_they_lie<T>(matrix.t()), true};
  return {rows_as_they_lie<T>(matrix.contiguous()), false};
}

// The rows of Phi [out, in] or [out, kept], made as they are read.
template <typename T>
RightRows<T> rows_of_phi(const MixedWeight& phi, const std::optional<Columns>& only) {
  if (phi.operand) return dense_rows<T>(*phi.operand);
  const Operands operands(phi.weight, phi.target);
  const auto& layout = operands.layout;
  return {
      only ? gathered_rows<T>(operands, *only, phi.draw.scale())
           : mixed_rows<T>(operands.weight, operands.target, phi.draw, layout.of(phi.draw)),
      layout.transposed};
}

template <typename T>
Strided<T> rows_as_left(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), 1};
}

// The transpose of x.
template <typename T>
Strided<T> columns_as_left(const Tensor& x) {
  return {x.const_data_ptr<T>(), 1, x.stride(0)};
}

// a [m, depth] b [depth, n] + bias into c [m, n], contiguous.
void multiply_into(
    const Tensor& c, const Strided<float>& a, const RightHand<float>& b, int64_t depth,
    const std::optional<Tensor>& bias = std::nullopt) {
  const Tensor added = bias ? bias->contiguous() : Tensor();
  multiply(
      c.size(0), c.size(1), depth, a, b, bias ? added.const_data_ptr<float>() : nullptr, c.mutable_data_ptr<float>());
}

template <typename T>
void multiply_into(
    const Tensor& c, const Strided<T>& a, const RightHand<T>& b, int64_t depth,
    const std::optional<Tensor>& bias = std::nullopt) {
  if (c.scalar_type() == at::kFloat) return multiply(c.size(0), c.size(1), depth, a, b, DenseSums<float>(c, bias));
  multiply(c.size(0), c.size(1), depth, a, b, DenseSums<T>(c, bias));
}

// Call f with a value of the type that is multiplied.
template <typename F>
auto with_half_type(const Tensor& left, const F& f) {
  return left.scalar_type() == at::kHalf ? f(Half()) : f(BFloat16());
}
template <typename F>
auto with_type(const Tensor& left, const F& f) {
  return left.scalar_type() == at::kFloat ? f(float()) : with_half_type(left, f);
}

}  // namespace

Tensor fused_forward(
    const Tensor& x, const MixedWeight& phi, const std::optional<Columns>& only, const std::optional<Tensor>& bias,
    at::ScalarType result) {
  const Tensor y = at::empty({x.size(0), phi.weight.size(0)}, x.options().dtype(result));
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto [rows, transposed] = rows_of_phi<T>(phi, only);
    multiply_into(y, rows_as_left<T>(x), {*rows, !transposed}, x.size(1), bias);
  });
  return y;
}

Tensor fused_input_gradient(
    const Tensor& g, const MixedWeight& phi, const std::optional<Columns>& only, at::ScalarType result) {
  const int64_t columns = only ? only->kept : phi.weight.size(1);
  const Tensor dx = at::empty({g.size(0), columns}, g.options().dtype(result));
  with_type(g, [&](auto zero) {
    using T = decltype(zero);
    const auto [rows, transposed] = rows_of_phi<T>(phi, only);
    multiply_into(dx, rows_as_left<T>(g), {*rows, transposed}, g.size(1));
  });
  return dx;
}

Tensor fused_kept_gradient(
    const Tensor& g, const Tensor& kept_input, const Columns& columns, const Tensor& weight, double scale) {
  const int64_t kept = kept_input.size(1);
  if (g.scalar_type() == at::kFloat) {
    // [kept, out]: the long side is contiguous, here too.
    const Tensor compact = at::empty({kept, g.size(1)}, g.options());
    multiply_into(compact, columns_as_left<float>(kept_input), {DenseRows<float>(g), false}, g.size(0));
    return scatter_weight(compact, columns, weight, scale);
  }
  const WeightLayout layout(weight);
  const Tensor memory = layout.empty(weight, weight.scalar_type());
  if (kept == 0) return layout.logical(memory.zero_());
  const Tensor &left = layout.transposed ? kept_input : g, &right = layout.transposed ? g : kept_input;
  with_half_type(g, [&](auto zero) {
    using T = decltype(zero);
    const auto multiply_to = [&](const Sums& sums) {
      multiply(left.size(1), right.size(1), g.size(0), columns_as_left<T>(left), {DenseRows<T>(right), false}, sums);
    };
    if (weight.scalar_type() == at::kFloat)
      multiply_to(KeptSums<float>(memory, layout, columns, kept, scale));
    else
      multiply_to(KeptSums<T>(memory, layout, columns, kept, scale));
  });
  return layout.logical(memory);
}

Tensor fused_dense_gradient(const Tensor& g, const Tensor& x, const Tensor& weight) {
  const WeightLayout layout(weight);
  const Tensor &left = layout.transposed ? x : g, &right = layout.transposed ? g : x;
  const Tensor memory = layout.empty(weight, weight.scalar_type());
  with_type(g, [&](auto zero) {
    using T = decltype(zero);
    multiply_into(memory, columns_as_left<T>(left), {DenseRows<T>(right), false}, g.size(0));
  });
  return memory;
}

}  // namespace mixout::cpu
