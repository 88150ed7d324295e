#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "child.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/stat.h>
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

int ap_set_pdeathsig(int signal, int gate)
{
    struct pollfd closed = {.fd = gate, .events = POLLRDHUP};

    if (prctl(PR_SET_PDEATHSIG, (unsigned long)signal) < 0)
        return -errno;
    return poll(&closed, 1, 0) <= 0;
}

/* Replace `fd` by a copy of `null` if it is an epoll descriptor. Returns whether it was, or -EBADF. */
static int detach_epoll(int fd, int probe, int null)
{
    /* To delete what it cannot hold is the cheapest question that only an epoll descriptor answers with ENOENT. */
    if (epoll_ctl(fd, EPOLL_CTL_DEL, probe, NULL) == 0 || errno != ENOENT)
        return errno == EBADF ? -EBADF : 0;
    /* Not closed, and nothing in it deleted: see the header. */
    (void)dup3(null, fd, O_CLOEXEC);
    return 1;
}

/* Look at each number from 0 on until `open_count` open ones were seen, if that is not far. Returns how many of those were not. */
static long detach_low(long open_count, int probe, int null, int *ret_count)
{
    int fd, far = (int)open_count * 2 + 256;

    for (fd = 0; open_count > 0 && fd < far; fd++) {
        int found = detach_epoll(fd, probe, null);
        if (found >= 0) {
            open_count--;
            *ret_count += found;
        }
    }
    return open_count;
}

/* Look at each number that /proc lists, which takes a new process many times longer: it makes an entry of each first. */
static int detach_listed(int probe, int null, int *ret_count)
{
    DIR *descriptors = opendir("/proc/self/fd");
    struct dirent *entry;

    if (descriptors == NULL)
        return -errno;
    while ((entry = readdir(descriptors)) != NULL)
        if (entry->d_name[0] != '.' && detach_epoll(atoi(entry->d_name), probe, null) == 1)
            ++*ret_count;
    (void)closedir(descriptors);
    return 0;
}

int ap_detach_epolls(int probe)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), err = 0, count = 0;
    struct stat folder;

    if (null < 0)
        err = -errno;
    /* Since Linux 6.2 its size is the number of open descriptors; before, it is 0. */
    else if (stat("/proc/self/fd", &folder) < 0)
        err = -errno;
    else if (folder.st_size == 0 || detach_low(folder.st_size, probe, null, &count) > 0)
        err = detach_listed(probe, null, &count);
    if (null >= 0)
        (void)close(null);
    return err < 0 ? err : count;
}
