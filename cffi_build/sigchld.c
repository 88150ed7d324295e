#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "pidfd.h"
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

/* The action that our handler calls next. Links are never changed or freed, since a handler may be reading them in any
 * thread. The same (action, next) is used again, and no action is in a chain twice: so the chain does not grow if other code
 * replaces our handler again and again. */
struct link {
    struct sigaction action;
    struct sigaction quiet; /* the same, but that the kernel leaves zombies */
    const struct link *next; /* called next if `action` calls our handler */
    struct link *made_before;
};

enum { MAX_ABANDONED = 1024, NAMES = 256, PID_BITS = 22, MAX_NOBODIES = 1000 };

static _Atomic(int) wake_fd = -1;
static _Atomic(const struct link *) first;
static _Atomic(int) abandoned[MAX_ABANDONED];
static _Atomic(int) abandoned_count;     /* at least as many as there are; 0 spares each signal a walk over all */
static _Atomic(unsigned int) names[NAMES]; /* what the signals have named, each below the number of its round */
static _Atomic(unsigned int) name_count;
static _Atomic(int) nobody_count; /* how many of them named no child since the last check */
static _Atomic(int) is_paused;    /* the `quiet` of `first` is in our place */
static struct link *all_links;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* never taken by the handler */

/* The link that our handler is calling in this thread. If that calls our handler, the next link is called: no endless
 * recursion. glibc would allocate the memory of other TLS models at first use, which a handler must not do; musl never
 * does. */
#ifdef __GLIBC__
static __thread const struct link *calling __attribute__((tls_model("initial-exec")));
#else
static __thread const struct link *calling;
#endif

static void reap_abandoned_pids(void)
{
    int i;

    if (atomic_load(&abandoned_count) == 0)
        return;
    for (i = 0; i < MAX_ABANDONED; i++) {
        int pid = atomic_load(&abandoned[i]);
        ap_exit unused;
        /* Reaped, or (-ECHILD) no longer there to be reaped. */
        if (pid != 0 && ap_waitid(P_PID, pid, WEXITED | WNOHANG, &unused) != 0 &&
            atomic_compare_exchange_strong(&abandoned[i], &pid, 0))
            (void)atomic_fetch_sub(&abandoned_count, 1);
    }
}

/* A name with the number of its round, so that a reader sees if the place was not written yet. Pids are below 2^22. */
static unsigned int encode_name(unsigned int number, int name)
{
    return (number / NAMES + 1) << PID_BITS | (unsigned int)name;
}

void ap_sigchld_add_name(int name)
{
    unsigned int number = atomic_fetch_add(&name_count, 1);
    int fd = atomic_load(&wake_fd);
    uint64_t one = 1;

    atomic_store(&names[number % NAMES], encode_name(number, name));
    if (fd >= 0)
        (void)!write(fd, &one, sizeof one); /* last: the loop that it wakes finds the name */
}

unsigned int ap_sigchld_count_names(void)
{
    return atomic_load(&name_count);
}

int ap_sigchld_next_name(unsigned int *seen, int *ret_name)
{
    unsigned int number = *seen, end = atomic_load(&name_count), name;

    if (number == end)
        return 0;
    if (end - number > NAMES) { /* overwritten */
        *seen = end - NAMES;
        *ret_name = AP_NAME_UNKNOWN;
        return 1;
    }
    name = atomic_load(&names[number % NAMES]);
    *seen = number + 1;
    *ret_name = (int)(name & ((1U << PID_BITS) - 1));
    if (name != encode_name(number, *ret_name)) /* overwritten in this moment, or not written yet */
        *ret_name = AP_NAME_UNKNOWN;
    return 1;
}

/* Whether there is a function to call. SA_SIGINFO does not tell: some programs set it with SIG_DFL. */
static int has_handler(const struct sigaction *action)
{
    return action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN;
}

static void on_sigchld(int number, siginfo_t *info, void *context);

static int is_ours(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO && action->sa_sigaction == on_sigchld;
}

