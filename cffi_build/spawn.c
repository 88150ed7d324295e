#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>

#include "pidfd.h"
#include "reaper.h"
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

/* The kernel's struct clone_args, first form (CLONE_ARGS_SIZE_VER0). */
struct clone_args_v0 {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
};

/* Memory that parent and child share. */
struct launch {
    char **paths, **argv, **env;
    const char *cwd;
    const int *pass_fds;
    int path_count, pass_count, stdio[3], umask, pgid, flags;
    uint64_t old_mask;
    int reset_handlers; /* CLONE_CLEAR_SIGHAND was not to be had */
    volatile int error; /* written by the child if its program cannot run */
    volatile int step;
};

/* Every signal, those that libc keeps for itself among them, which sigprocmask would spare. */
static void set_mask(uint64_t mask, uint64_t *ret_old)
{
    (void)syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, ret_old, sizeof mask);
}

/* From here to run_child: the child, in its parent's memory, while that thread of the parent stands still and others go on.
 * Only system calls, and nothing that takes a lock. */

static int reset_handlers(void)
{
    int number;

    for (number = 1; number <= 64; number++) {
        struct sigaction action;
        if (sigaction(number, NULL, &action) == 0 && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN) {
            action.sa_handler = SIG_DFL;
            action.sa_flags = 0;
            if (sigaction(number, &action, NULL) < 0)
                return -1;
        }
    }
    return 0;
}

static int set_default(int number)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    return sigaction(number, &action, NULL);
}

static int make_inheritable(int fd)
{
    int flags = fcntl(fd, F_GETFD);
    return flags < 0 ? -1 : fcntl(fd, F_SETFD, flags & ~FD_CLOEXEC);
}

static int connect_stdio(const int *wanted)
{
    int from[3] = {wanted[0], wanted[1], wanted[2]}, to;

    /* What stands where another one has to go moves up first. */
    for (to = 1; to < 3; to++)
        while (from[to] >= 0 && from[to] < to)
            if ((from[to] = fcntl(from[to], F_DUPFD_CLOEXEC, to)) < 0)
                return -1;
    for (to = 0; to < 3; to++)
        if (from[to] >= 0 && (from[to] == to ? make_inheritable(to) : dup2(from[to], to)) < 0)
            return -1;
    return 0;
}

/* Without close_range (before Linux 5.9): the names in /proc/self/fd. */
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

static int close_between(unsigned int first, unsigned int last)
{
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
        return 0;
    return close_listed(first, last);
}

static int close_others(const int *keep, int count)
{
    unsigned int first = 3;
    int i;

    for (i = 0; i < count; i++) {
        if (keep[i] < (int)first)
            continue;
        if (close_between(first, (unsigned int)keep[i] - 1) < 0)
            return -1;
        first = (unsigned int)keep[i] + 1;
    }
    return close_between(first, ~0U);
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
    if (launch->flags & AP_SPAWN_CLOSE_FDS && close_others(launch->pass_fds, launch->pass_count) < 0)
        return AP_STEP_SETUP;
    if (launch->reset_handlers && reset_handlers() < 0)
        return AP_STEP_SETUP;
    return AP_STEP_EXEC;
}

static int run_child(void *data)
{
    struct launch *launch = data;
    int step = set_up(launch), error = errno, i;

    if (step == AP_STEP_EXEC) {
        uint64_t mine;
        /* Last, when no handler of the parent's is left that could run in its memory. */
        set_mask(launch->old_mask, &mine);
        error = 0;
        for (i = 0; i < launch->path_count; i++) {
            (void)execve(launch->paths[i], launch->argv, launch->env);
            if (error == 0 && errno != ENOENT && errno != ENOTDIR)
                error = errno; /* as subprocess does: what is there and cannot be run, before what is not there */
        }
        if (error == 0)
            error = errno;
    }
    launch->step = step;
    launch->error = error;
    _exit(255);
}

#if defined(__x86_64__)
/* clone3 with a stack of the child's own; libc has no such function, and the child cannot return into this one. */
static long clone3_child(struct clone_args_v0 *args, void *data)
{
    long result;
    int (*child)(void *) = run_child;

    __asm__ volatile("syscall\n\t"
                     "testq %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xorl %%ebp, %%ebp\n\t" /* the outermost frame, for unwinders */
                     "movq %[data], %%rdi\n\t"
                     "callq *%[child]\n\t"
                     "hlt\n"
                     "1:"
                     : "=a"(result)
                     : "0"((long)SYS_clone3), "D"(args), "S"(sizeof *args), [data] "r"(data), [child] "r"(child)
                     : "rcx", "r11", "cc", "memory");
    return result;
}
#elif defined(__aarch64__)
static long clone3_child(struct clone_args_v0 *args, void *data)
{
    register long number __asm__("x8") = SYS_clone3;
    register long first __asm__("x0") = (long)(uintptr_t)args;
    register long second __asm__("x1") = (long)sizeof *args;
    register void *kept_data __asm__("x9") = data;
    register int (*child)(void *) __asm__("x10") = run_child;

    __asm__ volatile("svc #0\n\t"
                     "cbnz x0, 1f\n\t"
                     "mov x29, xzr\n\t" /* the outermost frame, for unwinders */
                     "mov x0, x9\n\t"
                     "blr x10\n\t"
                     "brk #1\n"
                     "1:"
                     : "+r"(first)
                     : "r"(number), "r"(second), "r"(kept_data), "r"(child)
                     : "cc", "memory");
    return first;
}
#else
static long clone3_child(struct clone_args_v0 *args, void *data)
{
    (void)args;
    (void)data;
    return -ENOSYS;
}
#endif

