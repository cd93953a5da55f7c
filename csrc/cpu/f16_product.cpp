// The blocked product of product_blocks.h over float16 operands. Its sums stay in float32 beside the caches until the whole
// depth is done, so b is packed over the whole depth and over fewer columns, as in bf16_product.cpp.
#include "f16_product.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "blocks.h"
#include "isa.h"

#ifdef MIXOUT_AVX512
#include "avx512.h"
#include "tiles.h"
#endif

namespace mixout::cpu {

#ifdef MIXOUT_AVX512

#define MIXOUT_HALVES __attribute__((target("avx512f,avx512bw,avx512vl")))

namespace {

using c10::Half;

// Depth that is multiplied at once: a tile of a and a panel of b stay in L1.
constexpr int64_t kDepth = 192, kDepthStride = kDepth + 16;
// Elements of a packed block of b: 590 KB of an L2 cache of 1 MB, as in product_blocks.h.
constexpr int64_t kRightElements = 144 * 1024, kLeastColumns = 2 * kTileColumns;
// Rows of b that are made at once, and how many before that, what they are made from is asked for.
constexpr int64_t kRowsAtOnce = 8, kAhead = 16;
// Elements of b that are made at once.
constexpr int64_t kMade = 8192;

constexpr int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What a thread packs; kept between calls, since fresh memory costs page faults.
class Scratch {
 public:
  alignas(64) float left[16 * kDepthStride];  // [row][depth], or [depth][16] where a's columns are contiguous
  alignas(64) Half made[kMade];
  float* right(int64_t size) { return right_.grown(size); }
  float* sums(int64_t size) { return sums_.grown(size); }

 private:
  class Memory {
   public:
    float* grown(int64_t wanted) {
      if (size_ < wanted) {
        memory_.reset(static_cast<float*>(std::aligned_alloc(64, padded(wanted * sizeof(float), 64))));
        TORCH_CHECK(memory_, "mixout_kernels: no memory for a block of ", wanted, " numbers");
        size_ = wanted;
      }
      return memory_.get();
    }

   private:
    struct Free {
      void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
  };

  Memory right_, sums_;
};

// Up to 16 values, the others zero.
MIXOUT_HALVES __m512 widened(const Half* from, __mmask16 present) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(present, from));
}

// Rows `rows` of a over `depth`.
MIXOUT_HALVES Strided<float> packed_left(
    const Strided<Half>& a, const Block& rows, const Block& depth, Scratch& scratch) {
  const Half* from = a.data + rows.first * a.row + depth.first * a.column;
  if (a.column == 1) {
    for (int64_t r = 0; r < rows.size; ++r)
      for (int64_t k = 0; k < depth.size; k += 16)
        _mm512_store_ps(scratch.left + r * kDepthStride + k, widened(from + r * a.row + k, lanes(depth.size - k)));
    return {scratch.left, kDepthStride, 1};
  }
  const __mmask16 present = lanes(rows.size);
  for (int64_t k = 0; k < depth.size; ++k) _mm512_store_ps(scratch.left + 16 * k, widened(from + k * a.column, present));
  return {scratch.left, 1, 16};
}

// A panel of 32 columns from `rows` rows of b as they lie: [rows][32].
MIXOUT_HALVES void widen_rows(const Strided<Half>& from, int64_t rows, int64_t columns, float* panel) {
  const __mmask16 low = lanes(columns), high = lanes(columns - 16);
  for (int64_t k = 0; k < rows; ++k, panel += kTileColumns) {
    _mm512_store_ps(panel, widened(from.data + k * from.row, low));
    _mm512_store_ps(panel + 16, widened(from.data + k * from.row + 16, high));
  }
}

// The same from up to 32 rows of the transpose, over `depth`.
MIXOUT_HALVES void widen_columns(const Strided<Half>& from, int64_t columns, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; k += 16)
    for (int64_t c = 0; c < kTileColumns; c += 16) {
      __m512 word[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r)
        word[r] = widened(from.data + (c + r) * from.row + k, c + r < columns ? lanes(depth - k) : 0);
      transpose(word);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_ps(panel + (k + r) * kTileColumns + c, word[r]);
    }
}

// Columns `columns` of b over the whole depth, in panels of kTileColumns columns, `next` elements apart.
const float* packed_right(
    const RightHand<Half>& b, int64_t depth, const Block& columns, int64_t next, Scratch& scratch) {
  float* right = scratch.right(padded(columns.size, kTileColumns) / kTileColumns * next);
  const Strided<Half> present = b.rows.in_place();
  if (b.transposed) {
    constexpr int64_t kPiece = kMade / kTileColumns;
    for (int64_t j = 0; j < columns.size; j += kTileColumns)
      for (int64_t k = 0; k < depth; k += kPiece) {
        const int64_t wide = std::min(kTileColumns, columns.size - j), deep = std::min(kPiece, depth - k);
        Strided<Half> from{scratch.made, kPiece, 1};
        if (present.data)
          from = {present.data + (columns.first + j) * present.row + k, present.row, 1};
        else
          b.rows.write(columns.first + j, wide, k, deep, scratch.made, kPiece);
        widen_columns(from, wide, deep, right + j / kTileColumns * next + k * kTileColumns);
      }
    return right;
  }
  constexpr int64_t kPiece = kMade / kRowsAtOnce;
  for (int64_t first = 0; first < columns.size; first += kPiece) {
    const int64_t wide = std::min(kPiece, columns.size - first);
    for (int64_t k = 0; k < depth; k += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, depth - k);
      Strided<Half> from{scratch.made, kPiece, 1};
      if (present.data)
        from = {present.data + k * present.row + columns.first + first, present.row, 1};
      else
        b.rows.write(k, rows, columns.first + first, wide, scratch.made, kPiece);
      if (const int64_t ahead = std::min(kRowsAtOnce, depth - k - kAhead); ahead > 0)
        b.rows.prefetch(k + kAhead, ahead, columns.first + first, wide);
      for (int64_t c = 0; c < wide; c += kTileColumns)
        widen_rows(
            {from.data + c, from.row, 1}, rows, std::min(kTileColumns, wide - c),
            right + (first + c) / kTileColumns * next + k * kTileColumns);
    }
  }
  return right;
}

