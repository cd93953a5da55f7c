#include "product.cuh"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "types.h"

namespace mixout::cuda {

namespace {

constexpr int kFewRows = 64, kManyRows = 128;

// Two stages of a tile of many rows of float32 do not fit 99 KB.
int64_t rows_of_tile(int64_t rows, Type x) { return rows <= kFewRows || x == Type::float32 ? kFewRows : kManyRows; }
int64_t outputs_of_tile(Type w) { return w == Type::float32 ? kOutputs<float> : kOutputs<bf16>; }
int64_t chunk_of(int64_t contraction, int64_t splits) {
  return divide_up(divide_up(contraction, splits), kDepth) * kDepth;
}

template <typename W, typename U, typename T, bool kContiguous, int kRows>
void launch_product(const Product& product, const ProductPlan& plan, float* partial, uint32_t* arrivals, void* stream) {
  using Shape = ProductShape<W, U, T, kContiguous, kRows>;
  const auto addresses = reinterpret_cast<uintptr_t>(product.x) | reinterpret_cast<uintptr_t>(product.w) |
      reinterpret_cast<uintptr_t>(product.u);
  const int64_t weight_line = kContiguous ? product.contraction : product.outputs;
  const bool aligned = addresses % 16 == 0 && product.contraction % 8 == 0 && weight_line % 8 == 0;
  // Four stages hide the latency of memory (product.cuh); devices with less shared memory do with two or three.
  const int fit = (shared_memory_limit() - Shape::kFixedBytes) / Shape::kStageBytes;
  const int stages = std::min(4, fit);
  const int64_t chunk = chunk_of(product.contraction, plan.splits);
  const ProductArguments arguments{product, reinterpret_cast<float4*>(partial), arrivals, chunk, stages, aligned};
  const Grid grid{plan.row_tiles, plan.output_tiles, plan.splits};
  launch("mix_product", mix_product_kernel<W, U, T, kContiguous, kRows>, grid, kProductThreads,
         stages * Shape::kStageBytes + Shape::kFixedBytes, stream, arguments);
}

}  // namespace

ProductPlan plan_product(int64_t rows, int64_t outputs, int64_t contraction, Type w, Type x, int multiprocessors) {
  ProductPlan plan{};
  plan.row_tiles = divide_up(rows, rows_of_tile(rows, x));
  plan.output_tiles = divide_up(outputs, outputs_of_tile(w));
  const int64_t tiles = plan.row_tiles * plan.output_tiles;
  // Time in units of contraction: waves of blocks, one per multiprocessor, times a block's share and what it spends on
  // filling the pipeline and on adding up; the latter two about as much as 128 deep, by arithmetic.
  constexpr int64_t kOverhead = 128;
  const int64_t fewest = divide_up(contraction, kMaxChunk), most = std::max(fewest, contraction / 256);
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int64_t splits = fewest; splits <= most; ++splits) {
    const int64_t used = divide_up(contraction, chunk_of(contraction, splits));  // the last chunks may be empty
    const int64_t time = divide_up(tiles * used, multiprocessors) * (chunk_of(contraction, splits) + kOverhead);
    if (time >= best) continue;
    best = time;
    plan.splits = used;
  }
  if (plan.splits > 1) {
    plan.partial_floats = tiles * plan.splits * outputs_of_tile(w) * rows_of_tile(rows, x);
    plan.arrivals = tiles;
  }
  return plan;
}

void mix_product(
    const Product& product, const ProductPlan& plan, Type w, Type u, Type x, float* partial, uint32_t* arrivals,
    void* stream) {
  dispatch_mix(w, u, x, [&](auto w_tag, auto u_tag, auto x_tag) {
    using W = typename decltype(w_tag)::type;
    using U = typename decltype(u_tag)::type;
    using T = typename decltype(x_tag)::type;
    const auto with_rows = [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      if (product.contiguous) launch_product<W, U, T, true, kRows>(product, plan, partial, arrivals, stream);
      else launch_product<W, U, T, false, kRows>(product, plan, partial, arrivals, stream);
    };
    if constexpr (sizeof(T) > sizeof(W)) {
      no_kernel();
    } else if constexpr (sizeof(T) == 4) {
      with_rows(std::integral_constant<int, kFewRows>{});
    } else {
      if (rows_of_tile(product.rows, x) == kFewRows) with_rows(std::integral_constant<int, kFewRows>{});
      else with_rows(std::integral_constant<int, kManyRows>{});
    }
  });
}

int multiprocessors() { return multiprocessor_count(); }

#if defined(MIXOUT_HOST_EMULATION)

uint32_t* kept_arrivals(int64_t, void*) { return nullptr; }

#else

// Not from torch's allocator: while Inductor warms a CUDA graph up, that one hands out memory of the graph, and nothing
// but the graph's own outputs may keep it.
uint32_t* kept_arrivals(int64_t count, void* stream) {
  constexpr const char* kWhat = "counters of a product";
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture), kWhat);
  if (capture != cudaStreamCaptureStatusNone) return nullptr;

  struct Counters {
    uint32_t* memory = nullptr;
    int64_t count = 0;
  };
  static std::mutex mutex;
  static std::map<std::pair<int, void*>, Counters> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  Counters& counters = kept[{current_device(), stream}];
  if (counters.count < count) {
    const int64_t enough = std::max<int64_t>(count, 1024);
    void* memory = nullptr;
    cudaError_t error = cudaMalloc(&memory, enough * sizeof(uint32_t));
    if (error == cudaSuccess)
      error = cudaMemsetAsync(memory, 0, enough * sizeof(uint32_t), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) cudaGetLastError();  // or the next launch that is checked would be blamed for it
    check(error, kWhat);
    counters = {static_cast<uint32_t*>(memory), enough};
  }
  return counters.memory;
}

#endif

}  // namespace mixout::cuda
