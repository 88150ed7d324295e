#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "pidfd.h"
#include "reaper.h"
#include "tracked_fds.h"
#include "syscalls.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* epoll's data word: the pidfd or the gate below, the pid (0: the wake descriptor) or the gate's number above it, and flags
 * on top of each. Pids end at 2^22, descriptors before 2^31. */
#define PEEK ((uint64_t)1 << 63)
#define GATE ((uint64_t)1 << 62)
#define PERSISTENT ((uint64_t)1 << 31)

static struct epoll_event interest(int pid, int pidfd, int flags)
{
    /* One shot: the first event is nearly always the exit. After it the entry is silent, and goes with the last copy of the
     * descriptor. So it need not be deleted, even if a forked process holds a copy. */
    return (struct epoll_event){
        .events = EPOLLIN | EPOLLET | (pid == 0 ? 0 : EPOLLONESHOT),
        .data.u64 = (uint64_t)(uint32_t)pid << 32 | (uint32_t)pidfd | (flags & AP_ADD_PEEK ? PEEK : 0),
    };
}

/* Keep watching a process that could not be reaped. Edge-triggered: it costs nothing until its state changes. EPOLL_CTL_MOD
 * reports the present state once more, so a change between the two calls is not missed. */
static void persist(int reaper, int pidfd, uint64_t data)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = data | PERSISTENT};

    if (!(data & PERSISTENT))
        (void)epoll_ctl(reaper, EPOLL_CTL_MOD, pidfd, &event);
}

int ap_reaper_open(void)
{
    int reaper = epoll_create1(EPOLL_CLOEXEC);
    if (reaper < 0)
        return -errno;
    ap_track_fd(reaper);
    return reaper;
}

int ap_reaper_add(int reaper, int pid, int flags)
{
    int err, pidfd = ap_pidfd_open(pid);

    if (pidfd < 0)
        return pidfd;
    err = ap_reaper_adopt(reaper, pid, pidfd, flags);
    if (err < 0) {
        (void)close(pidfd);
        return err;
    }
    return pidfd;
}

int ap_reaper_adopt(int reaper, int pid, int pidfd, int flags)
{
    struct epoll_event event = interest(pid, pidfd, flags);
    ap_exit unused;

    if (flags & AP_ADD_CHECK_CHILD) {
        int err = ap_waitid(AP_P_PIDFD, pidfd, WEXITED | WNOHANG | WNOWAIT, &unused);
        if (err < 0)
            return err;
    }
    if (epoll_ctl(reaper, EPOLL_CTL_ADD, pidfd, &event) < 0)
        return -errno;
    ap_track_fd(pidfd);
    return 0;
}

int ap_reaper_add_wake(int reaper, int fd)
{
    struct epoll_event event = interest(0, fd, 0);
    return epoll_ctl(reaper, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

long long ap_reaper_open_gate(int reaper, int number)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT};
    int ends[2], err;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return -errno;
    event.data.u64 = GATE | (uint64_t)(uint32_t)number << 32 | (uint32_t)ends[0];
    if (fcntl(ends[0], F_SETFL, O_RDWR | O_NONBLOCK) < 0 || epoll_ctl(reaper, EPOLL_CTL_ADD, ends[0], &event) < 0) {
        err = errno;
        (void)close(ends[0]);
        (void)close(ends[1]);
        return -err;
    }
    ap_track_fd(ends[0]);
    return (long long)ends[0] << 32 | ends[1];
}

int ap_reaper_modify(int reaper, int pid, int pidfd, int flags)
{
    struct epoll_event event = interest(pid, pidfd, flags);
    return epoll_ctl(reaper, EPOLL_CTL_MOD, pidfd, &event) < 0 ? -errno : 0;
}

void ap_reaper_remove(int reaper, int pidfd)
{
    /* DEL before close: if a forked process holds a copy, close alone would leave the entry in the set, where nobody can
     * reach it and it fires for ever. */
    (void)epoll_ctl(reaper, EPOLL_CTL_DEL, pidfd, NULL);
    ap_close_tracked_fd(pidfd);
}

/* How the process ended whose pidfd has become readable. Returns 1 with *ret_exit written, 0 for "not yet". */
static int reap_one(int pid, int pidfd, int options, uint32_t events, ap_exit *ret_exit)
{
    int told, err = ap_waitid(AP_P_PIDFD, pidfd, options, ret_exit);

    if (err < 0 && err != -ECHILD) /* a seccomp filter has come since. The pid is safe: only we can have reaped the child */
        err = ap_waitid(P_PID, pid, options, ret_exit);
    if (err >= 0)
        return err;

    /* ECHILD: other code has reaped it or is about to, or it is a child of another process. */
    told = ap_pidfd_get_exit(pidfd, &ret_exit->status);
    if (told == 1)
        ret_exit->source = AP_SOURCE_RECOVERED;
    else if (told == 0 && !(events & EPOLLHUP)) /* not reaped, or being reaped now: EPOLLHUP will follow */
        ret_exit->source = AP_SOURCE_PENDING;
    else {
        ret_exit->source = AP_SOURCE_LOST;
        ret_exit->status = 0;
    }
    return 1;
}

/* Read what a child has sent at its gate. */
static void read_gate(uint64_t data, ap_exit *ret_exit)
{
    char word;
    ssize_t length = recv((int)(data & 0x7fffffff), &word, 1, MSG_DONTWAIT);

    ret_exit->pid = -(int)(data >> 32 & 0x3fffffff);
    ret_exit->pidfd = -1; /* stays open, for its owner to close */
    ret_exit->status = 0;
    ret_exit->source = length == 1 ? AP_SOURCE_GATE_READY : AP_SOURCE_GATE_CLOSED;
}

int ap_reaper_reap(int reaper, ap_batch *batch)
{
    struct epoll_event events[AP_BATCH];
    int i, ready;

    if (batch->count > 0)
        return batch->count;
    ready = epoll_wait(reaper, events, AP_BATCH, 0);
    if (ready < 0)
        return -errno;
    for (i = 0; i < ready; i++) {
        uint64_t data = events[i].data.u64;
        int pid = (int)(data >> 32 & 0x3fffffff), pidfd = (int)(data & 0x7fffffff);
        int options = WEXITED | WNOHANG | (data & PEEK ? WNOWAIT : 0);
        ap_exit *ended = &batch->exits[batch->count];

        if (pid == 0) {
            batch->woken = 1;
            continue;
        }
        if (data & GATE) {
            read_gate(data, ended);
            batch->count++;
            continue;
        }
        if (!reap_one(pid, pidfd, options, events[i].events, ended)) {
            persist(reaper, pidfd, data);
            continue;
        }
        ended->pid = pid;
        ended->pidfd = pidfd;
        if (ended->source == AP_SOURCE_PENDING) {
            ended->pidfd = -1; /* stays in the reaper, and open */
            persist(reaper, pidfd, data);
        } else if (data & PERSISTENT)
            (void)epoll_ctl(reaper, EPOLL_CTL_DEL, pidfd, NULL);
        batch->count++;
    }
    return batch->count;
}

void ap_batch_release(ap_batch *batch)
{
    int pidfds[AP_BATCH], count = 0, i;

    for (i = 0; i < batch->count; i++)
        if (batch->exits[i].pidfd >= 0)
            pidfds[count++] = batch->exits[i].pidfd;
    ap_close_tracked_fds(pidfds, count);
    batch->count = 0;
}
