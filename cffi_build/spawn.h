/* Start a program with a pidfd from birth. */
#ifndef AP_SPAWN_H
#define AP_SPAWN_H

/* The step at which a child failed before its program ran. */
enum { AP_STEP_PARENT = 0, AP_STEP_SETUP = 1, AP_STEP_CHDIR = 2, AP_STEP_EXEC = 3 };

enum {
    AP_SPAWN_CLOSE_FDS = 1,       /* close every descriptor above 2 that is not in pass_fds */
    AP_SPAWN_RESTORE_SIGNALS = 2, /* SIGPIPE and SIGXFSZ back to SIG_DFL, which Python ignores */
    AP_SPAWN_SETSID = 4           /* call setsid(2) */
};

/* A program that was started. ap_spawn writes it before it returns, since a Python signal handler may raise right after
 * that. */
typedef struct {
    int pid;   /* 0 until it was started */
    int pidfd; /* once there is a pid; -1: none */
    int held;  /* the reaper holds the pidfd, which is tracked as after ap_reaper_add */
} ap_program;

/* Start a program as vfork(2) and execve(2) do, without at-fork hooks, and hold its pidfd in the reaper. Lists of strings
 * are one block in which each string ends with a NUL:
 *   paths     what to try to execute, in this order
 *   env       read if env_count >= 0; -1: the environment of this process
 *   cwd       NULL: the caller's
 *   pass_fds  ascending; made inheritable
 *   in, out, err  become the child's 0, 1, 2; -1: the caller's
 *   umask     -1: the caller's
 *   pgid      for setpgid(2), 0 for a group of its own; -1: the caller's
 *   flags     AP_SPAWN_*
 * Returns 0. Where there is no descriptor for a pidfd (EMFILE, ENFILE), or the kernel knows none (before 5.2), the program
 * has none, and where the reaper cannot hold it (epoll_ctl(2)) it is open and not held.
 * On failure returns -(step << 16 | errno) with a step of AP_STEP_*: there is no child, no zombie and no descriptor, and
 * *ret_program is as it was.
 * ENOSYS, EPERM, EACCES, EINVAL at AP_STEP_PARENT: clone with CLONE_PIDFD (Linux 5.2) is not available. */
int ap_spawn(ap_program *ret_program, int reaper, const char *paths, int path_count, const char *argv, int arg_count,
             const char *env, int env_count, const char *cwd, const int *pass_fds, int pass_count, int in, int out, int err,
             int umask, int pgid, int flags);

#endif
