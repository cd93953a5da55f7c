// The mix over memory that lies as a Layout: threads and data types.
#pragma once

#include <memory>
#include <optional>

#include "draw.h"
#include "rows.h"

namespace mixout::cpu {

// Elements that a thread must have before another one is worth waking (about 10 us of work).
constexpr int64_t kGrain = 16384;

// Mixes contiguous memory: out = where(keep, u + (w - u) * factor, u), out preallocated. `out` may be `w`.
void mix_into(
    const Tensor& out, const Tensor& w, const std::optional<Tensor>& u, const Draw& draw, const Layout& layout,
    double factor);

// The rows of Phi(w, u), mixed as they are read; w and u are contiguous memory, T is float, c10::BFloat16 or c10::Half.
template <typename T>
std::unique_ptr<Rows<T>> mixed_rows(
    const Tensor& w, const std::optional<Tensor>& u, const Draw& draw, const Layout& layout);

}  // namespace mixout::cpu
