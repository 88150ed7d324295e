/* The epoll descriptors that a forked child has inherited. A change that the child makes in one is a change for its parent,
 * too. Epolls that a fork hook has made in the child are the child's own. Every function returns -errno on failure. */
#ifndef AP_EPOLLS_H
#define AP_EPOLLS_H

/* Register ap_prepare_fork by pthread_atfork(3), so that each fork() of this process calls it right before it forks.
 * Returns 0. */
int ap_hook_forks(void);

/* Announce that the next fork of this thread makes a child for us: the hook then notes and marks all epoll descriptors, so
 * that the child knows which it has inherited. `probe` is an open descriptor that can be polled and is in no epoll; -1
 * cancels. */
void ap_expect_fork(int probe);

/* The hook. Call it before a clone(2), which calls no hooks. */
void ap_prepare_fork(void);

/* In a forked child: return whether its parent had announced it. */
int ap_is_expected_child(void);

/* Note and mark all epoll descriptors of this process now. `probe` as above. */
void ap_note_epolls(int probe);

/* Replace each noted epoll that is still open by an inert file, under the same number. Closing it would not do: an object
 * that still uses the number would then use whatever file gets it next. Returns how many there were; -ENOMEM if they could
 * not be noted. */
int ap_detach_epolls(int probe);

/* Open an inert file at the free number `fd`. It can be polled, and never becomes ready. */
void ap_occupy(int fd);

#endif
