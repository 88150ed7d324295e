/* One function per system call on a pidfd. Every function returns -errno on failure and then leaves its outputs alone. */
#ifndef AP_PIDFD_H
#define AP_PIDFD_H

/* Where the status in an ap_exit comes from. */
enum {
    AP_SOURCE_REAPED = 0,     /* waitid reaped it */
    AP_SOURCE_PEEKED = 1,     /* waitid showed it (WNOWAIT); the zombie is left for its owner */
    AP_SOURCE_RECOVERED = 2,  /* other code reaped it; PIDFD_GET_INFO has the status */
    AP_SOURCE_LOST = 3,       /* other code reaped it, and the status is unknown; status is 0 */
    AP_SOURCE_PENDING = 4,    /* ended, and not ours to reap; the status may come when its parent reaps it */
    AP_SOURCE_GATE_READY = 5, /* not an exit: a forked child has sent at its gate that it is ready */
    AP_SOURCE_GATE_CLOSED = 6 /* not an exit: a forked child has closed its gate, and has sent nothing */
};

/* How one process ended. rusage is the kernel's own layout: utime s, us, stime s, us, then 14 counters. */
typedef struct {
    int pid;    /* of a gate: minus its number */
    int pidfd;  /* -1: none, or not to be closed with the batch */
    int status; /* a wait status, as waitpid(2) gives it */
    int source; /* AP_SOURCE_* */
    long rusage[18];
} ap_exit;

/* Open a pidfd, close-on-exec, for the process `pid`. Linux 5.3. See pidfd_open(2). */
int ap_pidfd_open(int pid);

/* Return the inode number of a pidfd, which since Linux 6.9 is its process's own and no other's; 0 if there is none. */
long long ap_pidfd_inode(int pidfd);

/* The same for a pid. 0, too, if there is no such process, or no descriptor left. */
long long ap_pid_inode(int pid);

/* Wait as waitid(2) does, children of every kind included (__WALL is added to `options`), with the child's rusage.
 * Returns 1 with pid, status, source and rusage of *ret_exit written, or 0 when WNOHANG found nothing.
 * idtype 1 is P_PID, 3 is P_PIDFD (Linux 5.4; EINVAL before). */
int ap_waitid(int idtype, int id, int options, ap_exit *ret_exit);

/* Send a signal to the process that the pidfd names, and to no other. Linux 5.1. `flags`: 4 signals its process group
 * (Linux 6.9, EINVAL before). ESRCH: it was reaped. See pidfd_send_signal(2). */
int ap_pidfd_send_signal(int pidfd, int signal, unsigned int flags);

/* Ask for the wait status of a process that any code has reaped. Linux 6.15.
 * Returns 1 with *ret_status written; 0 if the kernel has not published it: the process was not reaped yet.
 * -ENOTTY, -EINVAL, -ESRCH: this kernel (before 6.11, 6.13, 6.15) does not keep it. */
int ap_pidfd_get_exit(int pidfd, int *ret_status);

/* Return the pid of a process in the PID namespace of the caller. Linux 6.13.
 * -ENOTTY, -EINVAL: an older kernel. -ESRCH: it was reaped. -EREMOTE: it has no pid in that namespace. */
int ap_pidfd_get_pid(int pidfd);

/* Try whether a status can be recovered here: make a child that sends no signal, reap it, and ask.
 * Returns 1 or 0; -errno when clone(2) with CLONE_PIDFD is refused. */
int ap_probe_exit_info(void);

#endif
