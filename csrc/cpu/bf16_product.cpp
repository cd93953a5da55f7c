// The blocked product of product_blocks.h for pairs of bfloat16 values: both instructions that multiply them take two
// neighbours of the depth at once, so b is packed as [depth / 2][column][2], a word of 32 bits for each pair. One
// packing serves both; they differ in the inner loop alone.
#include "bf16_product.h"

#include <array>
#include <cstdlib>
#include <memory>

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "blocks.h"
#include "isa.h"

// Compilers that know both instructions.
#if defined(MIXOUT_AVX512) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MIXOUT_BF16_PRODUCT
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MIXOUT_DOT __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define MIXOUT_TILES __attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-bf16")))
#define MIXOUT_WORDS __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif

namespace mixout::cpu {

#ifdef MIXOUT_BF16_PRODUCT

namespace {

using c10::BFloat16;

// A tile of AMX is 16 rows of 64 bytes. Two tiles of a and two of b, four of c: all eight.
constexpr int64_t kTileRows = 32;
// 28 accumulators of 16, as in avx512.h.
constexpr int64_t kDotRows = 14;
constexpr int64_t kPanel = 32;     // columns of b that are packed side by side
constexpr int64_t kDepthUnit = 32;  // of a tile, in elements
// Elements of a packed block of b, which stays in L2 (1 MB, 2 MB where there is AMX) beside the rows of a.
constexpr int64_t kRightElements = 320 * 1024, kLeastColumns = 192;
// Depth that is multiplied at once: a block of a and one of b, of 24 KB, stay in L1.
constexpr int64_t kDepth = 256;
// Of a row of a, in elements: 2 KB.
constexpr int64_t kMeetingStride = 1024;
// How many rows before they are made, what they are made from is asked for.
constexpr int64_t kAhead = 16;
// Rows of b that are made at once, and depth of those that are turned.
constexpr int64_t kRowsAtOnce = 8, kTurnedDepth = 512;
// Rows of c for which packing one row of b is as much work as multiplying; columns of c, for a row of a.
constexpr int64_t kPackingRows = 96, kPackingColumns = 16;
// Multiply-adds, packing counted as such, that a thread must have before another one is worth waking.
constexpr int64_t kGrain = 1 << 23;

constexpr int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What a thread packs; kept between calls, since fresh memory costs page faults.
class Scratch {
 public:
  alignas(64) BFloat16 rows[kPanel * kTurnedDepth];
  alignas(64) BFloat16 left[kTileRows * (kDepth + kDepthUnit)];
  BFloat16* right(int64_t size) { return right_.grown(size); }
  float* sums(int64_t size) { return sums_.grown(size); }

 private:
  template <typename T>
  class Memory {
   public:
    T* grown(int64_t wanted) {
      if (size_ < wanted) {
        memory_.reset(static_cast<T*>(std::aligned_alloc(64, padded(wanted * sizeof(T), 64))));
        TORCH_CHECK(memory_, "mixout_kernels: no memory for a block of ", wanted, " numbers");
        size_ = wanted;
      }
      return memory_.get();
    }

   private:
    struct Free {
      void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t size_ = 0;
  };

