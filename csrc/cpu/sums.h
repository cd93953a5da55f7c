// Where the sums of a product in half precision go: a matrix, or the kept columns of dw.
#pragma once

#include <optional>
#include <vector>

#include "bf16_product.h"
#include "columns.h"
#include "f16_product.h"
#include "weight.h"

namespace mixout::cpu {

// T(sum + bias) into a contiguous matrix [rows, n].
template <typename T>
class DenseSums : public Sums {
 public:
  DenseSums(const Tensor& c, const std::optional<Tensor>& bias)
      : n_(c.size(1)),
        c_(c.mutable_data_ptr<T>()),
        bias_(bias ? bias->contiguous() : Tensor()) {}

  void store(int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const override;

 private:
  int64_t n_;
  T* c_;
  Tensor bias_;
};

// W(scale * sum) into the kept columns of dw [out, in], and zero into the others: of the product [out, kept], or of its
// transpose where dw lies as [in, out]. At least one column is kept, and `columns` must outlive it.
template <typename W>
class KeptSums : public Sums {
 public:
  KeptSums(const Tensor& memory, const WeightLayout& layout, const Columns& columns, int64_t kept, double scale);

  void store(int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums, int64_t ld) const override;

 private:
  // What a kept column covers in dw: itself and those up to the next one; the first those before it, too.
  int64_t start(int64_t c) const { return c == 0 ? 0 : index_[c]; }
  int64_t end(int64_t c, int64_t width) const { return c == kept_ ? width : index_[c]; }

  WeightLayout layout_;
  W* dw_;
  const int64_t* index_;
  int64_t kept_;
  float scale_;
  std::vector<uint16_t> bits_;  // which columns are kept, 16 in each, and more of zero
};

}  // namespace mixout::cpu
