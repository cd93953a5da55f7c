#include "mixer.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "kernels.h"
#include "mixout.h"

namespace mixout::cpu {

namespace {

// Words of one block and the three tensors' blocks stay in L1.
constexpr int64_t kBlock = 1024;
// What a thread mixes at once of a long row; a multiple of kBlock.
constexpr int64_t kPiece = 8 * kBlock;

// Whether all bits are zero: each byte is the one before it, and the first is 0. memcmp stops at the first that is not.
bool is_zero(const void* memory, size_t bytes) {
  const char* first = static_cast<const char*>(memory);
  return *first == 0 && std::memcmp(first, first + 1, bytes - 1) == 0;
}

// The words of the elements of a Layout.
class Words {
 public:
  Words(uint64_t seed, const Layout& layout) : seed_(seed), layout_(layout) {
    // Where rows share their words these are made once, unless there is one row anyway: it may be a whole weight.
    if (layout.rows > 1 && layout.decisions.row == 0 && layout.decisions.column != 0) {
      shared_.resize(layout.columns / layout.inner);
      mask_words(seed, layout.decisions.offset, layout.decisions.column, shared_.size(), shared_.data());
    }
  }

  bool by_row() const { return layout_.decisions.column == 0; }

  // Neighbouring rows whose words are lanes of the same Philox blocks, from this row on, and which lane is the first.
  struct Group {
    int64_t rows, lane;
  };
  Group group(int64_t row, int64_t rows) const {
    const auto& [offset, row_stride, column_stride] = layout_.decisions;
    if (row_stride != 1 || column_stride % 4 != 0 || layout_.inner != 1) return {1, 0};
    const int64_t lane = static_cast<int64_t>(layout_.decisions.index(row, 0) & 3);
    return {std::min(4 - lane, rows), lane};
  }

  // Those of elements [row, first + c] for c < n <= kBlock; `buffer` has room for them.
  const uint32_t* of_row(int64_t row, int64_t first, int64_t n, uint32_t* buffer) const {
    if (layout_.inner == 1) return of_features(row, first, n, buffer);
    const int64_t inner = layout_.inner, first_feature = first / inner;
    const int64_t features = (first + n - 1) / inner + 1 - first_feature;
    uint32_t feature_buffer[kBlock];
    const uint32_t* words = of_features(row, first_feature, features, feature_buffer);
    for (int64_t c = 0, feature = 0; c < n; ++feature) {
      const int64_t end = std::min(n, (first_feature + feature + 1) * inner - first);
      std::fill(buffer + c, buffer + end, words[feature]);
      c = end;
    }
    return buffer;
  }

  // Those of a group: row r's from buffer + (lane + r) * n on.
  void of_group(int64_t row, int64_t first, int64_t n, uint32_t* buffer) const {
    const uint64_t index = layout_.decisions.index(row, first) & ~uint64_t{3};
    mask_words_of_four_rows(seed_, index, layout_.decisions.column, n, buffer);
  }

  uint32_t of(int64_t row, int64_t column) const {
    return mask_word(seed_, layout_.decisions.index(row, column / layout_.inner));
  }

 private:
  const uint32_t* of_features(int64_t row, int64_t first, int64_t n, uint32_t* buffer) const {
    if (!shared_.empty()) return shared_.data() + first;
    mask_words(seed_, layout_.decisions.index(row, first), layout_.decisions.column, n, buffer);
    return buffer;
  }

  uint64_t seed_;
  Layout layout_;
  std::vector<uint32_t> shared_;
};

// Mixes any part of contiguous memory that lies as a Layout.
template <typename W, typename U, typename O>
class Mixer {
 public:
  using Result = O;

  Mixer(const W* w, const U* u, const Draw& draw, const Layout& layout, arithmetic_t<W> factor)
      : w_(w),
        u_(u),
        length_(layout.columns),
        threshold_(draw.threshold()),
        factor_(factor),
        words_(draw.seed, layout) {}

  void prefetch(int64_t row, int64_t rows, int64_t first, int64_t n) const {
    constexpr int64_t kLine = 64;
    for (int64_t r = row; r < row + rows; ++r) {
      for (int64_t c = 0; c < n; c += kLine / sizeof(W)) __builtin_prefetch(w(r, first + c));
      if (u_ == nullptr) continue;
      for (int64_t c = 0; c < n; c += kLine / sizeof(U)) __builtin_prefetch(u(r, first + c));
    }
  }

