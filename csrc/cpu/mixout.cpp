// The mask and the mix over tensors: threads, data types, memory layouts.
#include "mixout.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../mix.h"
#include "kernels.h"

namespace mixout::cpu {

namespace {

// Words of one block and the three tensors' blocks stay in L1.
constexpr int64_t kBlock = 1024;
// Elements a thread must have before another one is worth waking (about 10 us of work).
constexpr int64_t kGrain = 16384;

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

// The memory of a weight as rows of `length`, mixed piece by piece. One word decides an element (per_weight), a column
// (inner == 1), or a row.
template <typename W, typename U, typename O>
class Mixer {
 public:
  using Result = O;

  Mixer(const W* w, const U* u, uint64_t seed, uint32_t threshold, arithmetic_t<W> scale, const MaskLayout& layout)
      : length(layout.inner == 1 ? layout.features : layout.inner),
        w_(w),
        u_(u),
        seed_(seed),
        threshold_(threshold),
        scale_(scale),
        layout_(layout),
        words_(layout.per_weight ? 0 : layout.features) {
    mask_words(seed, 0, 1, static_cast<int64_t>(words_.size()), words_.data());
  }

  void write(int64_t row, int64_t first, int64_t n, O* out) const {
    const W* w = w_ + row * length + first;
    const U* u = u_ == nullptr ? nullptr : u_ + row * length + first;
    if (layout_.per_weight) {
      // The memory of [inner, features] turned: neighbours in a row are `features` apart in the weight.
      const int64_t stride = layout_.transposed ? layout_.features : 1;
      const int64_t index = layout_.transposed ? first * stride + row : row * length + first;
      uint32_t words[kBlock];
      for (int64_t i = 0; i < n; i += kBlock) {
        const int64_t size = std::min(kBlock, n - i);
        mask_words(seed_, index + i * stride, stride, size, words);
        mix_by_words(w + i, u == nullptr ? nullptr : u + i, out + i, words, threshold_, scale_, size);
      }
    } else if (layout_.inner == 1) {
      mix_by_words(w, u, out, words_.data() + first, threshold_, scale_, n);
    } else {
      mix_run(w, u, out, words_[row % layout_.features] >= threshold_, scale_, n);
    }
  }

  const int64_t length;

 private:
  const W* w_;
  const U* u_;
  uint64_t seed_;
  uint32_t threshold_;
  arithmetic_t<W> scale_;
  MaskLayout layout_;
  std::vector<uint32_t> words_;
};

template <typename Mixer>
void mix_all(const Mixer& mixer, typename Mixer::Result* out, const MaskLayout& layout) {
  const int64_t n = layout.outer * layout.features * layout.inner;
  if (layout.per_weight && !layout.transposed) {  // the index is the place in memory: rows do not matter
    at::parallel_for(0, (n + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kBlock;
      mixer.write(0, first, std::min(end * kBlock, n) - first, out + first);
    });
  } else {
    const int64_t length = mixer.length;
    at::parallel_for(0, n / length, std::max<int64_t>(1, kGrain / length), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) mixer.write(row, 0, length, out + row * length);
    });
  }
}

template <typename Mixer>
class MixedRows : public Rows {
 public:
  MixedRows(const Tensor& w, const std::optional<Tensor>& u, const Mixer& mixer) : w_(w), u_(u), mixer_(mixer) {}
  void write(int64_t row, int64_t first, int64_t n, float* out) const override { mixer_.write(row, first, n, out); }

 private:
  Tensor w_;  // both are held: the mixer has only their addresses
  std::optional<Tensor> u_;
  Mixer mixer_;
};

}  // namespace

uint64_t seed_value(const Tensor& seed) { return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()); }

namespace {

// Calls f with the Mixer of these tensors.
template <typename F>
void with_mixer(
    const Tensor& w, const std::optional<Tensor>& u, at::ScalarType result, uint64_t seed, double p, double scale,
    const MaskLayout& layout, const F& f) {
  const auto target_type = u ? u->scalar_type() : w.scalar_type();
  dispatch_types(w.scalar_type(), target_type, result, [&](auto w_type, auto u_type, auto out_type) {
    using W = typename decltype(w_type)::type;
    using U = typename decltype(u_type)::type;
    using O = typename decltype(out_type)::type;
    f(Mixer<W, U, O>(
        static_cast<const W*>(w.const_data_ptr()), u ? static_cast<const U*>(u->const_data_ptr()) : nullptr, seed,
        static_cast<uint32_t>(keep_threshold(p)), static_cast<arithmetic_t<W>>(scale), layout));
  });
}

}  // namespace

void mix_into(
    const Tensor& out, const Tensor& w, const std::optional<Tensor>& u, uint64_t seed, double p, double scale,
    const MaskLayout& layout) {
  if (out.numel() == 0) return;
  with_mixer(w, u, out.scalar_type(), seed, p, scale, layout, [&](const auto& mixer) {
    using Result = typename std::decay_t<decltype(mixer)>::Result;
    mix_all(mixer, static_cast<Result*>(out.mutable_data_ptr()), layout);
  });
}

std::unique_ptr<Rows> mixed_rows(
    const Tensor& w, const std::optional<Tensor>& u, uint64_t seed, double p, const MaskLayout& layout) {
  std::unique_ptr<Rows> rows;
  with_mixer(w, u, at::kFloat, seed, p, 1 / (1 - p), layout, [&](const auto& mixer) {
    using Mixer = std::decay_t<decltype(mixer)>;
    if constexpr (std::is_same_v<typename Mixer::Result, float>)
      rows = std::make_unique<MixedRows<Mixer>>(w, u, mixer);
  });
  return rows;
}

Tensor keep_mask(const Tensor& seed, double p, int64_t n) {
  const Tensor mask = at::empty({n}, at::kBool);
  bool* keep = mask.mutable_data_ptr<bool>();
  const uint64_t key = seed_value(seed), threshold = keep_threshold(p);
  at::parallel_for(0, (n + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    uint32_t words[kBlock];
    for (int64_t i = begin * kBlock; i < std::min(end * kBlock, n); i += kBlock) {
      const int64_t size = std::min(kBlock, n - i);
      mask_words(key, i, 1, size, words);
      for (int64_t j = 0; j < size; ++j) keep[i + j] = words[j] >= threshold;
    }
  });
  return mask;
}

Tensor mixout(
    const Tensor& weight, const std::optional<Tensor>& target, const Tensor& seed, double p, double scale,
    bool per_weight) {
  const Tensor out = at::empty(weight.sizes(), weight.options());
  if (p == 1) return target ? out.copy_(*target) : out.zero_();
  const bool vector = weight.dim() < 2;
  const int64_t outer = vector ? 1 : weight.size(0), features = vector ? weight.numel() : weight.size(1);
  const int64_t inner = weight.numel() == 0 ? 0 : weight.numel() / (outer * features);
  const auto contiguous_target = target ? std::optional<Tensor>(target->contiguous()) : std::nullopt;
  mix_into(
      out, weight.contiguous(), contiguous_target, seed_value(seed), p, scale, {outer, features, inner, per_weight});
  return out;
}

}  // namespace mixout::cpu
