// Compiled for the host; see csrc/cuda/host_emulation.h.
#include "../../../csrc/cuda/product.cu"
