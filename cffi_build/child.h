/* What a freshly forked child asks of the kernel about itself. Every function returns -errno on failure. */
#ifndef AP_CHILD_H
#define AP_CHILD_H

/* Return a bit mask (bit n - 1 for signal n) of the signals that have a handler, C or Python: neither SIG_DFL nor SIG_IGN. */
unsigned long long ap_caught_signals(void);

/* Return whether `signal` is ignored. */
int ap_is_ignored(int signal);

/* Block the signals in `mask` (bit n - 1 for signal n), and no others, in this thread; return which were blocked before.
 * libc keeps two for itself, which stay as they are. */
unsigned long long ap_set_signal_mask(unsigned long long mask);

/* Ask for `signal` when the thread that forked this process ends; 0 asks for none. See PR_SET_PDEATHSIG in prctl(2).
 * `gate` is a socket whose other end the parent holds, and nobody else. Returns 1, or 0 if the parent had died before: its
 * descriptors are closed before its children get their signals. getppid() does not tell, between two PID namespaces. */
int ap_set_pdeathsig(int signal, int gate);

/* Cut this process off from every epoll descriptor that it inherited, without changing what its parent watches: each is
 * replaced in place by /dev/null, so that its number can neither reach the parent's epoll nor be reused under an object
 * that still knows it. `probe` is an open descriptor that can be polled and is in none of them: it tells them from others.
 * Returns how many there were. */
int ap_detach_epolls(int probe);

#endif
