#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "tracked_fds.h"
#include "syscalls.h"

#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

enum { WORD_BITS = 64, WORDS = (1 << 20) / WORD_BITS };

/* One bit for each number. Pages that are never written take no memory, and words above `used` are never read. */
static _Atomic(uint64_t) tracked[WORDS];
static _Atomic(int) used; /* words, from the first on */

static int has_place(int fd)
{
    return fd >= 0 && fd < WORDS * WORD_BITS;
}

void ap_track_fd(int fd)
{
    int word = fd / WORD_BITS, last = atomic_load(&used);

    if (!has_place(fd))
        return;
    while (last <= word && !atomic_compare_exchange_weak(&used, &last, word + 1))
        ;
    (void)atomic_fetch_or(&tracked[word], (uint64_t)1 << fd % WORD_BITS);
}

int ap_is_tracked_fd(int fd)
{
    return has_place(fd) && (atomic_load_explicit(&tracked[fd / WORD_BITS], memory_order_relaxed) >> fd % WORD_BITS & 1);
}

void ap_untrack_fd(int fd)
{
    if (has_place(fd))
        (void)atomic_fetch_and(&tracked[fd / WORD_BITS], ~((uint64_t)1 << fd % WORD_BITS));
}

void ap_close_tracked_fd(int fd)
{
    ap_untrack_fd(fd);
    (void)close(fd);
}

/* By insertion: there are few, and they are nearly in order, since that is how they were opened. */
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

void ap_close_tracked_fds(int *fds, int count)
{
    int i, first, end;

    sort(fds, count);
    for (i = 0; i < count; i++)
        ap_untrack_fd(fds[i]);
    for (first = 0; first < count; first = end) {
        for (end = first + 1; end < count && fds[end] == fds[end - 1] + 1; end++)
            ;
        /* On an older kernel, or under a filter, it fails and closes none. */
        if (end - first > 1 && syscall(SYS_close_range, fds[first], fds[end - 1], 0) == 0)
            continue;
        for (i = first; i < end; i++)
            (void)close(fds[i]);
    }
}

void ap_close_inherited(void)
{
    int word, last = atomic_load(&used);

    for (word = 0; word < last; word++) {
        uint64_t bits = atomic_load(&tracked[word]);
        if (bits == 0) /* a page that is not written is not copied */
            continue;
        atomic_store(&tracked[word], 0);
        for (; bits != 0; bits &= bits - 1)
            (void)close(word * WORD_BITS + __builtin_ctzll(bits));
    }
}
