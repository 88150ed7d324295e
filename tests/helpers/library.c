/* What a forked child inherits from C libraries: handlers of signals, some of which call the previous handler, and fork
 * hooks that make an epoll descriptor. A shared object for the tests. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <unistd.h>

/* Handle `number` by a function that writes a dot to stderr and, if `chains`, calls the previous handler. Returns 0. */
int handle(int number, int chains);

/* Replace an epoll descriptor in each forked child from now on, as a library does that cannot share it: close the inherited
 * one and make another, which gets the same number. Returns the number. */
int renew_epoll(void);

static struct sigaction before[65];
static int epoll;

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)!write(2, ".", 1);
    if (before[number].sa_flags & SA_SIGINFO)
        before[number].sa_sigaction(number, info, context);
    else if (before[number].sa_handler != SIG_DFL && before[number].sa_handler != SIG_IGN)
        before[number].sa_handler(number);
}

int handle(int number, int chains)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    return sigaction(number, &action, chains ? &before[number] : NULL);
}

static void renew(void)
{
    (void)close(epoll);
    epoll = epoll_create1(EPOLL_CLOEXEC);
}

int renew_epoll(void)
{
    epoll = epoll_create1(EPOLL_CLOEXEC);
    (void)pthread_atfork(NULL, NULL, renew);
    return epoll;
}
