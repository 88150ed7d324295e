#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "pidfd.h"
#include "syscalls.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PIDFS_MAGIC = 0x50494446 };

/* The first published form of struct pidfd_info (PIDFD_INFO_SIZE_VER0, Linux 6.13); later kernels accept it. */
struct pidfd_info_v0 {
    uint64_t mask;
    uint64_t cgroupid;
    uint32_t pid, tgid, ppid;
    uint32_t ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    int32_t exit_code;
};
_Static_assert(sizeof(struct pidfd_info_v0) == 64, "the size is a part of the ioctl's number");
#define GET_INFO_V0 _IOWR(0xFF, 11, struct pidfd_info_v0)
#define INFO_PID ((uint64_t)1 << 0)
#define INFO_EXIT ((uint64_t)1 << 3)

/* What ioctl takes as its request: glibc and the kernel have it unsigned, musl has it as POSIX does. */
#ifdef __GLIBC__
typedef unsigned long ioctl_request;
#else
typedef int ioctl_request;
#endif

int ap_pidfd_open(int pid)
{
    long fd = syscall(SYS_pidfd_open, pid, 0);
    return fd < 0 ? -errno : (int)fd;
}

long long ap_pidfd_inode(int pidfd)
{
    struct statfs system;
    struct stat file;

    if (fstatfs(pidfd, &system) < 0 || system.f_type != PIDFS_MAGIC || fstat(pidfd, &file) < 0)
        return 0;
    return (long long)file.st_ino;
}

long long ap_pid_inode(int pid)
{
    int pidfd = ap_pidfd_open(pid);
    long long inode;

    if (pidfd < 0)
        return 0;
    inode = ap_pidfd_inode(pidfd);
    (void)close(pidfd);
    return inode;
}

int ap_waitid(int idtype, int id, int options, ap_exit *ret_exit)
{
    siginfo_t info;
    long rusage[18];

    info.si_pid = 0; /* waitid leaves it alone when it finds nothing */
    if (syscall(SYS_waitid, idtype, id, &info, options | __WALL, rusage) < 0)
        return -errno;
    if (info.si_pid == 0)
        return 0;
    ret_exit->pid = info.si_pid;
    if (info.si_code == CLD_EXITED)
        ret_exit->status = (info.si_status & 0xff) << 8;
    else
        ret_exit->status = info.si_status | (info.si_code == CLD_DUMPED ? 0x80 : 0);
    ret_exit->source = options & WNOWAIT ? AP_SOURCE_PEEKED : AP_SOURCE_REAPED;
    memcpy(ret_exit->rusage, rusage, sizeof rusage);
    return 1;
}

int ap_pidfd_send_signal(int pidfd, int signal, unsigned int flags)
{
    return syscall(SYS_pidfd_send_signal, pidfd, signal, NULL, flags) < 0 ? -errno : 0;
}

int ap_pidfd_get_exit(int pidfd, int *ret_status)
{
    struct pidfd_info_v0 info = {.mask = INFO_EXIT};
    int failed = ioctl(pidfd, (ioctl_request)GET_INFO_V0, &info) < 0;

    if (failed && errno == ESRCH) {
        /* Linux looks for the exit first, then for the process. If it is reaped in between, both are missing (seen on 6.18,
         * once in 10,000 children that other code reaped). Now it is gone, so a kernel that keeps exits has this one. */
        info.mask = INFO_EXIT;
        failed = ioctl(pidfd, (ioctl_request)GET_INFO_V0, &info) < 0;
    }
    if (failed)
        return -errno;
    if (!(info.mask & INFO_EXIT))
        return 0;
    *ret_status = info.exit_code;
    return 1;
}

int ap_pidfd_get_pid(int pidfd)
{
    struct pidfd_info_v0 info = {.mask = INFO_PID};

    if (ioctl(pidfd, (ioctl_request)GET_INFO_V0, &info) < 0)
        return -errno;
    return info.mask & INFO_PID && info.tgid > 0 ? (int)info.tgid : -ESRCH;
}

static int exit_at_once(void *unused)
{
    (void)unused;
    _exit(0);
}

int ap_probe_exit_info(void)
{
    _Alignas(16) char stack[4096]; /* the child shares our memory, as after vfork(2), and only calls _exit */
    ap_exit ended;
    int pid, pidfd = -1, status, told, err;
    sigset_t all, old;

    (void)sigfillset(&all); /* no handler of ours may run in the child */
    (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    pid = clone(exit_at_once, stack + sizeof stack, CLONE_PIDFD | CLONE_VM | CLONE_VFORK, NULL, &pidfd);
    err = errno;
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (pid < 0)
        return -err;
    /* CLONE_VFORK: it has ended. Its exit signal is 0, so only a wait with __WALL, as ours, finds it. */
    if (pidfd < 0) { /* Linux before 5.2 ignores CLONE_PIDFD */
        (void)ap_waitid(P_PID, pid, WEXITED, &ended);
        return -ENOSYS;
    }
    (void)ap_waitid(P_PID, pid, WEXITED, &ended);
    told = ap_pidfd_get_exit(pidfd, &status) == 1;
    (void)close(pidfd);
    return told;
}
