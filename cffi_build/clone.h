/* Fork a process that has one thread by clone(2): with a pidfd from birth, and with a parent and an exit signal of our choice.
 *
 * This is os.fork() as far as Python is concerned: its hooks run, under the GIL. It is not fork() as far as the C library
 * is: functions registered with pthread_atfork do not run, and a lock that another thread holds is never released in the
 * child. So it must be called by the only thread of the process. */
#ifndef AP_CLONE_H
#define AP_CLONE_H

enum {
    AP_FORK_SIBLING = 1 /* the child is our parent's, not ours, and has the exit signal that we have */
};

/* Fork. Returns 0, with the child's pid and its pidfd, close-on-exec, written. The child calls live(gate, mask), a Python
 * object by its id(), and ends. Without AP_FORK_SIBLING it has no exit signal: its end sends no SIGCHLD, and it is shown to
 * those only who wait with __WALL. An exec in the child gives it SIGCHLD again.
 * -ENOSYS, -EPERM, -EACCES: a seccomp filter forbids it. -EINVAL: AP_FORK_SIBLING, and we are init of a PID namespace.
 * -EMFILE, -ENFILE, -EAGAIN, -ENOMEM: there is no room for a descriptor, a process or its memory.
 * -ENOTSUP: it cannot be found out where the C library caches the ID of the thread, which the child would take for its own
 * (any but glibc and musl). Call it with signals blocked: for an instant that ID is wrong in the parent, too. */
int ap_fork(int flags, unsigned long long live, int gate, unsigned long long mask, int *ret_pid, int *ret_pidfd);

#endif
