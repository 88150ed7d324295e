/* SIGCHLD handlers as of other libraries: some call the previous handler, some do not. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

enum { HANDLERS = 4 };

/* Install handler `which` (0 and 1 call the previous handler, 1 without a siginfo_t; 2 and 3 do not), with all signals
 * blocked in it. Returns 0, or -1. */
int install_handler(int which);

/* Return how often handler `which` was called. */
int count_calls(int which);

/* Return whether `signal` was blocked in the last call of any. */
int was_blocked(int signal);

/* Have handler `which` installed with these flags, too. */
void set_flags(int which, int flags);

/* Set SIGCHLD to SIG_DFL with these flags, as a C program may. Returns 0, or -1. */
int set_default(int flags);

/* Return the flags that SIGCHLD has now. */
int get_flags(void);

/* Set errno, get a SIGCHLD in this thread, and return what errno is then. */
int errno_after_signal(int value);

static struct sigaction before[HANDLERS];
static _Atomic(int) calls[HANDLERS];
static int more_flags[HANDLERS];
static sigset_t mask;

static void handle(int which, int signal, siginfo_t *info, void *context)
{
    atomic_fetch_add(&calls[which], 1);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &mask);
    errno = EDOM; /* as after failed system calls */
    if (which > 1)
        return;
    if (before[which].sa_flags & SA_SIGINFO)
        before[which].sa_sigaction(signal, which == 0 ? info : (siginfo_t *)1, context);
    else if (before[which].sa_handler != SIG_DFL && before[which].sa_handler != SIG_IGN)
        before[which].sa_handler(signal);
}

#define HANDLER(which)                                                                                                      \
    static void handler_##which(int signal, siginfo_t *info, void *context)                                                 \
    {                                                                                                                       \
        handle(which, signal, info, context);                                                                               \
    }
HANDLER(0)
HANDLER(1)
HANDLER(2)
HANDLER(3)

int install_handler(int which)
{
    static void (*const handlers[HANDLERS])(int, siginfo_t *, void *) = {handler_0, handler_1, handler_2, handler_3};
    struct sigaction action = {.sa_sigaction = handlers[which], .sa_flags = SA_SIGINFO | more_flags[which]}, found;

    (void)sigfillset(&action.sa_mask);
    (void)sigaction(SIGCHLD, NULL, &found);
    /* It is installed already. The handler that it calls is not itself. */
    if (!(found.sa_flags & SA_SIGINFO) || found.sa_sigaction != handlers[which])
        before[which] = found;
    return sigaction(SIGCHLD, &action, NULL);
}

void set_flags(int which, int flags)
{
    more_flags[which] = flags;
}

int count_calls(int which)
{
    return atomic_load(&calls[which]);
}

int was_blocked(int signal)
{
    return sigismember(&mask, signal);
}

int set_default(int flags)
{
    struct sigaction action = {.sa_handler = SIG_DFL, .sa_flags = flags};
    return sigaction(SIGCHLD, &action, NULL);
}

int get_flags(void)
{
    struct sigaction found;

    (void)sigaction(SIGCHLD, NULL, &found);
    return found.sa_flags;
}

int errno_after_signal(int value)
{
    errno = value;
    (void)raise(SIGCHLD);
    return errno;
}
