// The Python module mixout_kernels._C.
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <ATen/Parallel.h>

#include "cpu/autograd.h"
#include "cpu/bf16_product.h"
#include "cpu/f16_product.h"
#include "cpu/kernels.h"
#include "cpu/mixout.h"
#include "cpu/precision.h"
#include "cpu/product.h"
#include "gpu/autograd.h"
#include "records.h"

namespace py = pybind11;

namespace {

namespace cpu = mixout::cpu;

// Read out of the file by _extension.py, which must know the version also when the library cannot be loaded.
[[gnu::used]] const char kBuiltFor[] = "mixout_kernels built for torch " TORCH_VERSION;

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
#ifdef MIXOUT_CPU_LEVEL_512
  info["cpu_levels"] = std::vector<std::string>{MIXOUT_CPU_LEVEL_512, MIXOUT_CPU_LEVEL_256, "baseline"};
  __builtin_cpu_init();
  info["cpu_level_used"] = __builtin_cpu_supports(MIXOUT_CPU_LEVEL_512) ? MIXOUT_CPU_LEVEL_512
      : __builtin_cpu_supports(MIXOUT_CPU_LEVEL_256)                      ? MIXOUT_CPU_LEVEL_256
                                                                           : "baseline";
#else
  info["cpu_levels"] = std::vector<std::string>{"baseline"};
  info["cpu_level_used"] = "baseline";
#endif
  info["cuda"] = py::none();
  return info;
}

// `launchers` is what the module _cuda hands out, or its emulation.
std::tuple<at::Tensor, at::Tensor> gpu_recorded_linear(
    const at::Tensor& input, const mixout::gpu::MixedWeight& phi, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& kept_input, const mixout::gpu::WeightGradient& gradient, bool fused,
    const py::capsule& launchers, uintptr_t stream) {
  using mixout::cuda::Launchers;
  const void* table = PyCapsule_GetPointer(launchers.ptr(), mixout::cuda::kLaunchersName);
  if (table == nullptr) throw py::error_already_set();
  const mixout::gpu::Launch launch{
      static_cast<const Launchers*>(table), reinterpret_cast<void*>(stream), fused};
  const py::gil_scoped_release release_gil;
  return mixout::gpu::recorded_linear(launch, input, phi, bias, kept_input, gradient);
}

const char* product_vectors() {
  switch (cpu::product_vectors()) {
    case cpu::Vectors::avx512:
      return "avx512";
    case cpu::Vectors::avx2:
      return "avx2";
    default:
      return "none";
  }
}

const char* bf16_unit() {
  switch (cpu::bf16_unit()) {
    case cpu::Bf16Unit::tiles:
      return "tiles";
    case cpu::Bf16Unit::dot:
      return "dot";
    default:
      return "none";
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace mixout;
  const auto release_gil = py::call_guard<py::gil_scoped_release>();
  module.doc() = "Compiled kernels of mixout_kernels; the Python side is mixout_kernels/backends/cpu.py.";
  module.def("build_info", &build_info, "What this extension was built for.");
  module.def("cpu_product_vectors", &product_vectors);
  module.def("cpu_bf16_unit", &bf16_unit);
  module.def("cpu_float32_may_be_rounded", &cpu::float32_may_be_rounded);
  module.def("cpu_f16_product_available", &cpu::f16_product_available);
  module.def("cpu_library_multiplies_f16", &cpu::library_multiplies_f16);
  module.def("cpu_library_is_faster", &cpu::library_is_faster);
  module.def("cpu_keep_mask", &cpu::keep_mask, release_gil);
  module.def("cpu_mixout", &cpu::mixout, release_gil);
  module.def("cpu_mixout_list", &cpu::mixout_list, release_gil);
  module.def("cpu_mix_linear", &cpu::mix_linear, release_gil);
  module.def("cpu_recorded_linear", &cpu::recorded_linear, release_gil);
  module.def("cpu_mix_linear_backward", &cpu::mix_linear_backward, release_gil);
  module.def("gpu_recorded_linear", &gpu_recorded_linear);
}
