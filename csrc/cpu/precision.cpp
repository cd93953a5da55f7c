#include "precision.h"

#include <string>
#include <type_traits>

#include <ATen/Context.h>

namespace mixout::cpu {

namespace {

// Newer versions of torch have a precision for each library and operation, which were named by strings first, and by
// enumerators since.
template <typename Precision, typename Backend, typename Operation>
bool is_bf16(const at::Context& context, Precision (at::Context::*precision)(Backend, Operation) const) {
  if constexpr (std::is_enum_v<Precision>)
    return (context.*precision)(Backend::MKLDNN, Operation::MATMUL) == Precision::BF16;
  else
    return (context.*precision)("mkldnn", "matmul") == "bf16";
}

template <typename Context>
auto allows_bf16(const Context& context, int) -> decltype(is_bf16(context, &Context::float32Precision)) {
  return is_bf16(context, &Context::float32Precision);
}

// Older ones have one for all of them.
template <typename Context>
bool allows_bf16(const Context& context, long) {
  return context.float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
}

}  // namespace

bool float32_may_be_rounded() {
  const at::Context& context = at::globalContext();
  return context.userEnabledMkldnn() && allows_bf16(context, 0);
}

}  // namespace mixout::cpu
