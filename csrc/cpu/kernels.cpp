#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../mix.h"

namespace mixout::cpu {

namespace {

MIXOUT_CLONES void philox_blocks(uint64_t seed, uint64_t first_block, int64_t blocks, uint32_t* words) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Philox4x32 r = philox4x32_10(seed, first_block + b);
    for (int lane = 0; lane < 4; ++lane) words[4 * b + lane] = r.word[lane];
  }
}

MIXOUT_CLONES void strided_words(uint64_t seed, uint64_t first, uint64_t stride, int64_t n, uint32_t* words) {
  for (int64_t j = 0; j < n; ++j) words[j] = mask_word(seed, first + j * stride);
}

MIXOUT_CLONES void four_rows(
    uint64_t seed, uint64_t first_block, uint64_t stride, int64_t n, uint32_t* w0, uint32_t* w1, uint32_t* w2,
    uint32_t* w3) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const Philox4x32 r = philox4x32_10(seed, first_block + j * stride);
    w0[j] = r.word[0], w1[j] = r.word[1], w2[j] = r.word[2], w3[j] = r.word[3];
  }
}

}  // namespace

void mask_words(uint64_t seed, uint64_t first, uint64_t stride, int64_t n, uint32_t* words) {
  if (stride != 1) return strided_words(seed, first, stride, n, words);
  const int64_t head = std::min<int64_t>((4 - first % 4) % 4, n);  // up to the next whole Philox block
  strided_words(seed, first, 1, head, words);
  const int64_t blocks = (n - head) / 4, done = head + 4 * blocks;
  philox_blocks(seed, (first + head) / 4, blocks, words + head);
  strided_words(seed, first + done, 1, n - done, words + done);
}

void mask_words_of_four_rows(uint64_t seed, uint64_t first, uint64_t stride, int64_t n, uint32_t* words) {
  four_rows(seed, first / 4, stride / 4, n, words, words + n, words + 2 * n, words + 3 * n);
}

int64_t kept_columns(uint64_t seed, uint64_t first, uint32_t threshold, int64_t n, int64_t* columns) {
  std::vector<uint32_t> words(n);
  mask_words(seed, first, 1, n, words.data());
  int64_t kept = 0;
  for (int64_t j = 0; j < n; ++j) {
    columns[kept] = j;  // without a branch: the mask is random, so every second branch would be mispredicted
    kept += words[j] >= threshold;
  }
  return kept;
}

template <typename W, typename U, typename O>
MIXOUT_CLONES void mix_by_words(
    const W* w, const U* u, O* out, const uint32_t* words, uint32_t threshold, arithmetic_t<W> scale, int64_t n) {
  using A = arithmetic_t<W>;
  if (u == nullptr) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i)
      out[i] = static_cast<O>(mix(words[i] >= threshold, static_cast<A>(w[i]), A(0), scale));
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i)
      out[i] = static_cast<O>(mix(words[i] >= threshold, static_cast<A>(w[i]), static_cast<A>(u[i]), scale));
  }
}

template <typename W, typename U, typename O>
MIXOUT_CLONES void mix_run(const W* w, const U* u, O* out, bool keep, arithmetic_t<W> scale, int64_t n) {
  using A = arithmetic_t<W>;
  if (keep) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const A target = u == nullptr ? A(0) : static_cast<A>(u[i]);
      out[i] = static_cast<O>(mix(true, static_cast<A>(w[i]), target, scale));
    }
  } else if (u != nullptr) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<O>(static_cast<A>(u[i]));
  } else {
    std::fill(out, out + n, O(0));
  }
}

template <typename T, typename O>
MIXOUT_CLONES void gather_columns(
    const T* x, int64_t ldx, O* out, int64_t ldo, int64_t width, const int64_t* columns, int64_t n,
    arithmetic_t<T> scale, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, out += ldo) {
    if (std::is_same_v<T, O> && scale == 1)  // a half-precision value would be converted there and back
      for (int64_t c = 0; c < n; ++c) out[c] = static_cast<O>(x[columns[c]]);
    else
      for (int64_t c = 0; c < n; ++c) out[c] = static_cast<O>(static_cast<arithmetic_t<T>>(x[columns[c]]) * scale);
    std::fill(out + n, out + width, O(0));
  }
}

