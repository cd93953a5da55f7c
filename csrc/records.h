// The NamedTuples of mixout_kernels/draws.py and backends/contract.py as arguments of C++ functions, field by field: a
// NamedTuple is a tuple, so this costs no look-up of a name.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/draw.h"
#include "gpu/draw.h"

namespace mixout {

template <typename T>
T field(pybind11::handle record, Py_ssize_t index) {
  return pybind11::cast<T>(pybind11::handle(PyTuple_GET_ITEM(record.ptr(), index)));
}

inline bool is_record(pybind11::handle value, Py_ssize_t fields) {
  return PyTuple_Check(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) == fields;
}

// A seed on the host is read here, one on a device by the kernels.
inline void read_seed(const at::Tensor& seed, cpu::Draw& draw) {
  draw.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
}
inline void read_seed(const at::Tensor& seed, gpu::Draw& draw) { draw.seed = seed; }

}  // namespace mixout

namespace pybind11::detail {

template <>
struct type_caster<mixout::cpu::Layout> {
  PYBIND11_TYPE_CASTER(mixout::cpu::Layout, const_name("Layout"));
  bool load(handle source, bool) {
    using mixout::field;
    if (!mixout::is_record(source, 5)) return false;
    value = {
        field<int64_t>(source, 0), field<int64_t>(source, 1), field<int64_t>(source, 2),
        {0, field<int64_t>(source, 3), field<int64_t>(source, 4)}};
    return true;
  }
};

template <typename Draw>
struct draw_caster {
  PYBIND11_TYPE_CASTER(Draw, const_name("Draw"));
  bool load(handle source, bool) {
    using mixout::field;
    if (!mixout::is_record(source, 4)) return false;
    mixout::read_seed(field<at::Tensor>(source, 0), value);
    value.p = field<double>(source, 1);
    value.strides.clear();
    for (const handle stride : reinterpret_borrow<sequence>(PyTuple_GET_ITEM(source.ptr(), 2)))
      value.strides.push_back(pybind11::cast<int64_t>(stride));
    value.offset = field<int64_t>(source, 3);
    return true;
  }
};

template <>
struct type_caster<mixout::cpu::Draw> : draw_caster<mixout::cpu::Draw> {};
template <>
struct type_caster<mixout::gpu::Draw> : draw_caster<mixout::gpu::Draw> {};

template <typename Draw>
struct type_caster<mixout::MixedWeight<Draw>> {
  PYBIND11_TYPE_CASTER(mixout::MixedWeight<Draw>, const_name("MixedWeight"));
  bool load(handle source, bool) {
    using mixout::field;
    if (!mixout::is_record(source, 4)) return false;
    value = {
        field<at::Tensor>(source, 0), field<std::optional<at::Tensor>>(source, 1),
        field<std::optional<at::Tensor>>(source, 2), field<Draw>(source, 3)};
    return true;
  }
};

template <typename Draw>
struct type_caster<mixout::WeightGradient<Draw>> {
  PYBIND11_TYPE_CASTER(mixout::WeightGradient<Draw>, const_name("WeightGradient"));
  bool load(handle source, bool) {
    using mixout::field;
    if (!mixout::is_record(source, 3)) return false;
    value = {field<Draw>(source, 0), field<double>(source, 1), field<std::optional<int64_t>>(source, 2)};
    return true;
  }
};

}  // namespace pybind11::detail
