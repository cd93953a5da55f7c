// The CPU loops: single-threaded, over raw pointers, vectorised by the compiler once for each instruction-set level
// and chosen at load time. Threads and tensors are the business of the callers.
#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

// One copy of each loop for AVX-512, AVX2 and the baseline; the dynamic loader picks by the CPU it runs on, so a build
// made on one machine runs on every other. GCC names whole levels (with FMA and byte operations) from version 12 on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MIXOUT_CPU_LEVEL_512 "x86-64-v4"
#define MIXOUT_CPU_LEVEL_256 "x86-64-v3"
#define MIXOUT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MIXOUT_CPU_LEVEL_512 "avx512f"
#define MIXOUT_CPU_LEVEL_256 "avx2"
#define MIXOUT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MIXOUT_CLONES
#endif

namespace mixout::cpu {

// Half-precision values are mixed in float32 and rounded once.
template <typename T>
struct arithmetic {
  using type = float;
};
template <>
struct arithmetic<double> {
  using type = double;
};
template <typename T>
using arithmetic_t = typename arithmetic<T>::type;

// words[j] = word(seed, first + j * stride), j < n.
void mask_words(uint64_t seed, uint64_t first, uint64_t stride, int64_t n, uint32_t* words);

// words[lane * n + j] = word(seed, first + lane + j * stride) for lane < 4 and j < n, by one Philox block for each j.
// `first` and `stride` are multiples of 4.
void mask_words_of_four_rows(uint64_t seed, uint64_t first, uint64_t stride, int64_t n, uint32_t* words);

// The columns j < n with word(seed, first + j) >= threshold, ascending; returns how many. `columns` has room for n + 1.
int64_t kept_columns(uint64_t seed, uint64_t first, uint32_t threshold, int64_t n, int64_t* columns);

// out[i] = mix(words[i] >= threshold, w[i], u[i], scale) for i < n. u = nullptr is zero; out may be w.
template <typename W, typename U, typename O>
void mix_by_words(
    const W* w, const U* u, O* out, const uint32_t* words, uint32_t threshold, arithmetic_t<W> scale, int64_t n);

// The same for a run of n elements that one word decides.
template <typename W, typename U, typename O>
void mix_run(const W* w, const U* u, O* out, bool keep, arithmetic_t<W> scale, int64_t n);

// out[r, c] = scale * x[r, columns[c]] for c < n, zero for n <= c < width. Row strides: ldx, ldo.
template <typename T, typename O>
void gather_columns(
    const T* x, int64_t ldx, O* out, int64_t ldo, int64_t width, const int64_t* columns, int64_t n,
    arithmetic_t<T> scale, int64_t rows);

// dx[r, columns[c]] = compact[r, c] for c < n, every other entry of dx zero. Row strides: n, width.
template <typename T>
void scatter_columns(const T* compact, T* dx, int64_t width, const int64_t* columns, int64_t n, int64_t rows);

// dw[r, columns[c]] = scale * compact[c, r] for c < n, every other entry of dw zero. Row strides: ldc, width.
template <typename T, typename W>
void scatter_columns_transposed(
    const T* compact, int64_t ldc, W* dw, int64_t width, const int64_t* columns, int64_t n, arithmetic_t<T> scale,
    int64_t rows);

}  // namespace mixout::cpu
