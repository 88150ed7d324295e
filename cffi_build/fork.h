/* Fork a child that never returns into its parent's code, and lose neither child nor descriptor if the parent is
 * interrupted.
 *
 * Python's signal handlers run between any two bytecodes, and may raise. So no bytecode runs between the fork and the
 * child's first function, and none after its last one. What was made is written to an ap_child in C before a function
 * returns. Python objects are passed by their id(), and must live until the function returns. */
#ifndef AP_FORK_H
#define AP_FORK_H

/* A child that is being made. */
typedef struct {
    int pid;   /* 0 until it was forked */
    int pidfd; /* -1: none */
    int gate;  /* our end of its gate, -1: none; tracked, and held by the reaper as after ap_reaper_open_gate */
} ap_child;

/* Make a gate (see ap_reaper_open_gate) and fork, by calling `fork` as os.fork, or by ap_fork if it is 0, all signals
 * blocked meanwhile, one thread after the other. The child calls live(its end of the gate, the signal mask of before) and
 * ends. The parent's copy of that end is closed. Returns 0; -errno; or 1 if `fork` has raised something: it is appended to
 * the list `failures`. On failure there is no child, and child->gate may be open. */
int ap_child_fork(ap_child *child, int reaper, int number, unsigned long long fork, unsigned long long live,
                  unsigned long long failures);

/* Do what ap_reaper_add does for a child that waits at its gate, then release it. Before that it cannot exit. */
int ap_child_release(ap_child *child, int reaper);

/* Kill and reap a child that nobody watches, if there is one, and close what there is of it. */
void ap_child_undo(ap_child *child, int reaper);

/* Close the gate. A child that still waits there exits. */
void ap_child_close_gate(ap_child *child);

/* In a forked child: set the exit code that ap_live_child ends it with; -N for death by signal N. */
void ap_set_exit_code(int code);

/* In a forked child: note which socket `fd` is, on which it will send that it is ready. */
void ap_note_ready_fd(int fd);

/* Return whether `fd` is still that socket. A child may have closed all descriptors, and opened others of the same
 * numbers. */
int ap_is_ready_fd(int fd);

/* In any forked child: close the copies of tracked descriptors, put SIGCHLD back to what it was before our handler, and make
 * the lock new by which forks take turns: a thread that does not exist here may hold it. */
void ap_after_fork_in_child(void);

#endif
