// What the parts of the stand-in share. CUDA's headers are not included: what little of them is needed is declared here
// and where it is used, so that the stand-in builds, and is tested, wherever there is a C compiler. The one struct with
// a layout to get wrong, cudaDeviceProp, is compared with CUDA's header where there is one (tests/test_stand_in.py).
#pragma once
#include <stddef.h>
#include <stdint.h>

// cudaError_t, cublasStatus_t and CUresult: in each of them 0 is success, and 2 and 600 are these.
typedef int Status;
enum { kSuccess = 0, kOutOfMemory = 2, kNotReady = 600 };

// In the order of COUNTERS in __init__.py.
typedef struct {
    int64_t kernels, gemms, copies, memsets, graphs, synchronisations, allocations;
} Counters;
extern Counters counters;

// What the driver would do for a launch, a copy or a memset: it takes the time that was asked for, and nothing else.
void pay_for_launch(void);
int64_t nanoseconds(void);
size_t device_bytes(void);

// An opaque object that is only ever compared, handed back and freed.
void *new_handle(void);

// A function of the same name in CUDA that has nothing to do here.
#define SUCCEEDS(name) \
    Status name(void) { return kSuccess; }
