/* Fork a process that has one thread by clone(2): with a pidfd from birth, and with a parent and an exit signal of our
 * choice.
 *
 * To Python this is os.fork(): its at-fork hooks run, under the GIL. To the C library it is not fork(): functions that were
 * registered by pthread_atfork() do not run, and a lock that another thread holds is never released in the child. So call it
 * only if the process has one thread. */
#ifndef AP_CLONE_H
#define AP_CLONE_H

enum {
    AP_FORK_SIBLING = 1 /* the child becomes a child of our parent, with our exit signal */
};

/* Fork. Returns 0, with the child's pid and its pidfd, close-on-exec, written. The child calls live(gate, mask), a Python
 * object by its id(), and ends. Without AP_FORK_SIBLING it has no exit signal: its exit sends no SIGCHLD, and only a wait
 * with __WALL finds it. After an exec its exit signal is SIGCHLD.
 * -ENOSYS, -EPERM, -EACCES: a seccomp filter forbids it. -EINVAL: AP_FORK_SIBLING, and we are init of a PID namespace.
 * -EMFILE, -ENFILE, -EAGAIN, -ENOMEM: there is no room for a descriptor, a process or its memory.
 * -ENOTSUP: the place where the C library caches the thread ID was not found (a C library other than glibc and musl); the
 * child would have its parent's ID. Call it with signals blocked: for a moment the cached ID is wrong in the parent, too. */
int ap_fork(int flags, unsigned long long live, int gate, unsigned long long mask, int *ret_pid, int *ret_pidfd);

#endif
