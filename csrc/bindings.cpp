// The Python module mixout_kernels._C.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
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
#include "digest.h"  // setup.py writes it
#include "gpu/autograd.h"
#include "records.h"
#include "snapshot.h"

namespace py = pybind11;

namespace {

namespace cpu = mixout::cpu;
using CpuPlan = mixout::LinearPlan<cpu::Source>;
using GpuPlan = mixout::LinearPlan<mixout::gpu::Source>;

// Read out of the file by _extension.py, which must know both also when the library cannot be loaded.
[[gnu::used]] const char kBuiltFor[] = "mixout_kernels built for torch " TORCH_VERSION;
[[gnu::used]] const char kBuiltFrom[] = "mixout_kernels built from " MIXOUT_DIGEST;

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

// Whether it is None, or a tensor of no class that could have operators of its own.
bool unpack(py::handle source, at::Tensor& tensor) {
  if (source.is_none()) return true;
  if (!THPVariable_CheckExact(source.ptr())) return false;
  tensor = THPVariable_Unpack(source.ptr());
  return true;
}

// None where this is no call of the plan.
template <typename Plan>
std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> run(
    const Plan& plan, py::handle input, py::handle weight, py::handle target, py::handle bias, py::handle operand,
    py::handle cast, py::handle kept_input, py::handle seed) {
  at::Tensor x, w, u, b, phi, made, kept, s;
  if (!unpack(input, x) || !unpack(weight, w) || !unpack(target, u) || !unpack(bias, b) || !unpack(operand, phi) ||
      !unpack(cast, made) || !unpack(kept_input, kept) || !unpack(seed, s) || !plan.fits(x, w, u, b, phi, s))
    return std::nullopt;
  const auto where = plan.where(w.device());
  const py::gil_scoped_release release_gil;
  return plan(where, x, w, u, b, phi, made, kept, s);
}

template <typename Plan>
py::class_<Plan> bind_plan(const py::module_& module, const char* name) {
  return py::class_<Plan>(module, name)
      .def_property_readonly("compute", &Plan::compute)
      .def("__call__", &run<Plan>);
}

// `launchers` is what the module _cuda hands out, or its emulation; `stream` finds the current one by a device's index.
std::unique_ptr<GpuPlan> gpu_plan(
    const mixout::LinearCall& call, const mixout::FusedRule& fuses, const py::capsule& launchers,
    const py::function& stream, bool emulated) {
  using mixout::cuda::Launchers;
  const void* table = PyCapsule_GetPointer(launchers.ptr(), mixout::cuda::kLaunchersName);
  if (table == nullptr) throw py::error_already_set();
  const mixout::gpu::Source source{
      static_cast<const Launchers*>(table), [stream](c10::DeviceIndex index) {
        return reinterpret_cast<void*>(py::cast<uintptr_t>(stream(static_cast<int>(index))));
      }};
  return std::make_unique<GpuPlan>(call, fuses, source, emulated ? at::kCPU : at::kCUDA);
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
  module.doc() = "Compiled kernels of mixout_kernels, and what its eager calls need at every call.";
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
  py::class_<Snapshot>(module, "Snapshot")
      .def(py::init<const Snapshot::Maybe&, const Snapshot::Maybe&>())
      .def("note_values", &Snapshot::note_values)
      .def("is_place_of", &Snapshot::is_place_of)
      .def("has_values_of", &Snapshot::has_values_of);
  module.def("cpu_mix_linear_backward", &cpu::mix_linear_backward, release_gil);
  bind_plan<CpuPlan>(module, "CpuPlan").def(
      py::init([](const LinearCall& call, const FusedRule& fuses, const FusedRule& where_rounded, bool may_round) {
        return std::make_unique<CpuPlan>(call, fuses, cpu::Source{where_rounded, may_round}, at::kCPU);
      }));
  bind_plan<GpuPlan>(module, "GpuPlan").def(py::init(&gpu_plan));
}
