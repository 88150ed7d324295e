/* What parent and child share while a program is started: see spawn.c and spawn_child.c. cffi does not read this file. */
#ifndef AP_LAUNCH_H
#define AP_LAUNCH_H

#include <stdint.h>

/* In memory that both share, as after vfork(2). */
struct launch {
    char **paths, **argv, **env;
    const char *cwd;
    const int *pass_fds;
    int path_count, pass_count, stdio[3], umask, pgid, flags;
    uint64_t old_mask;
    int reset_handlers; /* CLONE_CLEAR_SIGHAND is not available */
    volatile int error; /* written by the child if its program cannot run */
    volatile int step;
};

/* Block or unblock every signal, those that libc keeps for itself among them, which sigprocmask would spare. */
void ap_set_mask(uint64_t mask, uint64_t *ret_old);

/* Be the child: run the program of a struct launch. Does not return. */
int ap_run_child(void *launch);

#endif
