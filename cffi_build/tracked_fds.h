/* The descriptors that a forked child closes: reapers, the pidfds in them, gates. They are tracked in C, since in the child
 * a look at a Python object copies its page. Thread-safe. */
#ifndef AP_TRACKED_FDS_H
#define AP_TRACKED_FDS_H

/* Track `fd`: a forked child will close its copy. Numbers from 2^20 on are not tracked, and have close-on-exec alone; the
 * kernel's default (fs.nr_open) does not allow them. */
void ap_track_fd(int fd);

/* Return whether `fd` is tracked. */
int ap_is_tracked_fd(int fd);

/* Do not track `fd` any more: other code has closed it. */
void ap_untrack_fd(int fd);

/* Untrack `fd`, and close it. In this order: a child that is forked in between may keep a copy, but closes no other file
 * that gets this number. */
void ap_close_tracked_fd(int fd);

/* Do the same for many descriptors, and sort them. Consecutive numbers are closed by one call (Linux 5.9). */
void ap_close_tracked_fds(int *fds, int count);

/* In a forked child: close the copies of all tracked descriptors. The parent's epolls are not changed. */
void ap_close_inherited(void);

#endif
