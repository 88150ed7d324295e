/* The epoll descriptors that a forked child has inherited. What a child changes in one changes for its parent, too; but those
 * that a fork hook has made in the child are its own. Every function returns -errno on failure. */
#ifndef AP_EPOLLS_H
#define AP_EPOLLS_H

/* Have the hook below called by each fork(2) of this process, right before it. Returns 0. */
int ap_hook_forks(void);

/* Say that this thread is about to fork a child for us: the hook is to note and mark the epoll descriptors that there are then,
 * so that the child knows them. `probe` is an open descriptor that can be polled and is in no epoll; -1 takes it back. */
void ap_expect_fork(int probe);

/* Do what the hook does, for a clone(2), which calls no hooks. */
void ap_prepare_fork(void);

/* In a forked child: return whether its parent had said so, in the thread that forked it. */
int ap_is_expected_child(void);

/* Note and mark all epoll descriptors of this process now. `probe` as above. */
void ap_note_epolls(int probe);

/* Replace in place each of those that were noted and are still there, by something inert: so that its number can neither reach
 * the parent's epoll nor be reused under an object that still knows it. Returns how many there were; -ENOMEM if they could not
 * be noted. */
int ap_detach_epolls(int probe);

/* Put something inert at `fd`, which is free. It can be polled, and nothing ever happens to it. */
void ap_occupy(int fd);

#endif
