// The launches of kernels.h as a table of functions, which the module _cuda hands to _C: _C has torch's types and is
// built anew for every torch, _cuda has none and outlives it. Both were made of one kernels.h if the names agree.
#pragma once

#include "kernels.h"

namespace mixout::cuda {

// The name of the capsule that holds the table. Its number goes up with every change of the table and of its arguments.
constexpr const char* kLaunchersName = "mixout_kernels.launchers.2";

struct Launchers {
  decltype(&mix_tensors) mix;
  decltype(&gather_kept) gather;
  decltype(&scatter_kept) scatter;
  decltype(&plan_product) plan;
  decltype(&mix_product) product;
  decltype(&multiprocessors) processors;
  decltype(&kept_arrivals) arrivals;
};

}  // namespace mixout::cuda
