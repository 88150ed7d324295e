#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "live_child.h"

#include "clone.h"
#include "epolls.h"
#include "syscalls.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

/* Return where the C library caches the ID of this thread, NULL if that is not found out.
 *
 * glibc's struct pthread has it shortly before the head of the robust list, which the kernel knows, in every version so far.
 * musl's has it among its first members, and a robust list only once one is used.
 * A word that holds the ID is the right one if pthread_getcpuclockid, which encodes the cached ID, follows a change of it.
 * PR_GET_TID_ADDRESS does not tell: musl names a lock by it, and glibc from 2.43 on another member until the process has
 * forked. */
static int *find_cached_tid(void *robust_list)
{
    volatile int *first = (volatile int *)pthread_self(), *word = robust_list;
    int tid = (int)syscall(SYS_gettid);

    if (word <= first || word - first > 1024)
        word = first + 24; /* well inside musl's struct, also where a pointer has four bytes */
    while (--word > first) {
        clockid_t as_is, changed;
        int follows;

        if (*word != tid || pthread_getcpuclockid(pthread_self(), &as_is) != 0)
            continue;
        *word = tid + 1;
        follows = pthread_getcpuclockid(pthread_self(), &changed) == 0 && changed != as_is;
        *word = tid;
        if (follows)
            return (int *)word;
    }
    return NULL;
}

static long clone_process(uint64_t flags, int *tid, int *pidfd)
{
    struct ap_clone_args args = {.flags = flags, .pidfd = (uintptr_t)pidfd, .child_tid = (uintptr_t)tid};
    long pid = syscall(SYS_clone3, &args, AP_CLONE_ARGS_V0);

    if (pid < 0 && (errno == ENOSYS || errno == EPERM || errno == EACCES)) {
        /* Filters that cannot look into a struct refuse clone3 and allow clone, as Docker's does. CLONE_PIDFD stores where
         * CLONE_PARENT_SETTID would. Architectures differ in which of the last two arguments is child_tid; the other one
         * is for CLONE_SETTLS. */
#ifdef __s390__
        pid = syscall(SYS_clone, NULL, (unsigned long)flags, pidfd, tid, tid);
#else
        pid = syscall(SYS_clone, (unsigned long)flags, NULL, pidfd, tid, tid);
#endif
    }
    return pid;
}

int ap_fork(int flags, unsigned long long live, int gate, unsigned long long mask, int *ret_pid, int *ret_pidfd)
{
    /* As in a child of fork: the C library's cached thread ID is the child's. */
    uint64_t clone_flags = CLONE_PIDFD | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
    PyGILState_STATE gil;
    void *robust_list = NULL;
    size_t robust_size = 0;
    int pidfd = -1, err, *tid;
    long pid;

    (void)syscall(SYS_get_robust_list, 0, &robust_list, &robust_size);
    tid = find_cached_tid(robust_list);
    if (tid == NULL)
        return -ENOTSUP;
    if (flags & AP_FORK_SIBLING)
        clone_flags |= CLONE_PARENT;

    gil = PyGILState_Ensure(); /* cffi has released it */
    PyOS_BeforeFork();
    ap_prepare_fork(); /* among the hooks that only fork(2) calls */
    pid = clone_process(clone_flags, tid, &pidfd);
    err = errno;
    if (pid == 0) {
        (void)syscall(SYS_set_robust_list, robust_list, robust_size); /* the kernel forgets it, and glibc's fork restores it */
        PyOS_AfterFork_Child();
        ap_live_child((PyObject *)(uintptr_t)live, gate, mask);
    }
    if (pid > 0) {
        *ret_pid = (int)pid;
        *ret_pidfd = pidfd;
    }
    PyOS_AfterFork_Parent();
    PyGILState_Release(gil);
    return pid < 0 ? -err : 0;
}
