/* Fork a child that never comes back into its parent's code, and know of it whatever happens in the parent meanwhile.
 *
 * Python's signal handlers run, and may raise, between any two bytecodes. So no bytecode runs between the fork and the first
 * function of the child, none after its last one, and what has been made is noted in C before a function returns.
 * Python objects are given by their id(), and must live until the function returns. */
#ifndef AP_FORK_H
#define AP_FORK_H

/* A child in the making. */
typedef struct {
    int pid;   /* 0 until it was forked */
    int pidfd; /* -1: none */
    int gate;  /* our end of its gate, -1: none; tracked, and held by the reaper as after ap_reaper_open_gate */
} ap_child;

/* Make a gate (see ap_reaper_open_gate) and fork, by calling `fork` as os.fork, or by ap_fork if it is 0, all signals blocked
 * meanwhile, one thread after the other. The child calls live(its end of the gate, the signal mask of before) and ends.
 * The parent's copy of that end is closed. Returns 0; -errno; or 1 if `fork` has raised something: it is appended to the list
 * `failures`. On failure there is no child, and child->gate may be open. */
int ap_child_fork(ap_child *child, int reaper, int number, unsigned long long fork, unsigned long long live,
                  unsigned long long failures);

/* Do what ap_reaper_add does for a child that stands at its gate, then let it out: it cannot be reaped before. */
int ap_child_release(ap_child *child, int reaper);

/* Kill and reap a child that nobody watches, if there is one, and close what there is of it. */
void ap_child_undo(ap_child *child, int reaper);

/* Close the gate. A child that still stands there ends. */
void ap_child_close_gate(ap_child *child);

/* In a forked child: have it exit with `code`, or for a negative one be killed by that signal, whatever happens from now on. */
void ap_set_exit_code(int code);

/* In a forked child: note that it is to say on the socket `fd` that it is ready. */
void ap_note_ready_fd(int fd);

/* Return whether `fd` is still that socket. A child may have closed all descriptors, and opened others of the same numbers. */
int ap_is_ready_fd(int fd);

/* In any forked child: close the copies of tracked descriptors, put SIGCHLD back to what it was before our handler, and make
 * the lock new by which forks take turns: a thread that does not exist here may hold it. */
void ap_after_fork_in_child(void);

#endif
