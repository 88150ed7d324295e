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

/* What to start. Lists of strings are one block in which each string ends with a NUL. */
typedef struct {
    const char *paths; /* what to try to execute, in this order */
    const char *argv;
    const char *envp;  /* read if envc >= 0 */
    const char *cwd;   /* NULL: the caller's */
    const int *pass_fds; /* ascending; made inheritable */
    int path_count;
    int argc;
    int envc;          /* -1: the environment of this process */
    int pass_count;
    int stdio[3];      /* becomes the child's 0, 1, 2; -1: the caller's */
    int umask;         /* -1: the caller's */
    int pgid;          /* for setpgid(2), 0 for a group of its own; -1: the caller's */
    int flags;         /* AP_SPAWN_* */
} ap_program;

/* Start a program as vfork(2) and execve(2) do, close-on-exec races and at-fork hooks spared, and hold its pidfd in the
 * reaper. Returns its pid, *ret_pidfd its pidfd, owned as after ap_reaper_add. On failure returns -errno, *ret_step says
 * where (AP_STEP_*), and there is no child, no zombie and no descriptor.
 * -ENOSYS, -EPERM, -EACCES, -EINVAL at AP_STEP_PARENT: clone with CLONE_PIDFD (Linux 5.2) is not to be had here. */
int ap_spawn(int reaper, const ap_program *program, int *ret_pidfd, int *ret_step);

#endif
