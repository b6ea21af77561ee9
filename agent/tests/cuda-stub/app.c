/* Stands for a program that computes on a GPU: `cuda-app NAME [uvm|nvml]`. It counts in a file that stands for its
 * memory on the device, and says each number. Where that memory is gone, it says so and ends.
 *
 * With `uvm` it has managed memory, with `nvml` a device open and nothing else. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "app.h"

static int plain(const char *path) {
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, 8 << 20)) { perror(path); exit(7); }
    return fd;
}

int main(int argc, char **argv) {
    const char *uuid = getenv("NVIDIA_VISIBLE_DEVICES"), *kind = argc > 2 ? argv[2] : "";
    char path[256], text[64];
    if (argc < 2 || !uuid) return 8;
    if (!strcmp(kind, "nvml")) {
        plain("/dev/nvidiactl");
        for (;;) pause();
    }
    void *at = mmap(APP_AT, sizeof(struct app), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (at != APP_AT) { perror("mmap"); return 8; }
    struct app *app = at;
    snprintf(app->uuid, sizeof app->uuid, "%s", uuid);
    snprintf(app->name, sizeof app->name, "%s", argv[1]);
    if (!strcmp(kind, "uvm"))
        mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, plain("/dev/nvidia-uvm"), 0);
    prctl(PR_SET_NAME, APP_NAME);
    snprintf(path, sizeof path, "/gpu/%s/%s", app->uuid, app->name);
    FILE *memory = fopen(path, "w");
    if (!memory) { perror(path); return 8; }
    fprintf(memory, "0");
    fclose(memory);
    memcpy(app->magic, APP_MAGIC, sizeof app->magic);
    for (;;) {
        app->busy = 1;
        __sync_synchronize();
        /* A call waits here while the process is locked. */
        if (app->state != RUNNING) {
            app->busy = 0;
            usleep(500);
            continue;
        }
        snprintf(path, sizeof path, "/gpu/%s/%s", app->uuid, app->name);
        if (!(memory = fopen(path, "r+")) || !fgets(text, sizeof text, memory)) {
            printf("lost\n");
            return 9;
        }
        int n = atoi(text) + 1;
        rewind(memory);
        fprintf(memory, "%d", n);
        fclose(memory);
        __sync_synchronize();
        app->busy = 0;
        printf("%d\n", n);
        fflush(stdout);
        usleep(3000);
    }
}