  Memory<BFloat16> right_;
  Memory<float> sums_;
};

// A packed part of a: rows `stride` elements apart, zero beyond the depth.
struct PackedLeft {
  const BFloat16* data;
  int64_t stride;
};

// A product of up to kTileRows x kPanel sums over `depth`, a multiple of kDepthUnit, into sums[r * kPanel + c], or added
// to them.
using Kernel = void (*)(
    int64_t rows, int64_t columns, int64_t depth, PackedLeft a, const BFloat16* b, bool add, float* sums);

template <int kRows, bool kWide>
MIXOUT_DOT void dot_rows(int64_t depth, PackedLeft a, const BFloat16* b, bool add, float* sums) {
  __m512 sum[kRows][2];
#pragma GCC unroll 16  // else the sums pass through memory
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = add ? _mm512_load_ps(sums + r * kPanel) : _mm512_setzero_ps();
    sum[r][1] = add && kWide ? _mm512_load_ps(sums + r * kPanel + 16) : _mm512_setzero_ps();
  }
  // Three rows to a pointer: one address register and one stride reach them all.
  constexpr int kPointers = (kRows + 2) / 3;
  const BFloat16* left[kPointers];
  for (int i = 0; i < kPointers; ++i) left[i] = a.data + 3 * i * a.stride;
  for (int64_t k = 0; k < depth; k += 2, b += 2 * kPanel) {
    const __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int pair;
      __builtin_memcpy(&pair, left[r / 3] + r % 3 * a.stride, sizeof(pair));
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], value, b0);
      if (kWide) sum[r][1] = _mm512_dpbf16_ps(sum[r][1], value, b1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPointers; ++i) left[i] += 2;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_store_ps(sums + r * kPanel, sum[r][0]);
    if (kWide) _mm512_store_ps(sums + r * kPanel + 16, sum[r][1]);
  }
}

template <bool kWide>
constexpr std::array<void (*)(int64_t, PackedLeft, const BFloat16*, bool, float*), kDotRows> kDots = {
    dot_rows<1, kWide>, dot_rows<2, kWide>,  dot_rows<3, kWide>,  dot_rows<4, kWide>,  dot_rows<5, kWide>,
    dot_rows<6, kWide>, dot_rows<7, kWide>,  dot_rows<8, kWide>,  dot_rows<9, kWide>,  dot_rows<10, kWide>,
    dot_rows<11, kWide>, dot_rows<12, kWide>, dot_rows<13, kWide>, dot_rows<14, kWide>};

void dot_kernel(
    int64_t rows, int64_t columns, int64_t depth, PackedLeft a, const BFloat16* b, bool add, float* sums) {
  const auto product = columns > kPanel / 2 ? kDots<true>[rows - 1] : kDots<false>[rows - 1];
  product(depth, a, b, add, sums);
}

// Two tiles of a, or one where there are no more than 16 rows; of b likewise.
template <bool kTall, bool kWide>
MIXOUT_TILES void tile_product(int64_t depth, PackedLeft a, const BFloat16* b, bool add, float* sums) {
  const int64_t stride = 2 * a.stride;  // in bytes
  if (add) {
    _tile_loadd(0, sums, 4 * kPanel);
    if (kWide) _tile_loadd(1, sums + 16, 4 * kPanel);
    if (kTall) _tile_loadd(2, sums + 16 * kPanel, 4 * kPanel);
    if (kTall && kWide) _tile_loadd(3, sums + 16 * kPanel + 16, 4 * kPanel);
  } else {
    _tile_zero(0);
    if (kWide) _tile_zero(1);
    if (kTall) _tile_zero(2);
    if (kTall && kWide) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kDepthUnit, b += kDepthUnit * kPanel) {
    _tile_loadd(4, a.data + k, stride);
    _tile_loadd(6, b, 4 * kPanel);
    if (kTall) _tile_loadd(5, a.data + k + 16 * a.stride, stride);
    if (kWide) _tile_loadd(7, b + kPanel, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 6);
    if (kTall) _tile_dpbf16ps(2, 5, 6);
    if (kWide) _tile_dpbf16ps(1, 4, 7);
    if (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 4 * kPanel);
  if (kWide) _tile_stored(1, sums + 16, 4 * kPanel);
  if (kTall) _tile_stored(2, sums + 16 * kPanel, 4 * kPanel);
  if (kTall && kWide) _tile_stored(3, sums + 16 * kPanel + 16, 4 * kPanel);
}

void tile_kernel(
    int64_t rows, int64_t columns, int64_t depth, PackedLeft a, const BFloat16* b, bool add, float* sums) {
  const auto product = rows > 16 ? columns > 16 ? tile_product<true, true> : tile_product<true, false>
      : columns > 16             ? tile_product<false, true>
                                 : tile_product<false, false>;
  product(depth, a, b, add, sums);
}

// The shapes of all tiles, for as long as it lives. What was configured before is configured again: oneDNN keeps its
// shapes between some of its calls.
class Tiles {
 public:
  // GCC's intrinsics for this tell the compiler of the first 8 bytes only.
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Shapes shapes{};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) shapes.rows[tile] = 16, shapes.bytes[tile] = 64;
    load(shapes);
  }
  ~Tiles() { load(before_); }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  static void load(const Shapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
  Shapes before_;
};

