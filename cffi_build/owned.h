/* The descriptors of which a forked child closes its copies. Known in C: a look at each of many Python objects would copy the
 * pages of all of them. Thread-safe. */
#ifndef AP_OWNED_H
#define AP_OWNED_H

/* Have a forked child close its copy of `fd`. Numbers from 2^20 on, which the kernel's default (fs.nr_open) does not allow, are
 * not noted: close-on-exec is all that they have. */
void ap_own(int fd);

/* Return whether a forked child would. */
int ap_owns(int fd);

/* Take that back: somebody else has closed it. */
void ap_disown(int fd);

/* Take that back, and close `fd`. In this order: a child that is forked in between may keep a copy, but closes nobody else's. */
void ap_close_owned(int fd);

/* Do that for many descriptors, and put them in order. Such that follow one another are closed by one call (Linux 5.9). */
void ap_close_all_owned(int *fds, int count);

/* In a forked child: close the copies of all, and put SIGCHLD back to what it was before our handler. What the parent's epoll
 * descriptors watch stays as it is. */
void ap_let_go(void);

#endif
