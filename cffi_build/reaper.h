/* The reaper: one epoll descriptor that holds many pidfds and reaps what has ended, a batch in a call.
 * Every function returns -errno on failure and then has changed nothing. Thread-safe but for ap_batch, which has one user. */
#ifndef AP_REAPER_H
#define AP_REAPER_H

enum { AP_BATCH = 64 };

enum {
    AP_ADD_PEEK = 1,      /* show the status and leave the zombie (WNOWAIT) */
    AP_ADD_CHECK_CHILD = 2 /* refuse with -ECHILD what is not our child: one more waitid */
};

/* What one ap_reaper_reap has reaped and nobody has been told yet. */
typedef struct {
    int count;
    int woken; /* the descriptor of ap_reaper_add_wake was written to */
    ap_exit exits[AP_BATCH];
} ap_batch;

/* Open a reaper: an epoll descriptor, close-on-exec, readable while something in it has ended. To be closed by ap_close_tracked_fd,
 * which a forked child does with its copy of it, and with those of all pidfds that a reaper holds. */
int ap_reaper_open(void);

/* Open a pidfd for `pid` and hold it in the reaper; `flags` is AP_ADD_*. Returns the pidfd, which the reaper's user owns
 * until ap_reaper_remove or ap_batch_release closes it. -ESRCH: `pid` was reaped, or never was. -EINVAL: `pid` is no
 * process, or the kernel is older than 5.4 and cannot wait by pidfd. */
int ap_reaper_add(int reaper, int pid, int flags);

/* The same for a pidfd that is already open. Returns 0; on failure the pidfd stays open. */
int ap_reaper_adopt(int reaper, int pid, int pidfd, int flags);

/* Change the AP_ADD_PEEK flag of a held pidfd. Tells again if it has ended already. */
int ap_reaper_modify(int reaper, int pid, int pidfd, int flags);

/* Hold a descriptor that is no pidfd: each write to it makes the reaper readable and sets batch->woken. It stays its
 * owner's. */
int ap_reaper_add_wake(int reaper, int fd);

/* Make a gate for a child that is to be forked: a socket pair, both ends close-on-exec. The reaper holds ours, which does not
 * block, until it has told once of a byte or the end of the stream, as an exit whose pid is minus `number` (below 2^30).
 * Returns ours << 32 | the child's; close them by ap_close_tracked_fd and close. */
long long ap_reaper_open_gate(int reaper, int number);

/* Let go of a pidfd and close it. It is closed even if the reaper did not hold it. */
void ap_reaper_remove(int reaper, int pidfd);

/* Reap what has ended, up to AP_BATCH processes, and write each to batch->exits. Returns how many there are.
 * Their pidfds are no longer in the reaper, and open until ap_batch_release. If the batch was not released since the last
 * call, it is left as it is, and its count returned: what was reaped stays until somebody has seen it.
 * A pidfd that is readable with nothing to reap (a foreign tracer), or whose status somebody else took and the kernel has
 * not published yet, stays in the reaper, and tells again when that changes. */
int ap_reaper_reap(int reaper, ap_batch *batch);

/* Close the pidfds of a batch and empty it. */
void ap_batch_release(ap_batch *batch);

#endif
