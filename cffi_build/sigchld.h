/* A SIGCHLD handler that wakes one descriptor, then calls whoever was installed before; and reaping by pid.
 * Thread-safe but for ap_pids and ap_batch, which have one user each. Every function returns -errno on failure. */
#ifndef AP_SIGCHLD_H
#define AP_SIGCHLD_H

/* The children that one loop watches by pid. Zeroed memory is an empty one. */
typedef struct {
    int count;
    int capacity;
    int *keys; /* sorted; pid * 2 + 1 for those to be left unreaped, else pid * 2 */
    unsigned int hints_seen;
    int deferred; /* ap_sigchld_reap has left something to be looked for */
} ap_pids;

/* Add a pid, or change its `peek` (leave the zombie). -ENOMEM. */
int ap_pids_add(ap_pids *pids, int pid, int peek);

/* Remove a pid; returns whether it was there. */
int ap_pids_remove(ap_pids *pids, int pid);

/* Free the memory. */
void ap_pids_clear(ap_pids *pids);

/* Return the descriptor that the handler wakes: an eventfd, close-on-exec, one for the process, made by the first call and
 * never closed. Nobody reads it: each wake is an edge for every epoll that holds it with EPOLLET. */
int ap_sigchld_open(void);

/* Wake it as the handler does. */
void ap_sigchld_wake(void);

/* Put the handler in front of whoever is there now, with the mask, SA_RESTART and SA_NOCLDSTOP that a handler there has
 * asked for; with both flags if there is none. Returns 1, or 0 if it is there already. */
int ap_sigchld_install(void);

/* Put back whoever was there before. Returns 1, or 0 if the handler is not in front: then it is not ours to change. */
int ap_sigchld_restore(void);

/* Have the handler itself reap `pid`, for whom no loop is left to do it. -ENOSPC: there are too many. */
int ap_sigchld_abandon(int pid);

/* Reap the abandoned children that have ended; returns how many are left. */
int ap_sigchld_reap_abandoned(void);

/* In a forked child: restore, close the copy of the descriptor, and forget the abandoned: they are its parent's. */
void ap_sigchld_after_fork(void);

/* Write to ret_text what SIGCHLD is set to: "SIG_DFL", "SIG_IGN", "ours", or the handler's library or address (after
 * "ours, and behind it " if ours calls it), and " with SA_NOCLDWAIT" if that is on. Returns 0. */
int ap_sigchld_describe(char *ret_text, int size);

/* Reap the watched children that have ended, up to AP_BATCH, write them to batch->exits, and remove them from `pids`.
 * Returns how many there are; AP_BATCH means: call again. As ap_reaper_reap, it leaves a batch that was not released.
 * First those are asked for that the signals named, which costs nothing for the others that live. Signals merge, so that not
 * all were named: pids->deferred is then set, and the next call, to be made soon, looks for what is dead by peeking, each exit
 * at the cost of one walk over all children in the kernel. If `scan`, or if all that finds nothing, or meets a zombie that is
 * not ours, or somebody else has reaped, each child is asked: so those are found that others have reaped, as AP_SOURCE_LOST. */
int ap_sigchld_reap(ap_pids *pids, int scan, ap_batch *batch);

#endif