/* Returns the pid, or -errno; *ret_pidfd stays -1 on a kernel that ignores CLONE_PIDFD. */
static int clone_child(struct launch *launch, int *ret_pidfd)
{
    enum { STACK_SIZE = 16384 };
    _Alignas(16) char stack[STACK_SIZE];
    /* Exit signal 0 until it runs its program (exec makes it SIGCHLD): a child that fails before is seen by nobody but us. */
    struct clone_args_v0 args = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_PIDFD | CLONE_CLEAR_SIGHAND,
        .pidfd = (uint64_t)(uintptr_t)ret_pidfd,
        .stack = (uint64_t)(uintptr_t)stack,
        .stack_size = STACK_SIZE,
    };
    long pid = clone3_child(&args, launch);

    if (pid == -ENOSYS || pid == -EINVAL || pid == -EPERM || pid == -EACCES) { /* before 5.5, or filtered as in Docker */
        launch->reset_handlers = 1;
        pid = clone(run_child, stack + STACK_SIZE, CLONE_VM | CLONE_VFORK | CLONE_PIDFD, launch, ret_pidfd);
        if (pid < 0)
            pid = -errno;
    }
#ifdef __SANITIZE_ADDRESS__
    /* The child has called execve from in there, and left the borders of its variables marked, where others will stand. */
    __asan_unpoison_memory_region(stack, sizeof stack);
#endif
    return (int)pid;
}

/* Makes an array of pointers to the strings in `block`; NULL when there is no memory. */
static char **point_at(const char *block, int count)
{
    char **pointers = malloc(((size_t)count + 1) * sizeof *pointers);
    int i;

    if (pointers == NULL)
        return NULL;
    for (i = 0; i < count; i++) {
        pointers[i] = (char *)(uintptr_t)block;
        block += strlen(block) + 1;
    }
    pointers[count] = NULL;
    return pointers;
}

/* Makes a copy of the environment, in one piece with the pointers to it; NULL when there is no memory.
 * Under the GIL, as every change of it from Python is: the child must not read what another thread is moving. */
static char **copy_environment(void)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    static char *empty[] = {NULL};
    char **from = environ != NULL ? environ : empty, **copy, *text;
    size_t count, size = 0, i;

    for (count = 0; from[count] != NULL; count++)
        size += strlen(from[count]) + 1;
    copy = malloc((count + 1) * sizeof *copy + size);
    if (copy != NULL) {
        text = (char *)(copy + count + 1);
        for (i = 0; i < count; i++) {
            size_t length = strlen(from[i]) + 1;
            copy[i] = memcpy(text, from[i], length);
            text += length;
        }
        copy[count] = NULL;
    }
    PyGILState_Release(gil);
    return copy;
}

/* Ends a child that cannot be had, and everything of it. */
static void discard(int pid, int pidfd, int kill_it)
{
    ap_exit unused;

    if (kill_it)
        (void)kill(pid, SIGKILL); /* not reaped yet, so the pid is its own */
    while (ap_waitid(P_PID, pid, WEXITED, &unused) == -EINTR)
        ;
    if (pidfd >= 0)
        (void)close(pidfd);
}

static long long failure(int step, int error)
{
    return -((long long)step << 16 | error);
}

long long ap_spawn(int reaper, const char *paths, int path_count, const char *argv, int arg_count, const char *env,
                   int env_count, const char *cwd, const int *pass_fds, int pass_count, int in, int out, int err, int umask,
                   int pgid, int flags)
{
    struct launch launch = {
        .paths = point_at(paths, path_count),
        .argv = point_at(argv, arg_count),
        .env = env_count < 0 ? copy_environment() : point_at(env, env_count),
        .cwd = cwd,
        .pass_fds = pass_fds,
        .path_count = path_count,
        .pass_count = pass_count,
        .stdio = {in, out, err},
        .umask = umask,
        .pgid = pgid,
        .flags = flags,
    };
    int pid = -ENOMEM, error, pidfd = -1;

    if (launch.paths != NULL && launch.argv != NULL && launch.env != NULL) {
        uint64_t unused;
        set_mask(~(uint64_t)0, &launch.old_mask);
        pid = clone_child(&launch, &pidfd);
        set_mask(launch.old_mask, &unused);
    }
    free(launch.paths);
    free(launch.argv);
    free(launch.env);

    if (pid < 0)
        return failure(AP_STEP_PARENT, -pid);
    if (launch.error != 0) {
        discard(pid, pidfd, 0);
        return failure(launch.step, launch.error);
    }
    if (pidfd < 0) { /* Linux before 5.2 ignores CLONE_PIDFD */
        discard(pid, pidfd, 1);
        return failure(AP_STEP_PARENT, ENOSYS);
    }
    error = -ap_reaper_adopt(reaper, pid, pidfd, 0);
    if (error > 0) {
        discard(pid, pidfd, 1);
        return failure(AP_STEP_PARENT, error);
    }
    return (long long)pid << 32 | pidfd;
}