  // Elements [row + r, first + c] for r < rows and c < n, into out + r * ld. Zeros that are masked in place stay as they
  // are without a word being drawn: the gradient of an embedding is zero for every token that a batch has not.
  void write(int64_t row, int64_t rows, int64_t first, int64_t n, O* out, int64_t ld) const {
    for (int64_t r = 0; r < rows;) {
      if (words_.by_row()) {
        mix_run(w(row + r, first), u(row + r, first), out + r * ld, words_.of(row + r, 0) >= threshold_, factor_, n);
        ++r;
        continue;
      }
      const auto group = words_.group(row + r, rows - r);
      for (int64_t c = 0; c < n; c += kBlock) {
        const int64_t size = std::min(kBlock, n - c);
        if (group.rows == 1) {
          if (stays_zero(row + r, first + c, size, out + r * ld + c)) continue;
          uint32_t buffer[kBlock];
          mix(row + r, first + c, size, words_.of_row(row + r, first + c, size, buffer), out + r * ld + c);
          continue;
        }
        uint32_t buffer[4 * kBlock];
        words_.of_group(row + r, first + c, size, buffer);
        for (int64_t i = 0; i < group.rows; ++i)
          mix(row + r + i, first + c, size, buffer + (group.lane + i) * size, out + (r + i) * ld + c);
      }
      r += group.rows;
    }
  }

 private:
  const W* w(int64_t row, int64_t column) const { return w_ + row * length_ + column; }
  const U* u(int64_t row, int64_t column) const { return u_ == nullptr ? nullptr : u_ + row * length_ + column; }
  bool stays_zero(int64_t row, int64_t column, int64_t n, const O* out) const {
    const W* in = w(row, column);
    return u_ == nullptr && static_cast<const void*>(out) == in && is_zero(in, n * sizeof(W));
  }
  void mix(int64_t row, int64_t column, int64_t n, const uint32_t* words, O* out) const {
    mix_by_words(w(row, column), u(row, column), out, words, threshold_, factor_, n);
  }

  const W* w_;
  const U* u_;
  int64_t length_;
  uint32_t threshold_;
  arithmetic_t<W> factor_;
  Words words_;
};

// As few rows as the decisions allow: those of a weight mask lie as one row's would.
Layout merged(const Layout& layout) {
  const auto& [offset, row, column] = layout.decisions;
  if (layout.inner == 1 && row == layout.columns * column)
    return {1, layout.rows * layout.columns, 1, {offset, 0, column}};
  return layout;
}

// Calls f(row, rows, first, n) for parts that cover the layout, on several threads.
template <typename F>
void for_each_part(const Layout& layout, const F& f) {
  const int64_t tall = layout.decisions.row == 1 ? 4 : 1;  // so that a group of rows is not split
  const int64_t wide = std::min(layout.columns, kPiece);
  const int64_t across = (layout.columns + wide - 1) / wide, down = (layout.rows + tall - 1) / tall;
  at::parallel_for(0, across * down, std::max<int64_t>(1, kGrain / (wide * tall)), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part / across * tall, first = part % across * wide;
      f(row, std::min(tall, layout.rows - row), first, std::min(wide, layout.columns - first));
    }
  });
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<W>, Type<U>, Type<O>) with the C++ types of weight, target and result.
template <typename F>
void dispatch_types(at::ScalarType w, at::ScalarType u, at::ScalarType o, const F& f) {
  constexpr Type<double> f64;
  constexpr Type<float> f32;
  constexpr Type<c10::BFloat16> bf16;
  constexpr Type<c10::Half> f16;
  if (w == at::kFloat && (u == at::kFloat || u == at::kBFloat16)) {
    const auto with_result = [&](auto target) {
      if (o == at::kFloat) return f(f32, target, f32);
      if (o == at::kBFloat16) return f(f32, target, bf16);
      if (o == at::kHalf) return f(f32, target, f16);
      TORCH_CHECK(false, "mixout_kernels: no CPU kernel mixes Float into ", o);
    };
    return u == at::kFloat ? with_result(f32) : with_result(bf16);
  }
  if (w == at::kDouble && u == at::kDouble && o == at::kDouble) return f(f64, f64, f64);
  if (w == at::kBFloat16 && u == at::kBFloat16 && o == at::kBFloat16) return f(bf16, bf16, bf16);
  if (w == at::kBFloat16 && u == at::kBFloat16 && o == at::kFloat) return f(bf16, bf16, f32);
  if (w == at::kHalf && u == at::kHalf && o == at::kHalf) return f(f16, f16, f16);
  if (w == at::kHalf && u == at::kHalf && o == at::kFloat) return f(f16, f16, f32);
  TORCH_CHECK(false, "mixout_kernels: no CPU kernel mixes a ", w, " weight with a ", u, " target into ", o);
}

