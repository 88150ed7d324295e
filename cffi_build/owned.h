/* The descriptors that are ours alone, of which a forked child closes its copies. Thread-safe, and callable in that child. */
#ifndef AP_OWNED_H
#define AP_OWNED_H

/* Have a forked child close its copy of `fd`. Those above the first 2^20, which no default limit allows, are not noted: close-on-exec
 * is all that they have. */
void ap_own(int fd);

/* Take that back, and close `fd`. In this order: a child that is forked in between may keep a copy, but closes nobody else's. */
void ap_close_owned(int fd);

/* In a forked child: close the copies of all, and put SIGCHLD back to what it was before our handler. What the parent's epoll
 * descriptors watch stays as it is. */
void ap_let_go(void);

#endif
