// The CUDA sources, compiled for the host; see csrc/cuda/host_emulation.h.
#include "../../csrc/cuda/columns.cu"
#include "../../csrc/cuda/mix.cu"
#include "../../csrc/cuda/product.cu"
