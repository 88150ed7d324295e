#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pidfd.h"
#include "reaper.h"
#include "sigchld.h"
#include "owned.h"
#include "syscalls.h"

#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

enum { WORD_BITS = 64, WORDS = (1 << 20) / WORD_BITS };

/* A bit for each. The pages of it that are never written to take no memory, and those above `used` are not even read. */
static _Atomic(uint64_t) owned[WORDS];
static _Atomic(int) used; /* words, from the first on */

static int is_noted(int fd)
{
    return fd >= 0 && fd < WORDS * WORD_BITS;
}

void ap_own(int fd)
{
    int word = fd / WORD_BITS, last = atomic_load(&used);

    if (!is_noted(fd))
        return;
    while (last <= word && !atomic_compare_exchange_weak(&used, &last, word + 1))
        ;
    (void)atomic_fetch_or(&owned[word], (uint64_t)1 << fd % WORD_BITS);
}

int ap_owns(int fd)
{
    return is_noted(fd) && (atomic_load_explicit(&owned[fd / WORD_BITS], memory_order_relaxed) >> fd % WORD_BITS & 1);
}

void ap_disown(int fd)
{
    if (is_noted(fd))
        (void)atomic_fetch_and(&owned[fd / WORD_BITS], ~((uint64_t)1 << fd % WORD_BITS));
}

void ap_close_owned(int fd)
{
    ap_disown(fd);
    (void)close(fd);
}

/* In place. They are few, and nearly in order: that in which they were opened. */
static void sort(int *fds, int count)
{
    int i, j;

    for (i = 1; i < count; i++) {
        int fd = fds[i];
        for (j = i; j > 0 && fds[j - 1] > fd; j--)
            fds[j] = fds[j - 1];
        fds[j] = fd;
    }
}

void ap_close_all_owned(int *fds, int count)
{
    int i, first, end;

    sort(fds, count);
    for (i = 0; i < count; i++)
        ap_disown(fds[i]);
    for (first = 0; first < count; first = end) {
        for (end = first + 1; end < count && fds[end] == fds[end - 1] + 1; end++)
            ;
        /* It fails if it is not there, or a filter forbids it, and then has closed none. */
        if (end - first > 1 && syscall(SYS_close_range, fds[first], fds[end - 1], 0) == 0)
            continue;
        for (i = first; i < end; i++)
            (void)close(fds[i]);
    }
}

void ap_let_go(void)
{
    int word, last = atomic_load(&used);

    for (word = 0; word < last; word++) {
        uint64_t bits = atomic_load(&owned[word]);
        if (bits == 0) /* what is not written to is not copied */
            continue;
        atomic_store(&owned[word], 0);
        for (; bits != 0; bits &= bits - 1)
            (void)close(word * WORD_BITS + __builtin_ctzll(bits));
    }
    ap_sigchld_after_fork();
}
