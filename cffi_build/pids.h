/* The children that one loop watches by pid, and three ways to reap those that have ended.
 *
 * Signals merge: a child that ends while a SIGCHLD is pending sends none of its own. So after each signal there is doubt
 * whether somebody has ended whom no signal has named. Facts on what it costs to find out:
 * waitid(P_ALL) walks the kernel's list of all children, oldest first, up to the first zombie: 0.1 us for each. Whoever asks
 * for one child with waitid(P_PID) pays for that one only: 0.5 to 1 us.
 *
 * One user each; zeroed memory is an empty one. Those that reap write to batch->exits, up to AP_BATCH, remove what they have
 * reaped, and return how many there are; AP_BATCH means: call again. As ap_reaper_reap, they add to what was not released. */
#ifndef AP_PIDS_H
#define AP_PIDS_H

enum {
    AP_DOUBT_LATER = 1, /* a signal named somebody who is not among the watched: one of ours may have merged with it */
    AP_DOUBT_NOW = 2,   /* a signal named one of ours, or whom it named is not known: others have probably merged with it */
    AP_DOUBT_ALL = 4    /* each must be asked for: somebody else reaps, or a zombie that is not ours hides the younger ones */
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

/* Reap those that no foreign zombie hides: each costs one walk over the older children in the kernel. Adds to pids->doubt. */
int ap_pids_reap_first(ap_pids *pids, ap_batch *batch);

/* Ask for each, one system call for each: so those are found, too, that others have reaped, as AP_SOURCE_LOST. */
int ap_pids_reap_all(ap_pids *pids, ap_batch *batch);

#endif