template <typename T>
void scatter_columns(const T* compact, T* dx, int64_t width, const int64_t* columns, int64_t n, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, compact += n, dx += width) {
    std::fill(dx, dx + width, T(0));
    for (int64_t c = 0; c < n; ++c) dx[columns[c]] = compact[c];
  }
}

template <typename T, typename W>
void scatter_columns_transposed(
    const T* compact, int64_t ldc, W* dw, int64_t width, const int64_t* columns, int64_t n, arithmetic_t<T> scale,
    int64_t rows) {
  // Sixteen rows at a time: one cache line of `compact` for each column, turned in a buffer that stays in L1.
  constexpr int64_t kBlock = 16;
  std::vector<W> turned(kBlock * n);
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t block = std::min(kBlock, rows - first);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t r = 0; r < block; ++r)
        turned[r * n + c] = static_cast<W>(static_cast<arithmetic_t<T>>(compact[c * ldc + first + r]) * scale);
    scatter_columns(turned.data(), dw + first * width, width, columns, n, block);
  }
}

#define MIXOUT_INSTANTIATE_MIX(W, U, O)                                                                            \
  template void mix_by_words<W, U, O>(                                                                             \
      const W*, const U*, O*, const uint32_t*, uint32_t, arithmetic_t<W>, int64_t);                                \
  template void mix_run<W, U, O>(const W*, const U*, O*, bool, arithmetic_t<W>, int64_t);
#define MIXOUT_INSTANTIATE_COLUMNS(T, O)                                                                           \
  template void gather_columns<T, O>(                                                                              \
      const T*, int64_t, O*, int64_t, int64_t, const int64_t*, int64_t, arithmetic_t<T>, int64_t);                 \
  template void scatter_columns_transposed<O, T>(                                                                  \
      const O*, int64_t, T*, int64_t, const int64_t*, int64_t, arithmetic_t<O>, int64_t);

// Weight, target, result. A float32 weight may have a bfloat16 target, and any result that autocast asks for.
MIXOUT_INSTANTIATE_MIX(double, double, double)
MIXOUT_INSTANTIATE_MIX(float, float, float)
MIXOUT_INSTANTIATE_MIX(float, float, c10::BFloat16)
MIXOUT_INSTANTIATE_MIX(float, float, c10::Half)
MIXOUT_INSTANTIATE_MIX(float, c10::BFloat16, float)
MIXOUT_INSTANTIATE_MIX(float, c10::BFloat16, c10::BFloat16)
MIXOUT_INSTANTIATE_MIX(float, c10::BFloat16, c10::Half)
MIXOUT_INSTANTIATE_MIX(c10::BFloat16, c10::BFloat16, c10::BFloat16)
MIXOUT_INSTANTIATE_MIX(c10::Half, c10::Half, c10::Half)
// Half-precision gradients of a float32 weight.
MIXOUT_INSTANTIATE_MIX(c10::BFloat16, c10::BFloat16, float)
MIXOUT_INSTANTIATE_MIX(c10::Half, c10::Half, float)

// Weight or input, compute type.
MIXOUT_INSTANTIATE_COLUMNS(double, double)
MIXOUT_INSTANTIATE_COLUMNS(float, float)
MIXOUT_INSTANTIATE_COLUMNS(float, c10::BFloat16)
MIXOUT_INSTANTIATE_COLUMNS(float, c10::Half)
MIXOUT_INSTANTIATE_COLUMNS(c10::BFloat16, c10::BFloat16)
MIXOUT_INSTANTIATE_COLUMNS(c10::Half, c10::Half)

template void scatter_columns<double>(const double*, double*, int64_t, const int64_t*, int64_t, int64_t);
template void scatter_columns<float>(const float*, float*, int64_t, const int64_t*, int64_t, int64_t);
template void scatter_columns<c10::BFloat16>(
    const c10::BFloat16*, c10::BFloat16*, int64_t, const int64_t*, int64_t, int64_t);
template void scatter_columns<c10::Half>(const c10::Half*, c10::Half*, int64_t, const int64_t*, int64_t, int64_t);

}  // namespace mixout::cpu
