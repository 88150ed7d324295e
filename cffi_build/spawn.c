#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <Python.h>

#include "pidfd.h"
#include "reaper.h"
#include "spawn.h"
#include "launch.h"
#include "syscalls.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

/* clone3 with a stack of the child's own, on which it calls ap_run_child(data). libc has no such function, and the child
 * cannot return from this one. Each operand has a fixed register. If the compiler chose, it could take one that is changed
 * before it is read (rdi, rbp), or by the kernel (rcx, r11). Not inlined: the caller might keep values in registers that the
 * kernel does not preserve (SVE's). */
#if defined(__x86_64__)
static __attribute__((noinline)) long clone3_child(struct ap_clone_args *args, void *data)
{
    register void *kept_data __asm__("r8") = data;
    register int (*child)(void *) __asm__("r9") = ap_run_child;
    long result;

    __asm__ volatile("syscall\n\t"
                     "testq %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xorl %%ebp, %%ebp\n\t" /* the outermost frame, for unwinders */
                     "movq %%r8, %%rdi\n\t"
                     "callq *%%r9\n\t"
                     "hlt\n"
                     "1:"
                     : "=a"(result)
                     : "0"((long)SYS_clone3), "D"(args), "S"((long)AP_CLONE_ARGS_V0), "r"(kept_data), "r"(child)
                     : "rcx", "r11", "cc", "memory");
    return result;
}
#elif defined(__aarch64__)
static __attribute__((noinline)) long clone3_child(struct ap_clone_args *args, void *data)
{
    register long number __asm__("x8") = SYS_clone3;
    register long first __asm__("x0") = (long)(uintptr_t)args;
    register long second __asm__("x1") = AP_CLONE_ARGS_V0;
    register void *kept_data __asm__("x9") = data;
    register int (*child)(void *) __asm__("x10") = ap_run_child;

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
static long clone3_child(struct ap_clone_args *args, void *data)
{
    (void)args;
    (void)data;
    return -ENOSYS;
}
#endif

/* Returns the pid, or -errno; *ret_pidfd stays -1 on a kernel that ignores CLONE_PIDFD (before 5.2), or without that
 * flag. */
static int clone_child(struct launch *launch, int with_pidfd, int *ret_pidfd)
{
    enum { STACK_SIZE = 16384 };
    _Alignas(16) char stack[STACK_SIZE];
    const unsigned int flags = CLONE_VM | CLONE_VFORK | (with_pidfd ? CLONE_PIDFD : 0U);
    /* Exit signal 0; exec makes it SIGCHLD. So if the child fails before its program runs, only a wait with __WALL finds
     * it. */
    struct ap_clone_args args = {
        .flags = flags | CLONE_CLEAR_SIGHAND,
        .pidfd = with_pidfd ? (uint64_t)(uintptr_t)ret_pidfd : 0,
        .stack = (uint64_t)(uintptr_t)stack,
        .stack_size = STACK_SIZE,
    };
    long pid = clone3_child(&args, launch);

    if (pid == -ENOSYS || pid == -EINVAL || pid == -EPERM || pid == -EACCES) { /* before 5.5, or filtered as in Docker */
        launch->reset_handlers = 1;
        pid = clone(ap_run_child, stack + STACK_SIZE, (int)flags, launch, ret_pidfd);
        if (pid < 0)
            pid = -errno;
    }
#ifdef __SANITIZE_ADDRESS__
    /* The child has left this stack by execve, and AddressSanitizer's marks around its variables are still set. */
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

/* Reaps a child that has ended without running its program. By its pidfd: other code that waits with __WALL may have reaped
 * it first, and the pid may be another child's. */
static void discard(int pid, int pidfd)
{
    ap_exit unused;
    int result;

    do
        result = pidfd >= 0 ? ap_waitid(AP_P_PIDFD, pidfd, WEXITED, &unused) : -EINVAL;
    while (result == -EINTR);
    if (result == -EINVAL) /* no pidfd; or Linux before 5.4, which cannot wait by one */
        while (ap_waitid(P_PID, pid, WEXITED, &unused) == -EINTR)
            ;
    if (pidfd >= 0)
        (void)close(pidfd);
}

static int failure(int step, int error)
{
    return -(step << 16 | error);
}

int ap_spawn(ap_program *ret_program, int reaper, const char *paths, int path_count, const char *argv, int arg_count,
             const char *env, int env_count, const char *cwd, const int *pass_fds, int pass_count, int in, int out, int err,
             int umask, int pgid, int flags)
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
    int pid = -ENOMEM, pidfd = -1;

    if (launch.paths != NULL && launch.argv != NULL && launch.env != NULL) {
        uint64_t unused;
        ap_set_mask(~(uint64_t)0, &launch.old_mask);
        pid = clone_child(&launch, 1, &pidfd);
        if (pid == -EMFILE || pid == -ENFILE) /* no descriptor for it: the program is started all the same */
            pid = clone_child(&launch, 0, &pidfd);
        ap_set_mask(launch.old_mask, &unused);
    }
    free(launch.paths);
    free(launch.argv);
    free(launch.env);

    if (pid < 0)
        return failure(AP_STEP_PARENT, -pid);
    if (launch.error != 0) {
        discard(pid, pidfd);
        return failure(launch.step, launch.error);
    }
    /* From here on other code may reap it. If it must be killed, that is done by its pidfd. */
    ret_program->held = pidfd >= 0 && ap_reaper_adopt(reaper, pid, pidfd, 0) == 0;
    ret_program->pidfd = pidfd;
    ret_program->pid = pid;
    return 0;
}
