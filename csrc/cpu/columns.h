// The kept columns of a draw by column: what is gathered from x and w, and scattered into dx and dw.
#pragma once

#include <memory>
#include <vector>

#include "draw.h"
#include "rows.h"
#include "weight.h"

namespace mixout::cpu {

struct Columns {
  std::vector<int64_t> index;  // ascending; one element longer than the matrix is wide
  int64_t kept;
};

// Of a matrix with `width` columns.
Columns columns_of(const Draw& draw, int64_t width);

// x[:, kept], its columns beyond the kept ones zero, those that do not fit left out.
Tensor gather(const Tensor& x, const Columns& columns, int64_t width);

// factor * w[:, kept] as [out, kept] in `dtype`, in the memory layout of w.
Tensor gather_weight(const Operands& operands, const Columns& columns, double factor, at::ScalarType dtype);

// The rows of the same as it lies in memory, read in place; T is float, c10::BFloat16 or c10::Half. `columns` must outlive it.
template <typename T>
std::unique_ptr<Rows<T>> gathered_rows(const Operands& operands, const Columns& columns, double factor);

// dx [rows, width] from its kept columns, the others zero.
Tensor scatter(const Tensor& kept, const Columns& columns, int64_t width);

// dw in the layout and dtype of `weight`: factor * compact[c, :] in kept column c < compact.size(0), the others zero.
Tensor scatter_weight(const Tensor& compact, const Columns& columns, const Tensor& weight, double factor);

}  // namespace mixout::cpu
