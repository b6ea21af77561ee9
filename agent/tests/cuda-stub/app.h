/* A program's memory as the stub of libcuda finds it: always at one address, so that it is there after a restore too. */
#define APP_AT ((void *)0x100000000000)
#define APP_MAGIC "cudaapp"
#define APP_NAME "cuda-app"

enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };

struct app {
    char magic[8];
    volatile int state;     /* CUprocessState */
    volatile int busy;      /* work is on the device */
    char uuid[48];          /* of its device */
    char name[32];          /* of its memory on it: the file `uuid/name` */
    char copy[64];          /* that memory, while it is not on the device */
};
