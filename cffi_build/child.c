#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "child.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

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

int ap_set_pdeathsig(int signal)
{
    return prctl(PR_SET_PDEATHSIG, (unsigned long)signal) < 0 ? -errno : 0;
}

int ap_detach_epolls(void)
{
    int null, probe, err = 0, count = 0;
    struct dirent *entry;
    DIR *descriptors = opendir("/proc/self/fd");

    if (descriptors == NULL)
        return -errno;
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    probe = eventfd(0, EFD_CLOEXEC);
    if (null < 0 || probe < 0)
        err = errno;
    while (err == 0 && (entry = readdir(descriptors)) != NULL) {
        int fd = atoi(entry->d_name);
        /* To delete what it cannot hold is the cheapest question that only an epoll descriptor answers with ENOENT. */
        if (epoll_ctl(fd, EPOLL_CTL_DEL, probe, NULL) == 0 || errno != ENOENT)
            continue;
        /* Not closed, and nothing in it deleted: see the header. */
        (void)dup3(null, fd, O_CLOEXEC);
        count++;
    }
    if (probe >= 0)
        (void)close(probe);
    if (null >= 0)
        (void)close(null);
    (void)closedir(descriptors);
    return err != 0 ? -err : count;
}
