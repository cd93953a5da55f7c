// The mask and the mix over tensors: threads, data types, memory layouts.
#include "mixout.h"

#include <algorithm>
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

template <typename W, typename U, typename O>
void mix_typed(
    const W* w, const U* u, O* out, uint64_t seed, uint32_t threshold, arithmetic_t<W> scale, const MaskLayout& layout) {
  const auto& [outer, features, inner, per_weight, transposed] = layout;
  const auto at_offset = [u](int64_t i) { return u == nullptr ? nullptr : u + i; };

  if (per_weight && !transposed) {
    const int64_t n = outer * features * inner;
    at::parallel_for(0, (n + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      uint32_t words[kBlock];
      for (int64_t i = begin * kBlock; i < std::min(end * kBlock, n); i += kBlock) {
        const int64_t size = std::min(kBlock, n - i);
        mask_words(seed, i, 1, size, words);
        mix_by_words(w + i, at_offset(i), out + i, words, threshold, scale, size);
      }
    });
  } else if (per_weight) {
    at::parallel_for(0, features, std::max<int64_t>(1, kGrain / inner), [&](int64_t begin, int64_t end) {
      uint32_t words[kBlock];
      for (int64_t j = begin; j < end; ++j)
        for (int64_t r = 0; r < inner; r += kBlock) {
          const int64_t size = std::min(kBlock, inner - r), i = j * inner + r;
          mask_words(seed, r * features + j, features, size, words);
          mix_by_words(w + i, at_offset(i), out + i, words, threshold, scale, size);
        }
    });
  } else {
    std::vector<uint32_t> words(features);
    mask_words(seed, 0, 1, features, words.data());
    if (inner == 1) {
      at::parallel_for(0, outer, std::max<int64_t>(1, kGrain / features), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * features; i < end * features; i += features)
          mix_by_words(w + i, at_offset(i), out + i, words.data(), threshold, scale, features);
      });
    } else {
      at::parallel_for(0, outer * features, std::max<int64_t>(1, kGrain / inner), [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          mix_run(
              w + j * inner, at_offset(j * inner), out + j * inner, words[j % features] >= threshold, scale, inner);
      });
    }
  }
}

}  // namespace

uint64_t seed_value(const Tensor& seed) { return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()); }

void mix_into(
    const Tensor& out, const Tensor& w, const std::optional<Tensor>& u, uint64_t seed, double p, double scale,
    const MaskLayout& layout) {
  if (out.numel() == 0) return;
  const auto target_type = u ? u->scalar_type() : w.scalar_type();
  dispatch_types(w.scalar_type(), target_type, out.scalar_type(), [&](auto w_type, auto u_type, auto out_type) {
    using W = typename decltype(w_type)::type;
    using U = typename decltype(u_type)::type;
    using O = typename decltype(out_type)::type;
    const U* target = u ? static_cast<const U*>(u->const_data_ptr()) : nullptr;
    mix_typed(
        static_cast<const W*>(w.const_data_ptr()), target, static_cast<O*>(out.mutable_data_ptr()), seed,
        static_cast<uint32_t>(keep_threshold(p)), static_cast<arithmetic_t<W>>(scale), layout);
  });
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
