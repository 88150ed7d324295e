#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "child.h"

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>

/* sa_handler and sa_sigaction share their address, so this type stands for both. Python has one handler for all signals. */
typedef void (*handler)(int);

static struct sigaction kept;
static handler pythons;

unsigned long long ap_caught_signals(void)
{
    unsigned long long caught = 0;
    int number;

    for (number = 1; number <= 64; number++) {
        struct sigaction action;
        if (sigaction(number, NULL, &action) == 0 && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN)
            caught |= 1ULL << (number - 1);
    }
    return caught;
}

int ap_is_ignored(int signal)
{
    struct sigaction action;
    return sigaction(signal, NULL, &action) == 0 && action.sa_handler == SIG_IGN;
}

/* Whether `address` is in a library that has a libuv of its own, as uvloop's has. */
static int is_libuvs(handler address)
{
    Dl_info where, found;
    void *library, *symbol;

    if (dladdr((void *)(uintptr_t)address, &where) == 0 || where.dli_fname == NULL)
        return 0;
    library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL)
        return 0;
    symbol = dlsym(library, "uv_run"); /* this may find it in another library that this one needs */
    (void)dlclose(library);
    return symbol != NULL && dladdr(symbol, &found) != 0 && found.dli_fbase == where.dli_fbase;
}

/* Whether `signal` reports a fault of the program itself. Loops do not handle these. Libraries do: to print a traceback, to
 * raise an exception, to grow a stack. */
static int is_fault(int signal)
{
    return signal == SIGSEGV || signal == SIGBUS || signal == SIGFPE || signal == SIGILL || signal == SIGABRT ||
           signal == SIGTRAP || signal == SIGSYS;
}

static int is_of_loop(int signal, handler address)
{
    return address == pythons || (!is_fault(signal) && is_libuvs(address));
}

void ap_keep_handler(int signal)
{
    (void)sigaction(signal, NULL, &kept);
}

int ap_put_back_handler(int signal)
{
    struct sigaction now;

    (void)sigaction(signal, NULL, &now);
    pythons = now.sa_handler;
    if (kept.sa_handler == SIG_DFL || (kept.sa_handler != SIG_IGN && is_of_loop(signal, kept.sa_handler)))
        return 0;
    (void)sigaction(signal, &kept, NULL);
    return kept.sa_handler == SIG_IGN ? 2 : 1;
}

int ap_is_handler_of_loop(int signal)
{
    struct sigaction now;
    return sigaction(signal, NULL, &now) == 0 && is_of_loop(signal, now.sa_handler);
}

unsigned long long ap_set_signal_mask(unsigned long long mask)
{
    unsigned long long old_mask = 0;
    sigset_t set, old;
    int number;

    (void)sigemptyset(&set);
    for (number = 1; number <= 64; number++)
        if (mask >> (number - 1) & 1)
            (void)sigaddset(&set, number);
    (void)pthread_sigmask(SIG_SETMASK, &set, &old);
    for (number = 1; number <= 64; number++)
        if (sigismember(&old, number) == 1)
            old_mask |= 1ULL << (number - 1);
    return old_mask;
}

int ap_set_pdeathsig(int signal, int gate)
{
    struct pollfd closed = {.fd = gate, .events = POLLRDHUP};

    if (prctl(PR_SET_PDEATHSIG, (unsigned long)signal) < 0)
        return -errno;
    return poll(&closed, 1, 0) <= 0;
}
