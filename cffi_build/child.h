/* What a freshly forked child asks of the kernel about itself. Every function returns -errno on failure. */
#ifndef AP_CHILD_H
#define AP_CHILD_H

/* Return a bit mask (bit n - 1 for signal n) of the signals that have a handler, C or Python: neither SIG_DFL nor SIG_IGN. */
unsigned long long ap_caught_signals(void);

/* Return whether `signal` is ignored. */
int ap_is_ignored(int signal);

/* Keep in mind how `signal` is handled, for the next call: signal.signal of Python is about to be called for it. */
void ap_keep_handler(int signal);

/* Learn Python's handler by `signal`, which has it now, and put back who was there at the last call if that was neither Python
 * nor a loop nor nobody. Returns 0, 1 if it was put back, 2 if that is to ignore the signal. */
int ap_put_back_handler(int signal);

/* Return whether the handler of `signal` is Python's, which the call above has learnt, or a loop's. Any other is a C library's. */
int ap_is_handler_of_loop(int signal);

/* Block the signals in `mask` (bit n - 1 for signal n), and no others, in this thread; return which were blocked before.
 * libc keeps two for itself, which stay as they are. */
unsigned long long ap_set_signal_mask(unsigned long long mask);

/* Ask for `signal` when the thread that forked this process ends; 0 asks for none. See PR_SET_PDEATHSIG in prctl(2).
 * `gate` is a socket whose other end the parent holds, and nobody else. Returns 1, or 0 if the parent had died before: its
 * descriptors are closed before its children get their signals. getppid() does not tell, between two PID namespaces. */
int ap_set_pdeathsig(int signal, int gate);

#endif
