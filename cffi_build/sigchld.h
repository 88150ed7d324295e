/* A SIGCHLD handler: it notes the child that a signal names, wakes one descriptor, then calls the handler that it has
 * replaced. Thread-safe. Every function returns -errno on failure. */
#ifndef AP_SIGCHLD_H
#define AP_SIGCHLD_H

/* What is noted if a signal names no child that has ended. Neither is the pid of a child. */
enum {
    AP_NAME_NOBODY = 0, /* no child has ended: sent by kill(), or a child has stopped */
    AP_NAME_UNKNOWN = 1 /* not known: another handler has called ours, or too many signals came */
};

/* Return the descriptor that the handler wakes: an eventfd, close-on-exec, one for the process, made by the first call and
 * never closed. Nobody reads it: each wake is an edge for every epoll that holds it with EPOLLET. */
int ap_sigchld_open(void);

/* Note a name and wake the descriptor, as the handler does. */
void ap_sigchld_add_name(int name);

/* Return how many names were noted until now. */
unsigned int ap_sigchld_count_names(void);

/* Read the next name, of which *seen have been read before. Returns whether there was one. */
int ap_sigchld_next_name(unsigned int *seen, int *ret_name);

enum { AP_INSTALL_UNCHANGED = 0, AP_INSTALL_DONE = 1, AP_INSTALL_RESUMED = 2 };

/* Install the handler in front of the present one, with that one's mask, SA_RESTART and SA_NOCLDSTOP; with both flags if
 * there is none. After 1,000 signals that have named no child, the handler pauses: it restores the previous action, but not
 * SIG_IGN and SA_NOCLDWAIT. With `resume` this function ends the pause and counts from 0. Returns AP_INSTALL_*. */
int ap_sigchld_install(int resume);

/* Restore the previous action. Returns 1, or 0 if our handler is not in front: then another library's is, and stays. */
int ap_sigchld_restore(void);

/* Have the handler itself reap `pid`, whose loop is closed. -ENOSPC: there are too many. */
int ap_sigchld_abandon(int pid);

/* Undo ap_sigchld_abandon: the handler does not reap `pid` any more. Returns whether it would have. */
int ap_sigchld_claim(int pid);

/* Reap the abandoned children that have ended; returns how many are left. */
int ap_sigchld_reap_abandoned(void);

/* In a forked child: restore, close the copy of the descriptor, and forget the abandoned: they are its parent's. */
void ap_sigchld_after_fork(void);

/* Write to ret_text what SIGCHLD is set to: "SIG_DFL", "SIG_IGN", "ours", or the handler's library or address, and
 * " with SA_NOCLDWAIT" if that is on. After "ours", where it is not a plain SIG_DFL, ", and behind it " and what was there
 * before, whose flags have no effect there. Returns 0. */
int ap_sigchld_describe(char *ret_text, int size);

#endif
