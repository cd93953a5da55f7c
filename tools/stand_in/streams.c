// Streams, events and graphs. Nothing runs behind the host's back, so whatever one waits for is done already; an event
// keeps the host's time, and a captured graph is one launch without content.
#include <stdlib.h>

#include "stand_in.h"

Status cudaStreamCreate(void **stream) {
    *stream = new_handle();
    return kSuccess;
}
Status cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreate(stream); }
Status cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
Status cudaStreamDestroy(void *stream) {
    free(stream);
    return kSuccess;
}
Status cudaStreamGetPriority(void *stream, int *priority) {
    *priority = 0;
    return kSuccess;
}
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
Status cudaStreamSynchronize(void *stream) {
    counters.synchronisations++;
    return kSuccess;
}
Status cudaDeviceSynchronize(void) { return cudaStreamSynchronize(NULL); }

typedef struct {
    int64_t recorded;
} Event;

Status cudaEventCreateWithFlags(Event **event, unsigned flags) {
    *event = new_handle();
    return kSuccess;
}
Status cudaEventCreate(Event **event) { return cudaEventCreateWithFlags(event, 0); }
Status cudaEventDestroy(Event *event) {
    free(event);
    return kSuccess;
}
Status cudaEventRecord(Event *event, void *stream) {
    event->recorded = nanoseconds();
    return kSuccess;
}
Status cudaEventRecordWithFlags(Event *event, void *stream, unsigned flags) { return cudaEventRecord(event, stream); }
SUCCEEDS(cudaEventQuery)
Status cudaEventSynchronize(Event *event) {
    counters.synchronisations++;
    return kSuccess;
}
Status cudaEventElapsedTime(float *milliseconds, Event *start, Event *end) {
    *milliseconds = (end->recorded - start->recorded) / 1e6f;
    return kSuccess;
}

// One capture at a time, as torch has it.
static void *capturing;
static char capturing_default;  // the address that stands for the default stream, which is NULL
static void *captured_graph;
static uint64_t captures;

static int is_capturing(void *stream) { return capturing && capturing == (stream ? stream : &capturing_default); }

Status cudaStreamBeginCapture(void *stream, int mode) {
    capturing = stream ? stream : &capturing_default;
    captured_graph = new_handle();
    captures++;
    return kSuccess;
}
Status cudaStreamIsCapturing(void *stream, int *status) {
    *status = is_capturing(stream);  // cudaStreamCaptureStatusNone, Active
    return kSuccess;
}
Status cudaStreamGetCaptureInfo(void *stream, int *status, uint64_t *id, void **graph, void ***dependencies, void **edges,
                                size_t *count) {
    *status = is_capturing(stream);
    if (id) *id = captures;
    if (graph) *graph = captured_graph;
    if (count) *count = 0;
    return kSuccess;
}
Status cudaStreamEndCapture(void *stream, void **graph) {
    *graph = captured_graph;
    capturing = NULL;
    return kSuccess;
}
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)

Status cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
    *count = 1;  // torch warns of an empty graph
    return kSuccess;
}
Status cudaGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags) {
    *executable = new_handle();
    return kSuccess;
}
Status cudaGraphLaunch(void *executable, void *stream) {
    counters.graphs++;
    pay_for_launch();
    return kSuccess;
}
Status cudaGraphDestroy(void *graph) {
    free(graph);
    return kSuccess;
}
Status cudaGraphExecDestroy(void *executable) {
    free(executable);
    return kSuccess;
}
SUCCEEDS(cudaUserObjectCreate)
SUCCEEDS(cudaUserObjectRelease)
SUCCEEDS(cudaGraphRetainUserObject)
SUCCEEDS(cudaDeviceSetGraphMemAttribute)
SUCCEEDS(cudaDeviceGetGraphMemAttribute)