/* Whom the signal names as ended. */
static int read_name(const siginfo_t *info)
{
    struct sigaction now;

    /* Trust `info` only if the kernel has called us: a handler that calls ours may pass one argument. */
    if (calling != NULL || sigaction(SIGCHLD, NULL, &now) < 0 || !is_ours(&now))
        return AP_NAME_UNKNOWN;
    switch (info->si_code) {
    case CLD_EXITED:
    case CLD_KILLED:
    case CLD_DUMPED:
        return info->si_pid;
    case CLD_STOPPED:
    case CLD_CONTINUED:
    case CLD_TRAPPED:
        return AP_NAME_NOBODY;
    default: /* from kill() and its like; or, without a pid, from a kernel that has run out of memory */
        return info->si_pid != 0 ? AP_NAME_NOBODY : AP_NAME_UNKNOWN;
    }
}

/* Removes our handler until the next check. A storm of signals can leave a thread no time for anything else, the check
 * included. Called by the handler, without the lock: a thread that holds it may be interrupted by this handler. */
static void pause_handler(void)
{
    const struct link *link = atomic_load(&first);
    struct sigaction now;

    if (link == NULL || sigaction(SIGCHLD, NULL, &now) < 0 || !is_ours(&now))
        return;
    atomic_store(&is_paused, 1);
    (void)sigaction(SIGCHLD, &link->quiet, NULL);
}

