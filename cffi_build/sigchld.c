#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pidfd.h"
#include "reaper.h"
#include "sigchld.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* Whom to call after us. Links are never changed nor freed, since a handler may be reading them in any thread; the same
 * (action, next) is found again, and no action is in a chain twice, so that somebody who replaces us over and over does not
 * make it grow. */
struct link {
    struct sigaction action;
    const struct link *next; /* who was there before: for an action that calls us in turn */
    struct link *made_before;
};

enum { MAX_ABANDONED = 1024, HINTS = 256 };

static _Atomic(int) wake_fd = -1;
static _Atomic(const struct link *) first;
static _Atomic(int) abandoned[MAX_ABANDONED];
static _Atomic(int) hints[HINTS]; /* the children that signals have named, the last at (hint_count - 1) % HINTS */
static _Atomic(unsigned int) hint_count;
static struct link *all_links;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* never taken by the handler */

/* The link that our handler is calling in this thread. If it calls us, it is the next one's turn: no endless recursion.
 * glibc would allocate the memory of other TLS models at first use, which a handler must not do; musl never does. */
#ifdef __GLIBC__
static __thread const struct link *calling __attribute__((tls_model("initial-exec")));
#else
static __thread const struct link *calling;
#endif

static void reap_abandoned_pids(void)
{
    int i;

    for (i = 0; i < MAX_ABANDONED; i++) {
        int pid = atomic_load(&abandoned[i]);
        ap_exit unused;
        /* Reaped, or (-ECHILD) no longer there to be reaped. */
        if (pid != 0 && ap_waitid(P_PID, pid, WEXITED | WNOHANG, &unused) != 0)
            (void)atomic_compare_exchange_strong(&abandoned[i], &pid, 0);
    }
}

void ap_sigchld_wake(void)
{
    int fd = atomic_load(&wake_fd);
    uint64_t one = 1;

    if (fd >= 0)
        (void)!write(fd, &one, sizeof one);
}

/* Whether there is a function to call; SA_SIGINFO, which some set with SIG_DFL, says nothing about that. */
static int has_handler(const struct sigaction *action)
{
    return action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN;
}

static void on_sigchld(int number, siginfo_t *info, void *context);

static int is_ours(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO && action->sa_sigaction == on_sigchld;
}

/* Only the kernel can be trusted to call us with a siginfo_t; whoever chains to us may think that we take one argument. */
static int is_called_by_kernel(void)
{
    struct sigaction now;
    return calling == NULL && sigaction(SIGCHLD, NULL, &now) == 0 && is_ours(&now);
}

static void on_sigchld(int number, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    const struct link *outer = calling, *link = outer != NULL ? outer->next : atomic_load(&first);

    if (is_called_by_kernel())
        atomic_store(&hints[atomic_fetch_add(&hint_count, 1) % HINTS], info->si_pid);
    ap_sigchld_wake();
    reap_abandoned_pids();
    if (link != NULL && has_handler(&link->action)) {
        calling = link;
        if (link->action.sa_flags & SA_SIGINFO)
            link->action.sa_sigaction(number, info, context);
        else
            link->action.sa_handler(number);
        calling = outer;
    }
    errno = saved_errno;
}

static int is_same(const struct sigaction *a, const struct sigaction *b)
{
    return a->sa_sigaction == b->sa_sigaction && a->sa_flags == b->sa_flags &&
           memcmp(&a->sa_mask, &b->sa_mask, sizeof(uint64_t)) == 0; /* the kernel's signals; libc's set has room for more */
}

/* Returns the link for `action` before `next`; NULL: no memory. */
static const struct link *find_link(const struct sigaction *action, const struct link *next)
{
    struct link *made;

    for (made = all_links; made != NULL; made = made->made_before)
        if (made->next == next && is_same(&made->action, action))
            return made;
    made = malloc(sizeof *made);
    if (made != NULL) {
        *made = (struct link){.action = *action, .next = next, .made_before = all_links};
        all_links = made;
    }
    return made;
}

/* Returns the chain without `action`. */
static const struct link *drop(const struct link *chain, const struct sigaction *action)
{
    const struct link *rest;

    if (chain == NULL || is_same(&chain->action, action))
        return chain != NULL ? chain->next : NULL;
    rest = drop(chain->next, action);
    return rest == chain->next ? chain : find_link(&chain->action, rest);
}