MIXOUT_WORDS __mmask32 wide_lanes(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// Two rows of b as words of pairs: [32][2] from [2][32].
MIXOUT_WORDS void interleave(__m512i even, __m512i odd, BFloat16* out) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_store_si512(out, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_store_si512(out + kPanel, _mm512_permutex2var_epi16(even, high, odd));
}

// Rows `rows` of a over `deep`, padded with zeros.
MIXOUT_WORDS PackedLeft packed_left(
    const Strided<BFloat16>& a, const Block& rows, const Block& deep, bool by_tiles, Scratch& scratch) {
  constexpr int64_t stride = kDepth + kDepthUnit;
  const int64_t depth = deep.size, end = padded(depth, kDepthUnit);
  BFloat16* left = scratch.left;
  const BFloat16* from = a.data + rows.first * a.row + deep.first * a.column;
  // Whole tiles of AMX are read where they lie, which took 10 to 20 % less time with x in the third cache; by vdpbf16ps
  // any rows are, which took 7 % less at 512 x 1536 x 384, but for those that would meet in two sets of the first cache.
  if (a.column == 1 && depth == end && (by_tiles ? rows.size % 16 == 0 : a.row % kMeetingStride != 0))
    return {from, a.row};
  if (a.column == 1) {
    for (int64_t r = 0; r < rows.size; ++r)
      for (int64_t k = 0; k < end; k += kDepthUnit)
        _mm512_store_si512(
            left + r * stride + k, _mm512_maskz_loadu_epi16(wide_lanes(depth - k), from + r * a.row + k));
    return {left, stride};
  }
  // The columns of a are contiguous: pairs of them make words, which are turned 16 x 16.
  for (int64_t r = 0; r < rows.size; r += 16) {
    const __mmask16 present = lanes(rows.size - r);
    for (int64_t k = 0; k < end; k += kDepthUnit) {
      __m512 word[16];
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair) {
        const int64_t even = k + 2 * pair, odd = even + 1;
        const __m256i low = _mm256_maskz_loadu_epi16(even < depth ? present : 0, from + even * a.column + r);
        const __m256i high = _mm256_maskz_loadu_epi16(odd < depth ? present : 0, from + odd * a.column + r);
        word[pair] = _mm512_castsi512_ps(
            _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
      }
      transpose(word);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_ps(left + (r + i) * stride + k, word[i]);
    }
  }
  return {left, stride};
}

// Columns `columns` of b over the whole depth, in panels of kPanel columns; returns the first of them.
MIXOUT_WORDS const BFloat16* packed_right(
    const RightHand<BFloat16>& b, int64_t depth, const Block& columns, Scratch& scratch) {
  const int64_t end = padded(depth, kDepthUnit), next = end * kPanel;
  BFloat16* right = scratch.right(padded(columns.size, kPanel) * end);
  const Strided<BFloat16> present = b.rows.in_place();
  if (b.transposed) {
    for (int64_t j = 0; j < columns.size; j += kPanel) {
      const int64_t width = std::min(kPanel, columns.size - j);
      for (int64_t first = 0; first < end; first += kTurnedDepth) {
        const int64_t size = std::min(kTurnedDepth, depth - first), whole = padded(size, kDepthUnit);
        Strided<BFloat16> from{scratch.rows, kTurnedDepth, 1};
        if (present.data && present.row % 2 == 0 && width == kPanel && size == whole) {
          from = {present.data + (columns.first + j) * present.row + first, present.row, 1};
        } else {
          b.rows.write(columns.first + j, width, first, size, scratch.rows, kTurnedDepth);
          for (int64_t c = 0; c < width; ++c)
            std::fill(scratch.rows + c * kTurnedDepth + size, scratch.rows + c * kTurnedDepth + whole, BFloat16(0));
        }
        BFloat16* panel = right + j / kPanel * next + first * kPanel;
        for (int64_t k = 0; k < whole; k += kDepthUnit)
          for (int64_t c = 0; c < width; c += 16)
            transpose_16x16(from.data + c * from.row + k, from.row / 2, panel + k * kPanel + 2 * c, kPanel);
      }
    }
    return right;
  }
  // In pieces that fit the scratch for rows.
  constexpr int64_t kPiece = kPanel * kTurnedDepth / kRowsAtOnce;
  for (int64_t first = 0; first < columns.size; first += kPiece) {
    const int64_t size = std::min(kPiece, columns.size - first);
    for (int64_t k = 0; k < end; k += kRowsAtOnce) {
      const int64_t rows = std::clamp<int64_t>(depth - k, 0, kRowsAtOnce);
      Strided<BFloat16> from{scratch.rows, kPiece, 1};
      if (present.data)
        from = {present.data + k * present.row + columns.first + first, present.row, 1};
      else if (rows > 0)
        b.rows.write(k, rows, columns.first + first, size, scratch.rows, kPiece);
      if (const int64_t next_rows = std::min(kRowsAtOnce, depth - k - kAhead); next_rows > 0)
        b.rows.prefetch(k + kAhead, next_rows, columns.first + first, size);
      for (int64_t r = 0; r < kRowsAtOnce; r += 2)
        for (int64_t c = 0; c < size; c += kPanel) {
          const __mmask32 wanted = wide_lanes(size - c);
          const BFloat16* row = from.data + r * from.row + c;
          const __m512i even = _mm512_maskz_loadu_epi16(r < rows ? wanted : 0, row);
          const __m512i odd = _mm512_maskz_loadu_epi16(r + 1 < rows ? wanted : 0, row + from.row);
          interleave(even, odd, right + (first + c) / kPanel * next + (k + r) * kPanel);
        }
    }
  }
  return right;
}

// Rows `rows` and columns `columns` of c, by one thread.
void multiply_part(
    const Block& rows, const Block& columns, int64_t depth, const Strided<BFloat16>& a, const RightHand<BFloat16>& b,
    const Sums& c, Kernel kernel, int64_t tile_rows) {
  thread_local const auto scratch = std::make_unique<Scratch>();
  const int64_t end = padded(depth, kDepthUnit);
  const int64_t widest = std::max(kLeastColumns, kRightElements / std::max<int64_t>(end, 1) / kPanel * kPanel);
  const int64_t blocks = (columns.size + widest - 1) / widest;
  const int64_t depth_blocks = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
  for (int64_t j = 0; j < blocks; ++j) {
    Block wide = part_of(columns.size, j, blocks, kPanel);
    wide.first += columns.first;
    const BFloat16* right = packed_right(b, depth, wide, *scratch);
    float* sums = scratch->sums(padded(wide.size, kPanel) * kTileRows);
    for (int64_t r = 0; r < rows.size; r += tile_rows) {
      const Block tall{rows.first + r, std::min(tile_rows, rows.size - r)};
      for (int64_t k = 0; k < depth_blocks; ++k) {
        const Block deep = part_of(depth, k, depth_blocks, kDepthUnit);
        const PackedLeft left = packed_left(a, tall, deep, tile_rows == kTileRows, *scratch);
        const BFloat16* panel = right + deep.first * kPanel;
        // A panel's sums are stored while the next one is multiplied: tiles take a while to reach memory.
        const auto store = [&](int64_t q) {
          c.store(
              tall.first, tall.size, wide.first + q, std::min(kPanel, wide.size - q), sums + q * kTileRows, kPanel);
        };
        const bool last = k + 1 == depth_blocks;
        for (int64_t q = 0; q < wide.size; q += kPanel, panel += end * kPanel) {
          kernel(
              tall.size, std::min(kPanel, wide.size - q), padded(deep.size, kDepthUnit), left, panel, k > 0,
              sums + q * kTileRows);
          if (last && q > 0) store(q - kPanel);
        }
        if (last) store((wide.size - 1) / kPanel * kPanel);
      }
    }
  }
}

bool system_grants_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Bf16Unit best_unit() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return Bf16Unit::none;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool tiles = (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  const bool dot = eax >> 5 & 1;
  if (tiles && isa_allows("AMX") && system_grants_tiles()) return Bf16Unit::tiles;
  return dot && isa_allows("AMX", "BF16", "FP16", "AVX10") ? Bf16Unit::dot : Bf16Unit::none;
}

}  // namespace

