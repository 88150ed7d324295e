#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "child.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
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

int ap_set_signal_mask(unsigned long long mask)
{
    sigset_t set;
    int number;

    (void)sigemptyset(&set);
    for (number = 1; number <= 64; number++)
        if (mask >> (number - 1) & 1)
            (void)sigaddset(&set, number);
    return -pthread_sigmask(SIG_SETMASK, &set, NULL);
}

int ap_set_pdeathsig(int signal)
{
    return prctl(PR_SET_PDEATHSIG, (unsigned long)signal) < 0 ? -errno : 0;
}

int ap_detach_epolls(void)
{
    static const char epoll_link[] = "anon_inode:[eventpoll]";
    int null, count = 0;
    struct dirent *entry;
    DIR *descriptors = opendir("/proc/self/fd");

    if (descriptors == NULL)
        return -errno;
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0) {
        int err = errno;
        (void)closedir(descriptors);
        return -err;
    }
    while ((entry = readdir(descriptors)) != NULL) {
        char target[sizeof epoll_link];
        ssize_t length = readlinkat(dirfd(descriptors), entry->d_name, target, sizeof target);

        if (length != sizeof epoll_link - 1 || memcmp(target, epoll_link, sizeof epoll_link - 1) != 0)
            continue;
        /* Not closed and not EPOLL_CTL_DEL: see the header. */
        (void)dup3(null, atoi(entry->d_name), O_CLOEXEC);
        count++;
    }
    (void)close(null);
    (void)closedir(descriptors);
    return count;
}
