// The NamedTuples of mixout_kernels/draws.py and backends/contract.py as arguments of C++ functions, field by field: a
// NamedTuple is a tuple, so this costs no look-up of a name.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/draw.h"
#include "gpu/draw.h"
#include "plan.h"

namespace mixout {

template <typename T>
T field(pybind11::handle record, Py_ssize_t index) {
  return pybind11::cast<T>(pybind11::handle(PyTuple_GET_ITEM(record.ptr(), index)));
}

inline bool is_record(pybind11::handle value, Py_ssize_t fields) {
  return PyTuple_Check(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) == fields;
}

inline c10::SmallVector<int64_t, 4> integers(pybind11::handle source) {
  c10::SmallVector<int64_t, 4> values;
  for (const pybind11::handle value : pybind11::reinterpret_borrow<pybind11::sequence>(source))
    values.push_back(pybind11::cast<int64_t>(value));
  return values;
}

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
    read_seed(field<at::Tensor>(source, 0), value);
    value.p = field<double>(source, 1);
    value.strides = mixout::integers(PyTuple_GET_ITEM(source.ptr(), 2));
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

template <>
struct type_caster<mixout::LinearCall> {
  PYBIND11_TYPE_CASTER(mixout::LinearCall, const_name("LinearCall"));
  bool load(handle source, bool) {
    using mixout::field;
    if (!mixout::is_record(source, 11)) return false;  // the schedule is for Python alone
    const auto shape = mixout::integers(PyTuple_GET_ITEM(source.ptr(), 0));
    if (shape.size() != 2) return false;
    value = {
        shape[0], shape[1], field<at::ScalarType>(source, 1), field<std::optional<at::ScalarType>>(source, 2),
        field<at::ScalarType>(source, 3), field<double>(source, 4),
        mixout::integers(PyTuple_GET_ITEM(source.ptr(), 5)), field<int64_t>(source, 6), field<double>(source, 7),
        field<double>(source, 8), field<std::optional<int64_t>>(source, 9)};
    return true;
  }
};

template <>
struct type_caster<mixout::FusedRule> {
  PYBIND11_TYPE_CASTER(mixout::FusedRule, const_name("FusedRule"));
  bool load(handle source, bool) {
    using mixout::field;
    if (!mixout::is_record(source, 3)) return false;
    value = {field<int64_t>(source, 0), field<int64_t>(source, 1), field<bool>(source, 2)};
    return true;
  }
};

}  // namespace pybind11::detail