MIXOUT_DOT void round_sums(
    const float* sums, int64_t lds, const BFloat16* bias, BFloat16* out, int64_t ldo, int64_t n, int64_t rows) {
  const __mmask16 low = lanes(n), high = lanes(n - 16);
  __m512 add[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (bias) {
    add[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, bias)), 16));
    add[1] = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, bias + 16)), 16));
  }
  for (int64_t r = 0; r < rows; ++r, sums += lds, out += ldo) {
    const __m512 first = _mm512_add_ps(_mm512_loadu_ps(sums), add[0]);
    const __m512 second = _mm512_add_ps(_mm512_loadu_ps(sums + 16), add[1]);
    _mm512_mask_storeu_epi16(out, (__mmask32)high << 16 | low, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
}

Bf16Unit bf16_unit() {
  static const Bf16Unit unit = best_unit();
  return unit;
}

void multiply(
    int64_t m, int64_t n, int64_t depth, const Strided<BFloat16>& a, const RightHand<BFloat16>& b, const Sums& c) {
  const bool by_tiles = bf16_unit() == Bf16Unit::tiles;
  const int64_t tile_rows = by_tiles ? kTileRows : kDotRows;
  const int64_t threads = std::clamp<int64_t>((m + kPackingRows) * n * depth / kGrain, 1, at::get_num_threads());
  int64_t across = 1, least = INT64_MAX;
  for (int64_t columns = 1; columns <= threads; ++columns) {
    // Each part packs what it multiplies. The last has the most tiles, and one that is cut off costs a whole one (of
    // columns a half).
    const int64_t wide = std::min(tiles_of(n, columns, kPanel) * kPanel, padded(n, kPanel / 2));
    const int64_t tall = tiles_of(m, threads / columns, tile_rows) * tile_rows;
    const int64_t work = wide * tall + wide * kPackingRows + tall * kPackingColumns;
    if (work < least) across = columns, least = work;
  }
  const int64_t down = threads / across;
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Block rows = part_of(m, part / across, down, tile_rows);
      const Block columns = part_of(n, part % across, across, kPanel);
      if (by_tiles) {
        const Tiles tiles;
        multiply_part(rows, columns, depth, a, b, c, tile_kernel, tile_rows);
      } else {
        multiply_part(rows, columns, depth, a, b, c, dot_kernel, tile_rows);
      }
    }
  });
}

#else

Bf16Unit bf16_unit() { return Bf16Unit::none; }

void round_sums(const float*, int64_t, const c10::BFloat16*, c10::BFloat16*, int64_t, int64_t, int64_t) {}

void multiply(
    int64_t, int64_t, int64_t, const Strided<c10::BFloat16>&, const RightHand<c10::BFloat16>&, const Sums&) {
  TORCH_CHECK(false, "mixout_kernels: the fused product in bfloat16 is written for x86-64 Linux");
}

#endif

}  // namespace mixout::cpu