int ap_sigchld_open(void)
{
    int fd;

    (void)pthread_mutex_lock(&lock);
    fd = atomic_load(&wake_fd);
    if (fd < 0) {
        fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (fd < 0)
            fd = -errno;
        else
            atomic_store(&wake_fd, fd);
    }
    (void)pthread_mutex_unlock(&lock);
    return fd;
}

int ap_sigchld_install(void)
{
    struct sigaction ours = {.sa_sigaction = on_sigchld}, now;
    const struct link *link;
    int flags = SA_RESTART | SA_NOCLDSTOP, result = 0;

    (void)sigemptyset(&ours.sa_mask);
    (void)pthread_mutex_lock(&lock);
    (void)sigaction(SIGCHLD, NULL, &now);
    if (!is_ours(&now)) {
        if (has_handler(&now)) {
            /* It must find what it asked for. libuv's deadlocks if a signal interrupts it; Python's needs its system calls
             * interrupted, or runs only when they have ended; a shell's wants to hear of children that stop. */
            ours.sa_mask = now.sa_mask;
            flags = now.sa_flags & flags;
            link = find_link(&now, drop(atomic_load(&first), &now));
        } else
            link = find_link(&now, NULL); /* it calls nobody */
        if (link == NULL)
            result = -ENOMEM;
        else {
            atomic_store(&first, link); /* before it can be needed */
            ours.sa_flags = flags | SA_SIGINFO | SA_ONSTACK; /* a host program may run threads on small stacks */
            (void)sigaction(SIGCHLD, &ours, NULL);
            result = 1;
        }
    }
    (void)pthread_mutex_unlock(&lock);
    return result;
}

int ap_sigchld_restore(void)
{
    struct sigaction now;
    const struct link *link;
    int result = 0;

    (void)pthread_mutex_lock(&lock);
    (void)sigaction(SIGCHLD, NULL, &now);
    link = atomic_load(&first);
    if (is_ours(&now) && link != NULL) {
        (void)sigaction(SIGCHLD, &link->action, NULL);
        /* `first` stays: another thread may be in our handler, and somebody may have kept us to call us. */
        result = 1;
    }
    (void)pthread_mutex_unlock(&lock);
    return result;
}

int ap_sigchld_abandon(int pid)
{
    int i;

    for (i = 0; i < MAX_ABANDONED; i++) {
        int expected = 0;
        if (atomic_compare_exchange_strong(&abandoned[i], &expected, pid))
            return 0;
    }
    return -ENOSPC;
}

int ap_sigchld_reap_abandoned(void)
{
    int i, left = 0;

    reap_abandoned_pids();
    for (i = 0; i < MAX_ABANDONED; i++)
        left += atomic_load(&abandoned[i]) != 0;
    return left;
}

void ap_sigchld_after_fork(void)
{
    int i, fd = atomic_exchange(&wake_fd, -1);

    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER; /* another thread of the parent may have held it */
    if (fd >= 0)
        (void)close(fd);
    if (atomic_load(&first) == NULL) /* never installed: all that follows would only copy pages */
        return;
    for (i = 0; i < MAX_ABANDONED; i++)
        if (atomic_load_explicit(&abandoned[i], memory_order_relaxed) != 0)
            atomic_store(&abandoned[i], 0);
    (void)ap_sigchld_restore();
}

int ap_sigchld_describe(char *ret_text, int size)
{
    struct sigaction now;
    const struct link *link = atomic_load(&first);
    const char *before = "", *flag;
    Dl_info where;
    size_t room = (size_t)size;

    (void)sigaction(SIGCHLD, NULL, &now);
    flag = now.sa_flags & SA_NOCLDWAIT ? " with SA_NOCLDWAIT" : "";
    if (is_ours(&now)) {
        if (link == NULL || link->action.sa_handler == SIG_DFL || link->action.sa_handler == SIG_IGN) {
            (void)snprintf(ret_text, room, "ours%s", flag);
            return 0;
        }
        before = "ours, and behind it "; /* its flags have no effect there */
        now = link->action;
    }
    if (now.sa_handler == SIG_DFL)
        (void)snprintf(ret_text, room, "SIG_DFL%s", flag);
    else if (now.sa_handler == SIG_IGN)
        (void)snprintf(ret_text, room, "SIG_IGN%s", flag);
    else if (dladdr((void *)(uintptr_t)now.sa_sigaction, &where) != 0 && where.dli_fname != NULL)
        (void)snprintf(ret_text, room, "%sa handler in %s%s", before, where.dli_fname, flag);
    else
        (void)snprintf(ret_text, room, "%sa handler at %p%s", before, (void *)(uintptr_t)now.sa_sigaction, flag);
    return 0;
}

