#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
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
 * musl's has it among its first members, and a robust list only once one is used. pthread_getcpuclockid encodes the cached
 * ID. So a word that holds the ID is the right one if its result changes when the word does. PR_GET_TID_ADDRESS is no help:
 * in musl it is the address of a lock, and since glibc 2.43 it is another member until the process has forked. */
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
        /* A seccomp filter cannot read the struct, so Docker's refuses clone3 and allows clone. With CLONE_PIDFD, clone
         * stores the pidfd in the place of parent_tid. The order of the last two arguments depends on the architecture:
         * child_tid, and tls, which is not used here. */
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
    /* As fork() does: store the child's thread ID in the C library's cache. */
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
    ap_prepare_fork(); /* fork() calls it by pthread_atfork */
    pid = clone_process(clone_flags, tid, &pidfd);
    err = errno;
    if (pid == 0) {
        (void)syscall(SYS_set_robust_list, robust_list, robust_size); /* as glibc's fork does: the child has none yet */
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
