/* How a forked child learns and changes its signal handlers, its signal mask and its death signal. Every function returns
 * -errno on failure. */
#ifndef AP_CHILD_H
#define AP_CHILD_H

/* Return a bit mask (bit n - 1 for signal n) of the signals that have a handler, C or Python: neither SIG_DFL nor
 * SIG_IGN. */
unsigned long long ap_caught_signals(void);

/* Return whether `signal` is ignored. */
int ap_is_ignored(int signal);

/* Save the action of `signal`, for the next function. Call it right before Python's signal.signal(). */
void ap_keep_handler(int signal);

/* Learn the address of Python's handler, which `signal` has now. Then restore the saved action if it ignores the signal, or
 * if its handler is a C library's. Returns 0: not restored; 1: restored; 2: restored, and the signal is ignored. */
int ap_put_back_handler(int signal);

/* Return whether the handler of `signal` is Python's, as learnt by the function above, or a loop's. Any other is a C
 * library's. */
int ap_is_handler_of_loop(int signal);

/* Block the signals in `mask` (bit n - 1 for signal n), and no others, in this thread; return which were blocked before.
 * The two signals that libc uses itself stay as they are: os.setuid() in another thread holds the GIL and waits until this
 * thread has handled one of them. */
unsigned long long ap_set_signal_mask(unsigned long long mask);

/* Ask for `signal` when the thread that forked this process ends; 0 asks for none. See PR_SET_PDEATHSIG in prctl(2).
 * `gate` is a socket whose other end the parent holds, and nobody else. Returns 1, or 0 if the parent had died before: its
 * descriptors are closed before its children get their signals. getppid() is no answer: it is 0 for a parent in another PID
 * namespace. */
int ap_set_pdeathsig(int signal, int gate);

#endif
