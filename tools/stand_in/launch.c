// Launches: counted, by kernel too, paid for, and never carried out.
#include <stdlib.h>
#include <time.h>

#include "stand_in.h"

Counters counters;
static int64_t launch_nanoseconds = 2000;
static size_t memory_bytes = (size_t)80 << 30;

__attribute__((constructor)) static void read_settings(void) {
    const char *launch = getenv("STAND_IN_LAUNCH_NS"), *memory = getenv("STAND_IN_MEMORY_GIB");
    if (launch) launch_nanoseconds = atoll(launch);
    if (memory) memory_bytes = (size_t)atoll(memory) << 30;
}

size_t device_bytes(void) { return memory_bytes; }

int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void pay_for_launch(void) {
    if (launch_nanoseconds <= 0) return;
    int64_t end = nanoseconds() + launch_nanoseconds;
    while (nanoseconds() < end) {
    }
}

void *new_handle(void) { return calloc(1, 64); }

void stand_in_counters(Counters *out) { *out = counters; }

// Kernels by the address of their host function: an open hash table, larger than the number of kernels in torch.
enum { kSlots = 1 << 17 };
static struct {
    const void *function;
    const char *name;
    int64_t launches;
} kernels[kSlots];

static unsigned slot_of(const void *function) {
    unsigned slot = (uint32_t)((uintptr_t)function >> 4) * 2654435761u % kSlots;
    while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) % kSlots;
    kernels[slot].function = function;
    return slot;
}

// The number of places to ask stand_in_kernel for; a place may be empty.
int stand_in_kernels(void) { return kSlots; }

// How often a kernel was launched so far, and its name as nvcc has mangled it, or NULL.
const char *stand_in_kernel(int slot, int64_t *launches) {
    *launches = kernels[slot].launches;
    return kernels[slot].name;
}

typedef struct {
    unsigned x, y, z;
} Dim3;

static Status launch(const void *function) {
    counters.kernels++;
    kernels[slot_of(function)].launches++;
    pay_for_launch();
    return kSuccess;
}

Status cudaLaunchKernel(const void *f, Dim3 grid, Dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(f);
}
Status cudaLaunchKernelExC(const void *configuration, const void *f, void **arguments) { return launch(f); }
Status cudaLaunchCooperativeKernel(const void *f, Dim3 grid, Dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(f);
}
Status __cudaLaunchKernel(const void *f, Dim3 grid, Dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(f);
}

// What nvcc writes around a kernel: its registration when a library is loaded, and the <<<...>>> of a call. A cudaKernel_t
// is the address of the host function here.
void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[1];
    return handle;
}
void __cudaRegisterFunction(void **binary, const void *function, char *device, const char *name, int limit, void *thread,
                            void *block, void *block_dim, void *grid_dim, int *warp_size) {
    kernels[slot_of(function)].name = name;
}
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterVar)
Status __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return kSuccess;
}

static __thread struct {
    Dim3 grid, block;
    size_t shared;
    void *stream;
} call;

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void *stream) {
    call.grid = grid, call.block = block, call.shared = shared, call.stream = stream;
    return 0;
}
Status __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void **stream) {
    *grid = call.grid, *block = call.block, *shared = call.shared, *stream = call.stream;
    return kSuccess;
}
