// The Python module mixout_kernels._cuda: launches over addresses and sizes. It knows no torch type, so it outlives
// torch upgrades; what must match is the major version of the CUDA runtime.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "launchers.h"
#if defined(MIXOUT_HOST_EMULATION)
#include "intrinsics.h"
#else
#include <cuda_runtime_api.h>  // CUDART_VERSION

#include "digest.h"  // setup.py writes it
#endif

namespace py = pybind11;

namespace {

using namespace mixout::cuda;

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#if defined(MIXOUT_HOST_EMULATION)
[[gnu::used]] const char kBuiltFor[] = "mixout_kernels built for host emulation";
#else
#define MIXOUT_TEXT_OF(value) #value
#define MIXOUT_TEXT(value) MIXOUT_TEXT_OF(value)
// Read out of the file by _extension.py, which must know both also when the library cannot be loaded.
[[gnu::used]] const char kBuiltFor[] = "mixout_kernels built for CUDA " MIXOUT_TEXT(CUDART_VERSION);
[[gnu::used]] const char kBuiltFrom[] = "mixout_kernels built from " MIXOUT_DIGEST;
#endif

constexpr Launchers kLaunchers{
    &mix_tensors, &gather_kept, &scatter_kept, &plan_product, &mix_product, &multiprocessors, &kept_arrivals};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "CUDA kernels of mixout_kernels; the Python side is mixout_kernels/backends/cuda.";
  py::enum_<Type>(module, "Type")
      .value("float32", Type::float32)
      .value("bfloat16", Type::bfloat16)
      .value("float16", Type::float16);
  // For _C, which calls them without Python.
  module.attr("launchers") = py::capsule(&kLaunchers, kLaunchersName);
  // Records are made anew for each launch, so those with few fields take them by position: names cost 0.7 us a call.
  py::class_<Mask>(module, "Mask")
      .def(py::init([](Address seed, double p, int64_t offset, int64_t row, int64_t column, uint32_t inner) {
             const auto threshold = static_cast<uint32_t>(mixout::keep_threshold(p));
             return Mask{pointer<const int64_t>(seed), {offset, row, column}, threshold, inner};
           }),
           py::arg("seed"), py::arg("p"), py::arg("offset"), py::arg("row_stride"), py::arg("column_stride"),
           py::arg("inner"));
  py::class_<MixTensor>(module, "MixTensor")
      .def(py::init([](Address w, Address u, Address out, const Mask& mask, int64_t numel, int64_t columns,
                       float factor) {
             return MixTensor{pointer(w), pointer(u), pointer(out), mask, numel, columns, factor};
           }),
           py::arg("w"), py::arg("u"), py::arg("out"), py::arg("mask"), py::arg("numel"), py::arg("columns"),
           py::arg("factor"));
  py::class_<Product>(module, "Product")
      .def(py::init([](Address x, Address w, Address u, Address bias, Address out, const Mask& mask, float scale,
                       int64_t rows, int64_t outputs, int64_t contraction, bool contiguous) {
             return Product{pointer(x), pointer(w), pointer(u), pointer(bias), pointer(out), mask, scale, rows,
                            outputs, contraction, contiguous};
           }),
           py::arg("x"), py::arg("w"), py::arg("u"), py::arg("bias"), py::arg("out"), py::arg("mask"),
           py::arg("scale"), py::arg("rows"), py::arg("outputs"), py::arg("contraction"), py::arg("contiguous"));
  py::class_<ColumnSums>(module, "ColumnSums")
      .def(py::init([](Address g, Address sums, Type type, int64_t rows, int64_t stride) {
             return ColumnSums{pointer(g), pointer(sums), type, rows, stride};
           }),
           py::arg("g"), py::arg("sums"), py::arg("type"), py::arg("rows"), py::arg("stride"));
  py::class_<ProductPlan>(module, "ProductPlan")
      .def_readonly("splits", &ProductPlan::splits)
      .def_readonly("partial_floats", &ProductPlan::partial_floats)
      .def_readonly("arrivals", &ProductPlan::arrivals);

  module.def(
      "mix",
      [](const std::vector<MixTensor>& tensors, Type w, Type u, Type out, Address stream) {
        mix_tensors(tensors.data(), static_cast<int>(tensors.size()), w, u, out, pointer(stream));
      },
      py::arg("tensors"), py::arg("w"), py::arg("u"), py::arg("out"), py::arg("stream"));
  module.def(
      "keep_mask",
      [](const Mask& mask, Address out, int64_t rows, int64_t columns, Address stream) {
        keep_mask(mask, pointer<bool>(out), rows, columns, pointer(stream));
      },
      py::arg("mask"), py::arg("out"), py::arg("rows"), py::arg("columns"), py::arg("stream"));
  module.def(
      "gather_kept",
      [](const Mask& mask, Address x, Address compact, Type type, int64_t rows, int64_t features, int64_t capacity,
         Address stream) {
        gather_kept(mask, pointer(x), pointer(compact), type, rows, features, capacity, pointer(stream));
      },
      py::arg("mask"), py::arg("x"), py::arg("compact"), py::arg("type"), py::arg("rows"), py::arg("features"),
      py::arg("capacity"), py::arg("stream"));
  module.def(
      "scatter_kept",
      [](const Mask& mask, Address compact, Address dw, Type compact_type, Type dw_type, float scale, int64_t rows,
         int64_t features, int64_t capacity, bool transposed, const ColumnSums& sums, Address stream) {
        scatter_kept(mask, pointer(compact), pointer(dw), compact_type, dw_type, scale, rows, features, capacity,
                     transposed, sums, pointer(stream));
      },
      py::arg("mask"), py::arg("compact"), py::arg("dw"), py::arg("compact_type"), py::arg("dw_type"),
      py::arg("scale"), py::arg("rows"), py::arg("features"), py::arg("capacity"), py::arg("transposed"),
      py::arg("sums"), py::arg("stream"));
  module.def(
      "plan_product", &plan_product, py::arg("rows"), py::arg("outputs"), py::arg("contraction"), py::arg("w"),
      py::arg("x"), py::arg("multiprocessors"));
  module.def(
      "mix_product",
      [](const Product& product, const ProductPlan& plan, Type w, Type u, Type x, Address partial, Address arrivals,
         Address stream) {
        mix_product(product, plan, w, u, x, pointer<float>(partial), pointer<uint32_t>(arrivals), pointer(stream));
      },
      py::arg("product"), py::arg("plan"), py::arg("w"), py::arg("u"), py::arg("x"), py::arg("partial"),
      py::arg("arrivals"), py::arg("stream"));

  module.def("multiprocessors", &multiprocessors);
  module.def(
      "kept_arrivals",
      [](int64_t count, Address stream) { return reinterpret_cast<Address>(kept_arrivals(count, pointer(stream))); },
      py::arg("count"), py::arg("stream"), "The address of counters, or 0 where the caller is to bring its own.");

#if defined(MIXOUT_HOST_EMULATION)
  module.def(
      "emulate",
      [](const std::string& order, uint64_t seed, int shared_bytes) {
        using emulation::Order;
        if (order != "ascending" && order != "descending" && order != "random")
          throw std::runtime_error("emulate: order: expected ascending, descending or random, got " + order);
        emulation::options = {
            order == "random" ? Order::random : order == "ascending" ? Order::ascending : Order::descending,
            shared_bytes};
        emulation::machine.random_state = seed;
      },
      py::arg("order") = "random", py::arg("seed") = 1, py::arg("shared_bytes") = 99 * 1024,
      "The order in which blocks and threads run, and the shared memory that a block can ask for.");
#endif
}
