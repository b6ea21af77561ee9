/* A libcuda.so.1 for tests. A process named `cuda-app` (app.c) stands for one that has CUDA at work; its memory on a
 * device is the file `UUID/NAME` beside this library, which saving takes into the process and away, and restoring
 * puts back. Every call is a line in the file `calls` when it begins, and another, with its code, when it ends.
 *
 * The file `state` beside this library is read at every call: words `cuda.version=N`, and for a call of init, thread,
 * state, lock, checkpoint, restore or unlock `cuda.CALL=CODE` (it fails and does nothing), `cuda.CALL.after=CODE` (it fails
 * when it is done), `cuda.CALL.hang=1` (it begins only when the word is gone), `cuda.failed=1` (processes are beyond repair). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#include "app.h"

typedef int CUresult;
enum { OK = 0, INVALID_VALUE = 1, ILLEGAL_STATE = 401, OS = 304, TIMEOUT = 909 };

static void beside(char *path, size_t size, const char *name) {
    Dl_info info;
    if (!dladdr((void *)beside, &info)) abort();
    snprintf(path, size, "%s", info.dli_fname);
    char *slash = strrchr(path, '/');
    snprintf(slash + 1, size - (size_t)(slash + 1 - path), "%s", name);
}

static long word(const char *name, long otherwise) {
    char path[512], text[4096], found[80];
    beside(path, sizeof path, "state");
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

static void note(const char *line) {
    char path[512];
    beside(path, sizeof path, "calls");
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd < 0 || write(fd, line, strlen(line)) < 0) abort();
    close(fd);
}

/* What the words say of a call: what it fails with before it has done anything. */
static CUresult begin(const char *call, int pid, const char *more) {
    char name[64], line[256];
    snprintf(line, sizeof line, "%s %d%s\n", call, pid, more);
    note(line);
    snprintf(name, sizeof name, "cuda.%s.hang", call);
    while (word(name, 0)) usleep(1000);
    snprintf(name, sizeof name, "cuda.%s", call);
    return (CUresult)word(name, OK);
}

static CUresult end(const char *call, int pid, CUresult code) {
    char name[64], line[128];
    snprintf(name, sizeof name, "cuda.%s.after", call);
    if (code == OK) code = (CUresult)word(name, OK);
    snprintf(line, sizeof line, "%s %d = %d\n", call, pid, code);
    note(line);
    return code;
}

static int copy(int pid, struct app *app, int write) {
    struct iovec here = { app, sizeof *app }, there = { APP_AT, sizeof *app };
    ssize_t done = write ? process_vm_writev(pid, &here, 1, &there, 1, 0)
                         : process_vm_readv(pid, &here, 1, &there, 1, 0);
    return done == (ssize_t)sizeof *app;
}

static int set_state(int pid, int state) {
    char *at = (char *)APP_AT + __builtin_offsetof(struct app, state);
    struct iovec here = { &state, sizeof state }, there = { at, sizeof state };
    return process_vm_writev(pid, &here, 1, &there, 1, 0) == sizeof state;
}

static int find(int pid, struct app *app) {
    char path[64], comm[32] = "";
    snprintf(path, sizeof path, "/proc/%d/comm", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    if (!fgets(comm, sizeof comm, file)) comm[0] = 0;
    fclose(file);
    return !strcmp(comm, APP_NAME "\n") && copy(pid, app, 0) && !memcmp(app->magic, APP_MAGIC, sizeof app->magic);
}

static void memory_of(const struct app *app, char *path, size_t size) {
    char name[96];
    snprintf(name, sizeof name, "%.47s/%.31s", app->uuid, app->name);
    beside(path, size, name);
}

CUresult cuInit(unsigned flags) { (void)flags; return end("init", 0, begin("init", 0, "")); }
CUresult cuDriverGetVersion(int *version) { *version = (int)word("cuda.version", 13000); return OK; }
CUresult cuGetErrorName(CUresult code, const char **text) {
    *text = code == 801 ? "CUDA_ERROR_NOT_SUPPORTED" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_STUB";
    return OK;
}
CUresult cuGetErrorString(CUresult code, const char **text) { (void)code; *text = "as the test has it"; return OK; }

CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid) {
    struct app app;
    while (word("cuda.thread.hang", 0)) usleep(1000);
    CUresult code = (CUresult)word("cuda.thread", OK);
    if (code) return code;
    if (!find(pid, &app)) return INVALID_VALUE;
    *tid = pid;
    return OK;
}

