/* The children that one loop watches by pid, and three ways to reap those that have ended.
 *
 * Signals merge: a child that ends while a SIGCHLD is pending sends none of its own. So after each signal, a child may have
 * ended that no signal has named. What it costs to find out: waitid(P_ALL) walks the kernel's list of all children, oldest
 * first, up to the first zombie: 0.1 us for each. waitid(P_PID) asks for one child: 0.5 to 1 us.
 *
 * One user each; zeroed memory is an empty one. Those that reap write to batch->exits, up to AP_BATCH, remove what they have
 * reaped, and return how many there are; AP_BATCH means: call again. As ap_reaper_reap, they add to what was not
 * released. */
#ifndef AP_PIDS_H
#define AP_PIDS_H

enum {
    AP_DOUBT_LATER = 1, /* a signal named a child that is not watched: one of ours may have merged with it */
    AP_DOUBT_NOW = 2,   /* a signal named one of ours, or an unknown child: others have probably merged with it */
    AP_DOUBT_ALL = 4    /* each must be asked for: other code reaps, or another's zombie hides younger ones from P_ALL */
};

typedef struct {
    int count;
    int capacity;
    int *keys; /* sorted; pid * 2 + 1 for those to be left unreaped, else pid * 2 */
    unsigned int names_seen;
    int doubt; /* AP_DOUBT_*; for its user to clear */
} ap_pids;

/* Add a pid, or change its `peek` (leave the zombie). -ENOMEM. */
int ap_pids_add(ap_pids *pids, int pid, int peek);

/* Remove a pid; returns whether it was there. */
int ap_pids_remove(ap_pids *pids, int pid);

/* Free the memory. */
void ap_pids_clear(ap_pids *pids);

/* Reap those that signals have named since the last call: it costs the others nothing. Adds to
 * pids->doubt. */
int ap_pids_reap_named(ap_pids *pids, ap_batch *batch);

/* Reap by waitid(P_ALL), up to the first zombie that is not ours: each costs one walk over older children. Adds to
 * pids->doubt. */
int ap_pids_reap_first(ap_pids *pids, ap_batch *batch);

/* Ask for each by a system call. This also finds those that other code has reaped, as AP_SOURCE_LOST. */
int ap_pids_reap_all(ap_pids *pids, ap_batch *batch);

#endif