/* Returns the place of `pid`, or where it would have to be. */
static int place_of(const ap_pids *pids, int pid)
{
    int low = 0, high = pids->count;

    while (low < high) {
        int middle = low + (high - low) / 2;
        if (pids->keys[middle] >> 1 < pid)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int is_at(const ap_pids *pids, int place, int pid)
{
    return place < pids->count && pids->keys[place] >> 1 == pid;
}

static void remove_at(ap_pids *pids, int place)
{
    pids->count--;
    memmove(pids->keys + place, pids->keys + place + 1, (size_t)(pids->count - place) * sizeof *pids->keys);
}

int ap_pids_add(ap_pids *pids, int pid, int peek)
{
    int place = place_of(pids, pid);

    if (!is_at(pids, place, pid)) {
        if (pids->count == pids->capacity) {
            int capacity = pids->capacity > 0 ? 2 * pids->capacity : 64;
            int *keys = realloc(pids->keys, (size_t)capacity * sizeof *keys);
            if (keys == NULL)
                return -ENOMEM;
            pids->keys = keys;
            pids->capacity = capacity;
        }
        memmove(pids->keys + place + 1, pids->keys + place, (size_t)(pids->count - place) * sizeof *pids->keys);
        pids->count++;
    }
    pids->keys[place] = pid << 1 | (peek != 0);
    return 0;
}

int ap_pids_remove(ap_pids *pids, int pid)
{
    int place = place_of(pids, pid);

    if (!is_at(pids, place, pid))
        return 0;
    remove_at(pids, place);
    return 1;
}

void ap_pids_clear(ap_pids *pids)
{
    free(pids->keys);
    *pids = (ap_pids){0};
}

/* Asks for the child at `place`; returns whether it has ended, and then is in the batch and no longer in `pids`. */
static int reap_at(ap_pids *pids, int place, ap_batch *batch)
{
    int pid = pids->keys[place] >> 1, peek = pids->keys[place] & 1;
    ap_exit *ended = &batch->exits[batch->count];
    int found = ap_waitid(P_PID, pid, WEXITED | WNOHANG | (peek ? WNOWAIT : 0), ended);

    if (found == 0)
        return 0;
    if (found < 0) { /* -ECHILD: somebody else has reaped it */
        ended->status = 0;
        ended->source = AP_SOURCE_LOST;
    }
    ended->pid = pid;
    ended->pidfd = -1;
    batch->count++;
    remove_at(pids, place);
    return 1;
}

/* Asks for the children that were named since the last call. A name may be out of date, or not written yet: that is why it is
 * only a hint. Returns whether somebody else has reaped one. */
static int reap_hinted(ap_pids *pids, ap_batch *batch)
{
    unsigned int end = atomic_load(&hint_count);
    int lost = 0;

    if (end - pids->hints_seen > HINTS)
        pids->hints_seen = end - HINTS;
    for (; pids->hints_seen != end && batch->count < AP_BATCH; pids->hints_seen++) {
        int pid = atomic_load(&hints[pids->hints_seen % HINTS]), place = place_of(pids, pid);
        if (is_at(pids, place, pid) && reap_at(pids, place, batch))
            lost |= batch->exits[batch->count - 1].source == AP_SOURCE_LOST;
    }
    return lost;
}

int ap_sigchld_reap(ap_pids *pids, int scan, ap_batch *batch)
{
    int place, was_deferred = pids->deferred;

    if (batch->count > 0)
        return batch->count;
    pids->deferred = 0;
    if (!scan && !was_deferred) {
        scan = reap_hinted(pids, batch);
        if (!scan && batch->count > 0) {
            pids->deferred = pids->count > 0;
            return batch->count;
        }
    }
    while (!scan && batch->count < AP_BATCH && pids->count > 0) {
        ap_exit seen;
        if (ap_waitid(P_ALL, 0, WEXITED | WNOHANG | WNOWAIT, &seen) <= 0) {
            scan = batch->count == 0 && !was_deferred; /* woken for nothing: has somebody else reaped? */
            break;
        }
        place = place_of(pids, seen.pid);
        scan = !is_at(pids, place, seen.pid) || pids->keys[place] & 1 || !reap_at(pids, place, batch);
    }
    for (place = 0; scan && batch->count < AP_BATCH && place < pids->count;)
        if (!reap_at(pids, place, batch))
            place++;
    return batch->count;
}
