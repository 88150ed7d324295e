/* The reaper: one epoll descriptor that holds many pidfds and reaps what has ended, a batch in a call. Every function
 * returns -errno on failure and then has changed nothing. Thread-safe but for ap_batch, which has one user. */
#ifndef AP_REAPER_H
#define AP_REAPER_H

enum { AP_BATCH = 64 };

enum {
    AP_ADD_PEEK = 1,      /* show the status and leave the zombie (WNOWAIT) */
    AP_ADD_CHECK_CHILD = 2 /* refuse with -ECHILD what is not our child: one more waitid */
};

/* What ap_reaper_reap has reaped and nobody has been notified of yet. */
typedef struct {
    int count;
    int woken; /* the descriptor of ap_reaper_add_wake was written to */
    ap_exit exits[AP_BATCH];
} ap_batch;

/* Open a reaper: an epoll descriptor, close-on-exec, readable while a process in it has ended. It is tracked, as are all
 * pidfds in it (see tracked_fds.h): close it by ap_close_tracked_fd. */
int ap_reaper_open(void);

/* Open a pidfd for `pid` and hold it in the reaper; `flags` is AP_ADD_*. Returns the pidfd, which the reaper's user owns
 * until ap_reaper_remove or ap_batch_release closes it. -ESRCH: `pid` was reaped, or never was. -EINVAL: `pid` is no
 * process, or the kernel is older than 5.4 and cannot wait by pidfd. */
int ap_reaper_add(int reaper, int pid, int flags);

/* The same for a pidfd that is already open. Returns 0; on failure the pidfd stays open. */
int ap_reaper_adopt(int reaper, int pid, int pidfd, int flags);

/* Change the AP_ADD_PEEK flag of a held pidfd. If the process has ended, it is reported again. */
int ap_reaper_modify(int reaper, int pid, int pidfd, int flags);

/* Hold a descriptor that is no pidfd: each write to it makes the reaper readable and sets batch->woken. It stays its
 * owner's. */
int ap_reaper_add_wake(int reaper, int fd);

/* Make a gate for a child that is to be forked: a socket pair, both ends close-on-exec. The reaper holds ours, which is
 * non-blocking. It reports the first byte or the end of the stream once, as an exit whose pid is minus `number` (below
 * 2^30).
 * Returns ours << 32 | the child's; close them by ap_close_tracked_fd and close. */
long long ap_reaper_open_gate(int reaper, int number);

/* Remove a pidfd from the reaper and close it. It is closed even if the reaper did not hold it. */
void ap_reaper_remove(int reaper, int pidfd);

/* Reap what has ended, up to AP_BATCH processes, and write each to batch->exits. Returns how many there are.
 * Their pidfds are no longer in the reaper, and open until ap_batch_release. If the batch was not released since the last
 * call, it stays as it is, and its count is returned: no exit is overwritten before it was read.
 * A pidfd stays in the reaper, and is reported later, if it is readable with nothing to reap (a tracer holds the zombie), or
 * if another waitpid() took the status and the kernel has not published it yet. */
int ap_reaper_reap(int reaper, ap_batch *batch);

/* Close the pidfds of a batch and empty it. */
void ap_batch_release(ap_batch *batch);

#endif
