// From the runtime Type of a tensor to the C++ type of its elements.
#pragma once

#include <stdexcept>

#include "intrinsics.h"
#include "kernels.h"

namespace mixout::cuda {

template <typename T>
struct Tag {
  using type = T;
};

[[noreturn]] inline void no_kernel() {
  throw std::runtime_error("mixout_kernels: no CUDA kernel for this combination of dtypes");
}

template <typename F>
void dispatch(Type type, const F& f) {
  if (type == Type::float32) return f(Tag<float>{});
  if (type == Type::bfloat16) return f(Tag<bf16>{});
  return f(Tag<f16>{});
}

// Calls f(Tag<From>, Tag<To>) for a result of the same type, or of float32.
template <typename F>
void dispatch_widening(Type from, Type to, const F& f) {
  if (from != to && to != Type::float32) no_kernel();
  dispatch(from, [&](auto tag) { return from == to ? f(tag, tag) : f(tag, Tag<float>{}); });
}

// Calls f(Tag<W>, Tag<U>, Tag<O>) for the types of weight, target and result.
template <typename F>
void dispatch_mix(Type w, Type u, Type out, const F& f) {
  if (w == Type::float32 && u == Type::float32)
    return dispatch(out, [&](auto to) { return f(Tag<float>{}, Tag<float>{}, to); });
  if (w == Type::float32 && u == Type::bfloat16)
    return dispatch(out, [&](auto to) { return f(Tag<float>{}, Tag<bf16>{}, to); });
  if (w != u) no_kernel();
  dispatch_widening(w, out, [&](auto from, auto to) { return f(from, from, to); });
}

}  // namespace mixout::cuda
