/* A libnvidia-ml.so for tests: two devices, and a third that may be made to fail, as the file `state` beside this
 * library says. It is read at every call, so that a test changes the machine between two looks.
 *
 * The file is words: `count=N`, `driver=CODE` (every call of the driver as a whole fails), and for a device N
 * `N.fail=CODE` (an nvmlReturn_t), `N.xid=NUMBER`, `N.ecc=COUNT`, `N.remap=1`, `N.retire=1`, `N.mig=1`, `N.used=BYTES`,
 * `N.hold=BYTES` (held by process 4242, or `N.pid=PID`), `N.draw=BYTES` (by its windows), `N.mps=BYTES` (by way of MPS), `N.hang=1`
 * (its calls return only when the word is gone). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10 };

struct device { int index; unsigned long long xid_told; };
static struct device devices[8];
struct set { struct device *device; };

static long word(const char *name, long otherwise) {
    Dl_info info;
    char path[4096], text[4096], found[64];
    if (!dladdr((void *)word, &info)) return otherwise;
    snprintf(path, sizeof path, "%s", info.dli_fname);
    char *slash = strrchr(path, '/');
    if (!slash) return otherwise;
    strcpy(slash + 1, "state");
    FILE *file = fopen(path, "r");
    if (!file) return otherwise;
    size_t read = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[read] = 0;
    snprintf(found, sizeof found, "%s=", name);
    for (char *part = strtok(text, " \n"); part; part = strtok(NULL, " \n"))
        if (!strncmp(part, found, strlen(found))) return strtol(part + strlen(found), NULL, 10);
    return otherwise;
}

static long of(struct device *device, const char *name, long otherwise) {
    char full[64];
    snprintf(full, sizeof full, "%d.%s", device->index, name);
    return word(full, otherwise);
}

static nvmlReturn_t well(struct device *device) {
    while (of(device, "hang", 0)) usleep(2000);
    return (nvmlReturn_t)of(device, "fail", OK);
}
#define WELL(device) do { nvmlReturn_t code = well(device); if (code) return code; } while (0)

nvmlReturn_t nvmlInit_v2(void) { return (nvmlReturn_t)word("driver", OK); }
nvmlReturn_t nvmlShutdown(void) { return OK; }
nvmlReturn_t nvmlSystemGetDriverVersion(char *text, unsigned length) {
    snprintf(text, length, "550.54.15");
    return OK;
}
nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return OK; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    *count = (unsigned)word("count", 2);
    return (nvmlReturn_t)word("driver", OK);
}
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **device) {
    if (index >= 8) return INVALID;
    devices[index].index = (int)index;
    *device = &devices[index];
    WELL(*device);
    return OK;
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, struct device **device) {
    int index;
    if (sscanf(uuid, "GPU-%8d-", &index) != 1 || index < 0 || index >= word("count", 2)) return NOT_FOUND;
    return nvmlDeviceGetHandleByIndex_v2((unsigned)index, device);
}
nvmlReturn_t nvmlDeviceGetUUID(struct device *device, char *text, unsigned length) {
    WELL(device);
    snprintf(text, length, "GPU-%08d-0000-0000-0000-000000000000", device->index);
    return OK;
}
nvmlReturn_t nvmlDeviceGetName(struct device *device, char *text, unsigned length) {
    WELL(device);
    snprintf(text, length, "NVIDIA Stub %d", device->index);
    return OK;
}
struct memory { unsigned version; unsigned long long total, reserved, available, used; };
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(struct device *device, struct memory *memory) {
    WELL(device);
    memory->total = 16ull << 30;
    memory->reserved = 0;
    memory->used = (unsigned long long)of(device, "used", 0);
    memory->available = memory->total - memory->used;
    return OK;
}
struct process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };
static nvmlReturn_t processes(struct device *device, const char *name, unsigned *count, struct process *list) {
    WELL(device);
    unsigned long long bytes = (unsigned long long)of(device, name, 0);
    if (!bytes) { *count = 0; return OK; }
    if (*count < 1 || !list) { *count = 1; return 7; }
    *count = 1;
    *list = (struct process){ (unsigned)of(device, "pid", 4242), bytes, 0, 0 };
    return OK;
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(struct device *device, unsigned *count, struct process *list) {
    return processes(device, "hold", count, list);
}
nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(struct device *device, unsigned *count, struct process *list) {
    return processes(device, "draw", count, list);
}
nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(struct device *device, unsigned *count, struct process *list) {
    return processes(device, "mps", count, list);
}
struct utilization { unsigned gpu, memory; };
nvmlReturn_t nvmlDeviceGetUtilizationRates(struct device *device, struct utilization *rates) {
    WELL(device);
    rates->gpu = 40 + (unsigned)device->index;
    rates->memory = 1;
    return OK;
}
nvmlReturn_t nvmlDeviceGetTemperature(struct device *device, int sensor, unsigned *celsius) {
    (void)sensor;
    WELL(device);
    *celsius = 50;
    return OK;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(struct device *device, unsigned *milliwatts) {
    if (device->index == 1) return NOT_SUPPORTED;
    WELL(device);
    *milliwatts = 123456;
    return OK;
}
nvmlReturn_t nvmlDeviceGetMinorNumber(struct device *device, unsigned *minor) {
    WELL(device);
    *minor = (unsigned)device->index;
    return OK;
}
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
nvmlReturn_t nvmlDeviceGetPciInfo_v3(struct device *device, struct pci *pci) {
    WELL(device);
    memset(pci, 0, sizeof *pci);
    pci->bus = 0x3b + (unsigned)device->index;
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
    return OK;
}
nvmlReturn_t nvmlDeviceGetMigMode(struct device *device, unsigned *current, unsigned *pending) {
    if (device->index == 1) return NOT_SUPPORTED;
    WELL(device);
    *current = *pending = (unsigned)of(device, "mig", 0);
    return OK;
}
nvmlReturn_t nvmlDeviceGetTotalEccErrors(struct device *device, int kind, int counter, unsigned long long *count) {
    if (device->index == 1) return NOT_SUPPORTED;
    WELL(device);
    *count = kind == 1 && counter == 0 ? (unsigned long long)of(device, "ecc", 0) : 7;
    return OK;
}
nvmlReturn_t nvmlDeviceGetRetiredPagesPendingStatus(struct device *device, int *pending) {
    WELL(device);
    *pending = (int)of(device, "retire", 0);
    return OK;
}
struct field { unsigned id, scope; long long at, latency; int type; nvmlReturn_t result; unsigned long long value; };
nvmlReturn_t nvmlDeviceGetFieldValues(struct device *device, int count, struct field *fields) {
    WELL(device);
    for (int i = 0; i < count; i++) {
        fields[i].type = 1; /* unsigned int */
        fields[i].result = OK;
        fields[i].value = fields[i].id == 144 ? (unsigned long long)of(device, "remap", 0) : 0;
    }
    return OK;
}
nvmlReturn_t nvmlDeviceGetSupportedEventTypes(struct device *device, unsigned long long *types) {
    WELL(device);
    *types = 8;
    return OK;
}
nvmlReturn_t nvmlEventSetCreate(struct set **set) { *set = calloc(1, sizeof **set); return OK; }
nvmlReturn_t nvmlEventSetFree(struct set *set) { free(set); return OK; }
nvmlReturn_t nvmlDeviceRegisterEvents(struct device *device, unsigned long long types, struct set *set) {
    (void)types;
    WELL(device);
    set->device = device;
    device->xid_told = (unsigned long long)of(device, "xid", 0); /* only what happens from now on */
    return OK;
}
struct event { struct device *device; unsigned long long type, data; unsigned instance, compute; };
nvmlReturn_t nvmlEventSetWait_v2(struct set *set, struct event *event, unsigned timeout) {
    if (timeout) abort(); /* the agent must not wait */
    unsigned long long xid = (unsigned long long)of(set->device, "xid", 0);
    if (xid == set->device->xid_told) return TIMEOUT;
    set->device->xid_told = xid;
    if (!xid) return TIMEOUT;
    *event = (struct event){ .device = set->device, .type = 8, .data = xid };
    return OK;
}
