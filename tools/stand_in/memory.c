// Device memory is address space: the system backs a page when something writes to it, so a model of many gigabytes
// needs next to none. Small copies are carried out, since the host reads some results (a loss, a flag); large ones are not.
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "stand_in.h"

enum { kPage = 4096, kCarriedOut = 1 << 20 };

static _Atomic size_t allocated;

// The page before an allocation holds its size.
Status cudaMalloc(void **out, size_t bytes) {
    counters.allocations++;
    size_t whole = (bytes + 2 * kPage - 1) / kPage * kPage;
    if (atomic_fetch_add(&allocated, whole) + whole > device_bytes()) {
        atomic_fetch_sub(&allocated, whole);
        return kOutOfMemory;
    }
    char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        atomic_fetch_sub(&allocated, whole);
        return kOutOfMemory;
    }
    madvise(start, whole, MADV_NOHUGEPAGE);  // a small write would back two megabytes
    *(size_t *)start = whole;
    *out = start + kPage;
    return kSuccess;
}

Status cudaFree(void *pointer) {
    if (!pointer) return kSuccess;
    char *start = (char *)pointer - kPage;
    size_t whole = *(size_t *)start;
    atomic_fetch_sub(&allocated, whole);
    munmap(start, whole);
    return kSuccess;
}

Status cudaMallocAsync(void **out, size_t bytes, void *stream) { return cudaMalloc(out, bytes); }
Status cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }

Status cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = device_bytes();
    *free_bytes = *total - atomic_load(&allocated);
    return kSuccess;
}

Status cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
    return posix_memalign(out, kPage, bytes ? bytes : 1) ? kOutOfMemory : kSuccess;
}
Status cudaFreeHost(void *pointer) {
    free(pointer);
    return kSuccess;
}
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)

Status cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    counters.copies++;
    pay_for_launch();
    if (bytes < kCarriedOut) memmove(to, from, bytes);
    return kSuccess;
}
Status cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
Status cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    counters.memsets++;
    pay_for_launch();
    if (bytes < kCarriedOut) memset(to, value, bytes);
    return kSuccess;
}
Status cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, NULL); }

typedef struct {
    int type, device;
    void *devicePointer, *hostPointer;
} PointerAttributes;  // cudaPointerAttributes

// torch asks about pointers that it takes for the device's, and whether memory of the host is pinned: it never is.
Status cudaPointerGetAttributes(PointerAttributes *out, void *pointer) {
    *out = (PointerAttributes){.type = 2, .devicePointer = pointer};  // cudaMemoryTypeDevice
    return kSuccess;
}

// For __device__ variables of torch's own libraries.
Status cudaGetSymbolAddress(void **out, const void *symbol) {
    static char any[1 << 20];
    *out = any;
    return kSuccess;
}
SUCCEEDS(cudaMemcpyToSymbol)
