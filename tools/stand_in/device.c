// The device that torch sees: one, with the limits of an H100, and the questions that torch asks about its kernels.
#include "device.h"

#include <stdio.h>
#include <string.h>

#include "stand_in.h"

static __thread int current_device;

Status cudaGetDeviceCount(int *count) {
    *count = 1;
    return kSuccess;
}
Status cudaGetDevice(int *device) {
    *device = current_device;
    return kSuccess;
}
Status cudaSetDevice(int device) {
    current_device = device;
    return kSuccess;
}

Status cudaGetDeviceProperties(DeviceProperties *out, int device) {
    memset(out, 0, kWholeProperties);
    strcpy(out->name, "stand-in for an H100, which computes nothing");
    out->totalGlobalMem = device_bytes();
    out->major = 9, out->minor = 0;
    out->multiProcessorCount = 132, out->warpSize = 32;
    out->maxThreadsPerBlock = 1024, out->maxThreadsPerMultiProcessor = 2048, out->maxBlocksPerMultiProcessor = 32;
    out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
    out->maxGridSize[0] = 2147483647, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->sharedMemPerBlock = 49152, out->sharedMemPerBlockOptin = 232448, out->sharedMemPerMultiprocessor = 233472;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->l2CacheSize = 50 << 20, out->totalConstMem = 65536, out->textureAlignment = 512;
    out->unifiedAddressing = out->cooperativeLaunch = 1;
    return kSuccess;
}

Status cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {  // numbers of the enum cudaDeviceAttr
        case 1: *value = 1024; break;         // MaxThreadsPerBlock
        case 5: *value = 2147483647; break;   // MaxGridDimX
        case 6: case 7: *value = 65535; break;
        case 8: *value = 49152; break;        // MaxSharedMemoryPerBlock
        case 10: *value = 32; break;          // WarpSize
        case 12: *value = 65536; break;       // MaxRegistersPerBlock
        case 16: *value = 132; break;         // MultiProcessorCount
        case 38: *value = 50 << 20; break;    // L2CacheSize
        case 39: *value = 2048; break;        // MaxThreadsPerMultiProcessor
        case 75: *value = 9; break;           // ComputeCapabilityMajor
        case 76: *value = 0; break;           // ComputeCapabilityMinor
        case 81: *value = 233472; break;      // MaxSharedMemoryPerMultiprocessor
        case 97: *value = 232448; break;      // MaxSharedMemoryPerBlockOptin
        default: *value = 1;
    }
    return kSuccess;
}

Status cudaDriverGetVersion(int *version) {
    *version = 13000;
    return kSuccess;
}
Status cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return kSuccess;
}
Status cudaDeviceGetPCIBusId(char *out, int size, int device) {
    snprintf(out, size, "0000:00:00.0");
    return kSuccess;
}
Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return kSuccess;
}
Status cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return kSuccess;
}

typedef struct {  // the beginning of cudaFuncAttributes
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion;
} FunctionAttributes;

Status cudaFuncGetAttributes(FunctionAttributes *out, const void *function) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024, out->numRegs = 32, out->ptxVersion = out->binaryVersion = 90;
    return kSuccess;
}
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaFuncSetCacheConfig)
Status cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
    *blocks = 2;
    return kSuccess;
}
Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                              size_t shared, unsigned flags) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

// None of the driver's functions: torch then does without what it looks for here (expandable segments, NVLink).
Status cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, uint64_t flags, int *found) {
    *function = NULL;
    if (found) *found = 1;  // cudaDriverEntryPointSymbolNotFound
    return kSuccess;
}

// An error is only ever what a call has answered itself.
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
const char *cudaGetErrorName(Status error) {
    return error == kSuccess ? "cudaSuccess" : error == kOutOfMemory ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
const char *cudaGetErrorString(Status error) {
    return error == kSuccess ? "no error" : error == kOutOfMemory ? "out of memory" : "an error of the stand-in";
}

SUCCEEDS(cudaDeviceSetLimit)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