// Rows `rows` and columns `columns` of c, by one thread.
void multiply_part(
    const Block& rows, const Block& columns, int64_t depth, const Strided<Half>& a, const RightHand<Half>& b,
    const Sums& c) {
  thread_local const auto scratch = std::make_unique<Scratch>();
  const int64_t next = padded(depth, 16) * kTileColumns;  // what is turned is turned by 16
  const int64_t widest =
      std::max(kLeastColumns, kRightElements / std::max<int64_t>(depth, 1) / kTileColumns * kTileColumns);
  const int64_t blocks = (columns.size + widest - 1) / widest;
  const int64_t depth_blocks = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
  for (int64_t j = 0; j < blocks; ++j) {
    Block wide = part_of(columns.size, j, blocks, kTileColumns);
    wide.first += columns.first;
    const float* right = packed_right(b, depth, wide, next, *scratch);
    const int64_t width = padded(wide.size, kTileColumns);
    float* sums = scratch->sums(width * kTileRows);
    for (int64_t r = 0; r < rows.size; r += kTileRows) {
      const Block tall{rows.first + r, std::min(kTileRows, rows.size - r)};
      for (int64_t k = 0; k < depth_blocks; ++k) {
        const Block deep{k * kDepth, std::min(kDepth, depth - k * kDepth)};
        const Strided<float> left = packed_left(a, tall, deep, *scratch);
        const float* panel = right + deep.first * kTileColumns;
        for (int64_t q = 0; q < wide.size; q += kTileColumns, panel += next)
          kTiles[tall.size - 1](
              deep.size, left, panel, kTileColumns, nullptr, k > 0, sums + q, width, kTileColumns);
      }
      for (int64_t q = 0; q < wide.size; q += kTileColumns)
        c.store(tall.first, tall.size, wide.first + q, std::min(kTileColumns, wide.size - q), sums + q, width);
    }
  }
}

}  // namespace

MIXOUT_HALVES void round_sums(
    const float* sums, int64_t lds, float scale, const Half* bias, Half* out, int64_t ldo, int64_t n, int64_t rows) {
  const __mmask16 low = lanes(n), high = lanes(n - 16);
  const __m512 add[2] = {
      bias ? widened(bias, low) : _mm512_setzero_ps(), bias ? widened(bias + 16, high) : _mm512_setzero_ps()};
  const __m512 factor = _mm512_set1_ps(scale);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  for (int64_t r = 0; r < rows; ++r, sums += lds, out += ldo) {
    const __m512 first = _mm512_add_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(low, sums), factor), add[0]);
    const __m512 second = _mm512_add_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(high, sums + 16), factor), add[1]);
    _mm256_mask_storeu_epi16(out, low, _mm512_cvtps_ph(first, kNearest));
    _mm256_mask_storeu_epi16(out + 16, high, _mm512_cvtps_ph(second, kNearest));
  }
}

bool f16_product_available() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         isa_allows("AVX512", "AVX10");
}

void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<Half>& a, const RightHand<Half>& b, const Sums& c) {
  const Shares shares = shares_of(m, n, depth);
  at::parallel_for(0, shares.across * shares.down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      multiply_part(
          part_of(m, part / shares.across, shares.down, kTileRows),
          part_of(n, part % shares.across, shares.across, kTileColumns), depth, a, b, c);
  });
}

#else

bool f16_product_available() { return false; }

void round_sums(const float*, int64_t, float, const c10::Half*, c10::Half*, int64_t, int64_t, int64_t) {}

void multiply(int64_t, int64_t, int64_t, const Strided<c10::Half>&, const RightHand<c10::Half>&, const Sums&) {
  TORCH_CHECK(false, "mixout_kernels: the fused product of the CPU backend is written for x86-64");
}

#endif

bool library_multiplies_f16() {
#if defined(__x86_64__)
  // oneDNN's own answer, which ONEDNN_MAX_CPU_ISA enters into.
  static const bool supported = [] {
    const auto answer = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_fp16_supported", ""});
    return answer && answer->typed<bool()>().call();
  }();
  return supported;
#else
  return true;  // torch has loops of its own for ARM, which were not measured
#endif
}

}  // namespace mixout::cpu
