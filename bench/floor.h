/* What the floors, our benchmarks in plain C, have in common. Define _GNU_SOURCE before. */
#ifndef BENCH_FLOOR_H
#define BENCH_FLOOR_H

#include "../cffi_build/syscalls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

static inline long long read_clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Have that much memory, in small pages, as a Python heap that has grown bit by bit has them. */
static inline void touch(size_t megabytes)
{
    size_t size = megabytes << 20;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (size == 0)
        return;
    if (memory == MAP_FAILED)
        die("mmap");
    (void)madvise(memory, size, MADV_NOHUGEPAGE);
    memset(memory, 1, size);
}

#endif
