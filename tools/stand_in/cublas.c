// The GEMMs that torch asks cuBLAS for, each at the cost of one launch. The real library needs longer on the host: it
// chooses a kernel, and may launch two.
#include <stdlib.h>
#include <string.h>

#include "stand_in.h"

#define GEMM(name)         \
    Status name(void) {    \
        counters.gemms++;  \
        pay_for_launch();  \
        return kSuccess;   \
    }
GEMM(cublasGemmEx)
GEMM(cublasSgemm_v2)
GEMM(cublasSgemmEx)
GEMM(cublasDgemm_v2)
GEMM(cublasGemmStridedBatchedEx)
GEMM(cublasSgemmStridedBatched)
GEMM(cublasDgemmStridedBatched)
GEMM(cublasSgemv_v2)
GEMM(cublasDgemv_v2)
GEMM(cublasLtMatmul)

Status cublasCreate_v2(void **handle) {
    *handle = new_handle();
    return kSuccess;
}
Status cublasDestroy_v2(void *handle) {
    free(handle);
    return kSuccess;
}
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
Status cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return kSuccess;
}
Status cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return kSuccess;
}

// cuBLASLt, which linear layers with a bias use.
size_t cublasLtGetVersion(void) { return 130000; }
static Status create(void **handle) {
    *handle = new_handle();
    return kSuccess;
}
static Status destroy(void *handle) {
    free(handle);
    return kSuccess;
}
Status cublasLtMatmulDescCreate(void **descriptor, int compute, int scale) { return create(descriptor); }
Status cublasLtMatmulDescDestroy(void *descriptor) { return destroy(descriptor); }
Status cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    return create(layout);
}
Status cublasLtMatrixLayoutDestroy(void *layout) { return destroy(layout); }
Status cublasLtMatmulPreferenceCreate(void **preference) { return create(preference); }
Status cublasLtMatmulPreferenceDestroy(void *preference) { return destroy(preference); }
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)

typedef struct {  // cublasLtMatmulHeuristicResult_t
    uint64_t algorithm[8];
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
} Heuristic;

Status cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                      void *preference, int asked, Heuristic *results, int *found) {
    memset(results, 0, sizeof *results);
    *found = 1;
    return kSuccess;
}
