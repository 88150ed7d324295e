/* Children by clone3(2), for the tests of what each kernel can do. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "syscalls.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <sys/wait.h>
#include <unistd.h>

static long clone3(uint64_t flags, uint64_t exit_signal, int *pidfd)
{
    struct ap_clone_args args = {.flags = flags, .pidfd = (uintptr_t)pidfd, .exit_signal = exit_signal};
    return syscall(SYS_clone3, &args, AP_CLONE_ARGS_V0);
}

/* Make a child that exits at once, with 1 if SIGUSR1 has a handler in it and 0 if not. Returns its pid, or -errno. */
int since_clone3(uint64_t flags, int exit_signal, int *ret_pidfd);
int since_clone3(uint64_t flags, int exit_signal, int *ret_pidfd)
{
    long pid = clone3(flags, (uint64_t)exit_signal, ret_pidfd);

    if (pid == 0) {
        struct sigaction action;
        (void)sigaction(SIGUSR1, NULL, &action);
        _exit(action.sa_handler != SIG_DFL);
    }
    return pid < 0 ? -errno : (int)pid;
}

/* Make a child without an exit signal that makes a sibling of its own, by CLONE_PARENT, and ends; reap it. Returns 0, with the
 * sibling left for the caller, or -errno. */
int since_sibling(void);
int since_sibling(void)
{
    siginfo_t info;
    long pid = clone3(0, 0, NULL);

    if (pid < 0)
        return -errno;
    if (pid == 0) {
        long sibling = clone3(CLONE_PARENT, 0, NULL);
        _exit(sibling < 0 ? errno : 0);
    }
    if (syscall(SYS_waitid, P_PID, pid, &info, WEXITED | __WALL, NULL) < 0)
        return -errno;
    return -info.si_status;
}