CUresult cuCheckpointProcessGetState(int pid, int *state) {
    struct app app;
    CUresult code = (CUresult)word("cuda.state", OK);
    if (code) return code;
    if (!find(pid, &app)) return INVALID_VALUE;
    *state = word("cuda.failed", 0) ? FAILED : app.state;
    return OK;
}

struct lock { unsigned timeout_ms, reserved0; unsigned long long reserved1[7]; };
CUresult cuCheckpointProcessLock(int pid, struct lock *args) {
    struct app app;
    CUresult code = begin("lock", pid, "");
    for (int i = 0; i < 7; i++) if (args->reserved1[i] || args->reserved0) abort();
    if (code) return end("lock", pid, code);
    if (!find(pid, &app) || app.state != RUNNING) return end("lock", pid, ILLEGAL_STATE);
    set_state(pid, LOCKED);
    /* Waits for what is on the device. */
    for (unsigned ms = 0; find(pid, &app) && app.busy; ms++) {
        if (ms > args->timeout_ms) { set_state(pid, RUNNING); return end("lock", pid, TIMEOUT); }
        usleep(1000);
    }
    return end("lock", pid, OK);
}

CUresult cuCheckpointProcessCheckpoint(int pid, void *args) {
    struct app app;
    char path[512];
    (void)args;
    CUresult code = begin("checkpoint", pid, "");
    if (code) return end("checkpoint", pid, code);
    if (!find(pid, &app) || app.state != LOCKED) return end("checkpoint", pid, ILLEGAL_STATE);
    memory_of(&app, path, sizeof path);
    FILE *memory = fopen(path, "r");
    memset(app.copy, 0, sizeof app.copy);
    if (!memory || !fread(app.copy, 1, sizeof app.copy - 1, memory)) return end("checkpoint", pid, OS);
    fclose(memory);
    unlink(path);
    app.state = CHECKPOINTED;
    copy(pid, &app, 1);
    return end("checkpoint", pid, OK);
}

struct pair { unsigned char old[16], new[16]; };
struct restore { struct pair *pairs; unsigned count, padding; unsigned long long reserved[6]; };
static void text_of(const unsigned char *uuid, char *text) {
    int at = sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++)
        at += sprintf(text + at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid[i]);
}
CUresult cuCheckpointProcessRestore(int pid, struct restore *args) {
    struct app app;
    char path[512], old[64], new[64], more[160] = "";
    for (unsigned i = 0; i < args->count; i++) {
        text_of(args->pairs[i].old, old);
        text_of(args->pairs[i].new, new);
        snprintf(more, sizeof more, " %s %s", old, new);
    }
    CUresult code = begin("restore", pid, more);
    if (code) return end("restore", pid, code);
    if (!find(pid, &app) || app.state != CHECKPOINTED) return end("restore", pid, ILLEGAL_STATE);
    if (args->count) {
        if (args->count != 1 || strcmp(old, app.uuid)) return end("restore", pid, INVALID_VALUE);
        snprintf(app.uuid, sizeof app.uuid, "%.47s", new);
    }
    memory_of(&app, path, sizeof path);
    FILE *memory = fopen(path, "w");
    if (!memory) return end("restore", pid, OS);
    fputs(app.copy, memory);
    fclose(memory);
    memset(app.copy, 0, sizeof app.copy);
    app.state = LOCKED;
    copy(pid, &app, 1);
    return end("restore", pid, OK);
}

CUresult cuCheckpointProcessUnlock(int pid, void *args) {
    struct app app;
    (void)args;
    CUresult code = begin("unlock", pid, "");
    if (code) return end("unlock", pid, code);
    if (!find(pid, &app) || app.state != LOCKED) return end("unlock", pid, ILLEGAL_STATE);
    set_state(pid, RUNNING);
    return end("unlock", pid, OK);
}
