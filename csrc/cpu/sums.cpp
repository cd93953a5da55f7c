#include "sums.h"

#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "kernels.h"

namespace mixout::cpu {

namespace {

// Of a part of a product that is spread over dw at once.
constexpr int64_t kRows = 32, kColumns = 32;

#ifdef MIXOUT_AVX512

void round_to(const float* from, c10::BFloat16* to, int64_t ldt, int64_t n, int64_t rows) {
  round_sums(from, kColumns, nullptr, to, ldt, n, rows);
}
void round_to(const float* from, c10::Half* to, int64_t ldt, int64_t n, int64_t rows) {
  round_sums(from, kColumns, 1, nullptr, to, ldt, n, rows);
}

// to[r, c] for first <= c < last and r < rows: the next of sums[r], scaled, where `kept` (a bit for each column) has a
// one, and zero elsewhere.
template <typename W>
MIXOUT_AVX512 void spread(
    const uint16_t* kept, int64_t first, int64_t last, const float* sums, int64_t lds, float scale, W* to, int64_t ldt,
    int64_t rows) {
  alignas(64) float among_zeros[kRows * kColumns];
  for (int64_t c = first; c < last; c += kColumns) {
    for (int64_t i = 0; i < kColumns; i += 16) {
      const int64_t at = std::min(c + i, last - 1);
      const uint32_t bits = (kept[at / 16] | uint32_t{kept[at / 16 + 1]} << 16) >> at % 16;
      const __mmask16 wanted = lanes(last - c - i), keep = bits & wanted;
      const int64_t n = __builtin_popcount(keep);
      for (int64_t r = 0; r < rows; ++r) {
        const __m512 next = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(n), sums + r * lds), _mm512_set1_ps(scale));
        const __m512 row = _mm512_maskz_expand_ps(keep, next);
        if constexpr (std::is_same_v<W, float>)
          _mm512_mask_storeu_ps(to + r * ldt + c + i, wanted, row);
        else
          _mm512_store_ps(among_zeros + r * kColumns + i, row);
      }
      sums += n;
    }
    if constexpr (!std::is_same_v<W, float>)
      round_to(among_zeros, to + c, ldt, std::min(kColumns, last - c), rows);
  }
}

#endif

}  // namespace

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
KeptSums<W>::KeptSums(
    const Tensor& memory, const WeightLayout& layout, const Columns& columns, int64_t kept, double scale)
    : layout_(layout),
      dw_(memory.mutable_data_ptr<W>()),
      index_(columns.index.data()),
      kept_(kept),
      scale_(static_cast<float>(scale)),
      bits_(layout.in_features / 16 + 2) {
  for (int64_t c = 0; c < kept; ++c) bits_[index_[c] / 16] |= 1 << index_[c] % 16;
}

template <typename W>
void KeptSums<W>::store(
    int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const {
  if (!layout_.transposed) {
    const int64_t width = layout_.in_features, first = start(column), last = end(column + columns, width);
#ifdef MIXOUT_AVX512
    for (int64_t r = 0; r < rows; r += kRows)
      spread(
          bits_.data(), first, last, sums + r * ld, ld, scale_, dw_ + (row + r) * width, width,
          std::min(kRows, rows - r));
#endif
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