// Calls f with the Mixer of these tensors.
template <typename F>
void with_mixer(
    const Tensor& w, const std::optional<Tensor>& u, at::ScalarType result, const Draw& draw, const Layout& layout,
    double factor, const F& f) {
  const auto target_type = u ? u->scalar_type() : w.scalar_type();
  dispatch_types(w.scalar_type(), target_type, result, [&](auto w_type, auto u_type, auto out_type) {
    using W = typename decltype(w_type)::type;
    using U = typename decltype(u_type)::type;
    using O = typename decltype(out_type)::type;
    f(Mixer<W, U, O>(
        static_cast<const W*>(w.const_data_ptr()), u ? static_cast<const U*>(u->const_data_ptr()) : nullptr, draw,
        layout, static_cast<arithmetic_t<W>>(factor)));
  });
}

template <typename Mixer>
class MixedRows : public Rows<typename Mixer::Result> {
 public:
  MixedRows(const Tensor& w, const std::optional<Tensor>& u, const Mixer& mixer) : w_(w), u_(u), mixer_(mixer) {}
  void write(int64_t row, int64_t rows, int64_t column, int64_t columns, typename Mixer::Result* out, int64_t ld)
      const override {
    mixer_.write(row, rows, column, columns, out, ld);
  }
  void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const override {
    mixer_.prefetch(row, rows, column, columns);
  }

 private:
  Tensor w_;  // both are held: the mixer has only their addresses
  std::optional<Tensor> u_;
  Mixer mixer_;
};

}  // namespace

void mix_into(
    const Tensor& out, const Tensor& w, const std::optional<Tensor>& u, const Draw& draw, const Layout& layout,
    double factor) {
  if (out.numel() == 0) return;
  const Layout parts = merged(layout);
  with_mixer(w, u, out.scalar_type(), draw, parts, factor, [&](const auto& mixer) {
    auto* to = static_cast<typename std::decay_t<decltype(mixer)>::Result*>(out.mutable_data_ptr());
    for_each_part(parts, [&](int64_t row, int64_t rows, int64_t first, int64_t n) {
      mixer.write(row, rows, first, n, to + row * parts.columns + first, parts.columns);
    });
  });
}

template <typename T>
std::unique_ptr<Rows<T>> mixed_rows(
    const Tensor& w, const std::optional<Tensor>& u, const Draw& draw, const Layout& layout) {
  std::unique_ptr<Rows<T>> rows;
  with_mixer(w, u, c10::CppTypeToScalarType<T>::value, draw, layout, draw.scale(), [&](const auto& mixer) {
    using Mixer = std::decay_t<decltype(mixer)>;
    if constexpr (std::is_same_v<typename Mixer::Result, T>)
      rows = std::make_unique<MixedRows<Mixer>>(w, u, mixer);
  });
  return rows;
}

template std::unique_ptr<Rows<float>> mixed_rows<float>(
    const Tensor&, const std::optional<Tensor>&, const Draw&, const Layout&);
template std::unique_ptr<Rows<c10::BFloat16>> mixed_rows<c10::BFloat16>(
    const Tensor&, const std::optional<Tensor>&, const Draw&, const Layout&);
template std::unique_ptr<Rows<c10::Half>> mixed_rows<c10::Half>(
    const Tensor&, const std::optional<Tensor>&, const Draw&, const Layout&);

Tensor keep_mask(const Draw& draw, const Layout& strided) {
  const Layout layout = strided.from(draw.offset);
  const Tensor mask = at::empty({layout.rows * layout.columns}, at::kBool);
  bool* keep = mask.mutable_data_ptr<bool>();
  const uint64_t threshold = keep_threshold(draw.p);
  const Words words(draw.seed, layout);
  if (mask.numel() == 0) return mask;
  for_each_part(layout, [&](int64_t first_row, int64_t rows, int64_t first, int64_t n) {
    uint32_t buffer[kBlock];
    for (int64_t row = first_row; row < first_row + rows; ++row)
      for (int64_t c = first; c < first + n; c += kBlock) {
        const int64_t size = std::min(kBlock, first + n - c);
        const uint32_t* of_row = words.of_row(row, c, size, buffer);
        for (int64_t j = 0; j < size; ++j) keep[row * layout.columns + c + j] = of_row[j] >= threshold;
      }
  });
  return mask;
}

Tensor mixout(
    const Tensor& weight, const std::optional<Tensor>& target, const Draw& draw, const Layout& layout, double factor) {
  const Tensor out = at::empty(weight.sizes(), weight.options());
  const auto contiguous_target = target ? std::optional<Tensor>(target->contiguous()) : std::nullopt;
  mix_into(out, weight.contiguous(), contiguous_target, draw, layout.from(draw.offset), factor);
  return out;
}

}  // namespace mixout::cpu
