// libcuda.so.1, under whose name the whole stand-in is loaded: what torch's libcaffe2_nvrtc.so asks the loader for. Code
// compiled at run time (nvrtc, Triton) cannot be loaded here, and is told so.
#include "stand_in.h"

enum { kNotSupported = 801 };
#define REFUSES(name) \
    Status name(void) { return kNotSupported; }

SUCCEEDS(cuInit)
Status cuCtxGetCurrent(void **context) {
    static char the_context;
    *context = &the_context;
    return kSuccess;
}
SUCCEEDS(cuCtxSetCurrent)
Status cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return kSuccess;
}
Status cudaDeviceGetAttribute(int *value, int attribute, int device);
Status cuDeviceGetAttribute(int *value, int attribute, int device) {
    return cudaDeviceGetAttribute(value, attribute, device);
}
// torch asks whether a device was used before it sets it up in a thread of autograd.
Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return kSuccess;
}
Status cuDevicePrimaryCtxRetain(void **context, int device) { return cuCtxGetCurrent(context); }
Status cuGetErrorString(Status error, const char **text) {
    *text = error == kNotSupported ? "the stand-in for CUDA loads no code" : "an error of the stand-in";
    return kSuccess;
}

REFUSES(cuModuleLoad)
REFUSES(cuModuleLoadData)
REFUSES(cuModuleLoadDataEx)
REFUSES(cuModuleGetFunction)
REFUSES(cuModuleUnload)
REFUSES(cuFuncGetAttribute)
REFUSES(cuFuncSetAttribute)
REFUSES(cuFuncSetCacheConfig)
REFUSES(cuLaunchKernel)
REFUSES(cuLaunchCooperativeKernel)
REFUSES(cuLinkCreate_v2)
REFUSES(cuLinkAddData_v2)
REFUSES(cuLinkComplete)
REFUSES(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSES(cuPointerGetAttribute)
REFUSES(cuTensorMapEncodeTiled)
