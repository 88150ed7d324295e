#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "spawn.h"
#include "launch.h"
#include "child.h"
#include "syscalls.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>

void ap_set_mask(uint64_t mask, uint64_t *ret_old)
{
    (void)syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, ret_old, sizeof mask);
}

/* All that follows runs in the child, in its parent's memory. The thread that started it waits, other threads of the parent
 * go on. So: system calls alone, and nothing that takes a lock. */

static int set_default(int number)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    return sigaction(number, &action, NULL);
}

static int reset_handlers(void)
{
    unsigned long long caught = ap_caught_signals();

    for (; caught != 0; caught &= caught - 1)
        if (set_default(__builtin_ctzll(caught) + 1) < 0)
            return -1;
    return 0;
}

static int make_inheritable(int fd)
{
    int flags = fcntl(fd, F_GETFD);
    return flags < 0 ? -1 : fcntl(fd, F_SETFD, flags & ~FD_CLOEXEC);
}

static int connect_stdio(const int *wanted)
{
    int from[3] = {wanted[0], wanted[1], wanted[2]}, to;

    /* First move a descriptor away if another one must go to its number. */
    for (to = 1; to < 3; to++)
        while (from[to] >= 0 && from[to] < to)
            if ((from[to] = fcntl(from[to], F_DUPFD_CLOEXEC, to)) < 0)
                return -1;
    for (to = 0; to < 3; to++)
        if (from[to] >= 0 && (from[to] == to ? make_inheritable(to) : dup2(from[to], to)) < 0)
            return -1;
    return 0;
}

/* The names in /proc/self/fd. -1: they cannot be read. */
static int close_listed(unsigned int first, unsigned int last)
{
    struct entry { /* struct linux_dirent64 */
        uint64_t inode;
        int64_t offset;
        unsigned short length;
        unsigned char type;
        char name[];
    };
    _Alignas(struct entry) char buffer[2048];
    int directory = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    long size, at;

    if (directory < 0)
        return -1;
    while ((size = syscall(SYS_getdents64, directory, buffer, sizeof buffer)) > 0)
        for (at = 0; at < size; at += ((struct entry *)(void *)(buffer + at))->length) {
            const char *digit = ((struct entry *)(void *)(buffer + at))->name;
            unsigned int fd = 0;
            while (*digit >= '0' && *digit <= '9')
                fd = fd * 10 + (unsigned int)(*digit++ - '0');
            if (*digit == '\0' && fd >= first && fd <= last && fd != (unsigned int)directory)
                (void)close((int)fd);
        }
    (void)close(directory);
    return size < 0 ? -1 : 0;
}

/* Close each number up to the limit, as subprocess does. */
static void close_each(unsigned int first, unsigned int last)
{
    long limit = sysconf(_SC_OPEN_MAX);
    unsigned int fd, end = limit > 0 && limit < INT_MAX ? (unsigned int)limit : INT_MAX;

    for (fd = first; fd <= last && fd < end; fd++)
        (void)close((int)fd);
}

static void close_between(unsigned int first, unsigned int last)
{
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
        return;
    /* Before Linux 5.9, or filtered. */
    if (close_listed(first, last) < 0) { /* no /proc, or one of another PID namespace; or no descriptor to read it with */
        close_each(first, last);
        (void)close_listed(first, last); /* there is a free descriptor now; and the limit may be lower than an open number */
    }
}

static void close_others(const int *keep, int count)
{
    unsigned int first = 3;
    int i;

    for (i = 0; i < count; i++) {
        if (keep[i] < (int)first)
            continue;
        close_between(first, (unsigned int)keep[i] - 1);
        first = (unsigned int)keep[i] + 1;
    }
    close_between(first, ~0U);
}

static int set_up(const struct launch *launch)
{
    int i;

    for (i = 0; i < launch->pass_count; i++)
        if (make_inheritable(launch->pass_fds[i]) < 0)
            return AP_STEP_SETUP;
    if (connect_stdio(launch->stdio) < 0)
        return AP_STEP_SETUP;
    if (launch->cwd != NULL && chdir(launch->cwd) < 0)
        return AP_STEP_CHDIR;
    if (launch->umask >= 0)
        (void)umask((mode_t)launch->umask);
    if (launch->flags & AP_SPAWN_RESTORE_SIGNALS && (set_default(SIGPIPE) < 0 || set_default(SIGXFSZ) < 0))
        return AP_STEP_SETUP;
    if (launch->flags & AP_SPAWN_SETSID && setsid() < 0)
        return AP_STEP_SETUP;
    if (launch->pgid >= 0 && setpgid(0, launch->pgid) < 0)
        return AP_STEP_SETUP;
    if (launch->flags & AP_SPAWN_CLOSE_FDS)
        close_others(launch->pass_fds, launch->pass_count);
    if (launch->reset_handlers && reset_handlers() < 0)
        return AP_STEP_SETUP;
    return AP_STEP_EXEC;
}

int ap_run_child(void *data)
{
    struct launch *launch = data;
    int step = set_up(launch), error = errno, i;

    if (step == AP_STEP_EXEC) {
        uint64_t mine;
        /* Last, when no handler of the parent's is left that could run in its memory. */
        ap_set_mask(launch->old_mask, &mine);
        error = 0;
        for (i = 0; i < launch->path_count; i++) {
            (void)execve(launch->paths[i], launch->argv, launch->env);
            if (error == 0 && errno != ENOENT && errno != ENOTDIR)
                error = errno; /* as subprocess: a file that cannot be run counts more than one that is missing */
        }
        if (error == 0)
            error = errno;
    }
    launch->step = step;
    launch->error = error;
    _exit(255);
}