static void on_sigchld(int number, siginfo_t *info, void *context)
{
    int saved_errno = errno, name = read_name(info);
    const struct link *outer = calling, *link = outer != NULL ? outer->next : atomic_load(&first);

    ap_sigchld_add_name(name);
    if (name == AP_NAME_NOBODY && atomic_fetch_add(&nobody_count, 1) >= MAX_NOBODIES)
        pause_handler();
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
    /* glibc adds SA_RESTORER, and tells of it */
    return a->sa_sigaction == b->sa_sigaction && ((a->sa_flags ^ b->sa_flags) & ~0x04000000) == 0 &&
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
        *made = (struct link){.action = *action, .quiet = *action, .next = next, .made_before = all_links};
        if (action->sa_handler == SIG_IGN)
            made->quiet.sa_handler = SIG_DFL;
        made->quiet.sa_flags &= ~SA_NOCLDWAIT;
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

/* Installs our handler in front of `link`. */
static void go_in_front(const struct link *link)
{
    struct sigaction ours = {.sa_sigaction = on_sigchld};
    int flags = SA_RESTART | SA_NOCLDSTOP;

    (void)sigemptyset(&ours.sa_mask);
    if (has_handler(&link->action)) {
        /* That handler must run under the conditions that it asked for. libuv's deadlocks if a signal interrupts it.
         * Python's needs system calls to be interrupted, or it runs only after them. A shell's needs signals for stopped
         * children. */
        ours.sa_mask = link->action.sa_mask;
        flags &= link->action.sa_flags;
    }
    ours.sa_flags = flags | SA_SIGINFO | SA_ONSTACK; /* a host program may run threads on small stacks */
    atomic_store(&first, link);                      /* before it can be needed */
    atomic_store(&nobody_count, 0);
    atomic_store(&is_paused, 0); /* before the handler can set it */
    (void)sigaction(SIGCHLD, &ours, NULL);
}

/* Whether pause_handler has put `now` there. */
static int is_put_by_pause(const struct sigaction *now)
{
    const struct link *link = atomic_load(&first);
    return atomic_load(&is_paused) && link != NULL && is_same(now, &link->quiet);
}

int ap_sigchld_install(int resume)
{
    struct sigaction now;
    const struct link *link;
    int result = AP_INSTALL_UNCHANGED;

    (void)pthread_mutex_lock(&lock);
    if (resume)
        atomic_store(&nobody_count, 0);
    (void)sigaction(SIGCHLD, NULL, &now);
    if (is_put_by_pause(&now)) {
        if (resume) {
            go_in_front(atomic_load(&first));
            result = AP_INSTALL_RESUMED;
        }
    } else if (!is_ours(&now)) {
        /* An action without a handler calls nothing after it. */
        link = find_link(&now, has_handler(&now) ? drop(atomic_load(&first), &now) : NULL);
        if (link == NULL)
            result = -ENOMEM;
        else {
            go_in_front(link);
            result = AP_INSTALL_DONE;
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
    if ((is_ours(&now) || is_put_by_pause(&now)) && link != NULL) {
        (void)sigaction(SIGCHLD, &link->action, NULL);
        /* `first` stays: another thread may be in our handler, and another library may still call it. */
        atomic_store(&is_paused, 0);
        result = 1;
    }
    (void)pthread_mutex_unlock(&lock);
    return result;
}

int ap_sigchld_abandon(int pid)
{
    int i;

    (void)atomic_fetch_add(&abandoned_count, 1); /* first: the handler may run, and reap it, between any two steps */
    for (i = 0; i < MAX_ABANDONED; i++) {
        int expected = 0;
        if (atomic_compare_exchange_strong(&abandoned[i], &expected, pid))
            return 0;
    }
    (void)atomic_fetch_sub(&abandoned_count, 1);
    return -ENOSPC;
}

int ap_sigchld_claim(int pid)
{
    int i;

    for (i = 0; i < MAX_ABANDONED; i++) {
        int expected = pid;
        if (atomic_compare_exchange_strong(&abandoned[i], &expected, 0)) {
            (void)atomic_fetch_sub(&abandoned_count, 1);
            return 1;
        }
    }
    return 0;
}

int ap_sigchld_reap_abandoned(void)
{
    reap_abandoned_pids();
    return atomic_load(&abandoned_count);
}

void ap_sigchld_after_fork(void)
{
    int i, fd = atomic_exchange(&wake_fd, -1);

    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER; /* another thread of the parent may have held it */
    if (fd >= 0)
        (void)close(fd);
    if (atomic_load(&first) == NULL) /* never installed: all that follows would only copy pages */
        return;
    if (atomic_load(&abandoned_count) != 0) {
        for (i = 0; i < MAX_ABANDONED; i++)
            if (atomic_load_explicit(&abandoned[i], memory_order_relaxed) != 0)
                atomic_store(&abandoned[i], 0);
        atomic_store(&abandoned_count, 0);
    }
    (void)ap_sigchld_restore();
}

/* Writes what an action does; returns the length. */
static int describe(const struct sigaction *action, char *ret_text, size_t size)
{
    const char *flag = action->sa_flags & SA_NOCLDWAIT ? " with SA_NOCLDWAIT" : "";
    Dl_info where;

    if (action->sa_handler == SIG_DFL)
        return snprintf(ret_text, size, "SIG_DFL%s", flag);
    if (action->sa_handler == SIG_IGN)
        return snprintf(ret_text, size, "SIG_IGN%s", flag);
    if (is_ours(action))
        return snprintf(ret_text, size, "ours%s", flag);
    if (dladdr((void *)(uintptr_t)action->sa_sigaction, &where) != 0 && where.dli_fname != NULL)
        return snprintf(ret_text, size, "a handler in %s%s", where.dli_fname, flag);
    return snprintf(ret_text, size, "a handler at %p%s", (void *)(uintptr_t)action->sa_sigaction, flag);
}

int ap_sigchld_describe(char *ret_text, int size)
{
    static const char behind[] = ", and behind it ";
    const struct link *link = atomic_load(&first);
    struct sigaction now;
    size_t room = (size_t)size, length;

    (void)sigaction(SIGCHLD, NULL, &now);
    length = (size_t)describe(&now, ret_text, room);
    if (!is_ours(&now) || link == NULL || length + sizeof behind > room)
        return 0;
    if (has_handler(&link->action) || link->action.sa_handler == SIG_IGN || link->action.sa_flags & SA_NOCLDWAIT) {
        memcpy(ret_text + length, behind, sizeof behind);
        length += sizeof behind - 1;
        (void)describe(&link->action, ret_text + length, room - length);
    }
    return 0;
}
