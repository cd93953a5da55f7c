#include "sums.h"

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace mixout::cpu {

template <>
void DenseSums<c10::BFloat16>::store(
    int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const {
  const auto* bias = bias_.defined() ? bias_.const_data_ptr<c10::BFloat16>() + column : nullptr;
  round_sums(sums, ld, bias, c_ + row * n_ + column, n_, columns, rows);
}

template <>
void DenseSums<c10::Half>::store(
    int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const {
  const auto* bias = bias_.defined() ? bias_.const_data_ptr<c10::Half>() + column : nullptr;
  round_sums(sums, ld, 1, bias, c_ + row * n_ + column, n_, columns, rows);
}

template <>
void DenseSums<float>::store(
    int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const {
  const float* bias = bias_.defined() ? bias_.const_data_ptr<float>() + column : nullptr;
  for (int64_t r = 0; r < rows; ++r, sums += ld) {
    float* to = c_ + (row + r) * n_ + column;
    for (int64_t c = 0; c < columns; ++c) to[c] = sums[c] + (bias ? bias[c] : 0);
  }
}

template <typename W>
void KeptSums<W>::store(
    int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const {
  if (!layout_.transposed) {
    const int64_t width = layout_.in_features, first = start(column), last = end(column + columns, width);
    for (int64_t r = 0; r < rows; ++r) {
      W* to = dw_ + (row + r) * width;
      std::fill(to + first, to + last, W(0));
      if constexpr (std::is_same_v<W, c10::Half>) {  // one at a time they are rounded by a dozen instructions each
        W rounded[32];
        round_sums(sums + r * ld, ld, scale_, nullptr, rounded, columns, columns, 1);
        for (int64_t c = 0; c < columns; ++c) to[index_[column + c]] = rounded[c];
      } else {
        for (int64_t c = 0; c < columns; ++c)
          to[index_[column + c]] = static_cast<W>(sums[r * ld + c] * scale_);
      }
    }
    return;
  }
  // The product's rows are rows of the memory, each with those that follow it and are not kept.
  const int64_t width = layout_.out_features;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = start(row + r), kept = index_[row + r], last = end(row + r + 1, layout_.in_features);
    for (int64_t i = first; i < last; ++i)
      mix_run<float, float, W>(sums + r * ld, nullptr, dw_ + i * width + column, i == kept, scale_, columns);
  }
}

template class KeptSums<float>;
template class KeptSums<c10::BFloat16>;
template class KeptSums<c10::Half>;

}  // namespace mixout::cpu
