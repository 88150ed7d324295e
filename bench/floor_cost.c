/* floor_cost CHILD N PASSES: the CPU time of registering and reaping N children by pidfd, in C.
 *
 * The system calls are those of aiopidfd for a pid that the caller passes: pidfd_open, a waitid that makes sure that it is a
 * child, and EPOLL_CTL_ADD to register, then waitid with rusage for each child, and epoll_wait and the closing of the pidfds
 * for each batch of them: those that follow one another are closed by one call. All have ended before the first is reaped.
 * Prints for each pass the nanoseconds of CPU time to register and to reap, after one pass that is not counted. */
#define _GNU_SOURCE 1
#include "floor.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WARM_UP = 16, BATCH = 64 };

extern char **environ;

/* Start a child whose stdin is `in`. `keep` stays open in it, as descriptor 3, unless it is -1. */
static pid_t start(char *program, int in, int keep)
{
    char *argv[] = {program, NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;

    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in, 0);
    if (keep >= 0)
        posix_spawn_file_actions_adddup2(&actions, keep, 3);
    if (posix_spawn(&pid, program, &actions, NULL, argv, environ))
        die("posix_spawn");
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

static int compare(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

static void close_all(int *fds, int count)
{
    int first, end;

    qsort(fds, (size_t)count, sizeof *fds, compare);
    for (first = 0; first < count; first = end) {
        for (end = first + 1; end < count && fds[end] == fds[end - 1] + 1; end++)
            ;
        if (end - first == 1 || syscall(SYS_close_range, fds[first], fds[end - 1], 0))
            for (; first < end; first++)
                close(fds[first]);
    }
}

static void pass(char *program, int n, int report)
{
    int gate[2], trigger[2], reaper = epoll_create1(EPOLL_CLOEXEC), i, left = n;
    pid_t *pids = calloc((size_t)n, sizeof *pids), holder;
    long long start_ns, registered_ns, ended_ns, end_ns;

    if (!pids || reaper < 0 || pipe2(gate, O_CLOEXEC) || pipe2(trigger, O_CLOEXEC))
        die("set-up");
    for (i = 0; i < n; i++)
        pids[i] = start(program, gate[0], -1);
    /* The last holder of the gate is a child of its own, so that waking the others is not on our account. */
    holder = start(program, trigger[0], gate[1]);
    close(gate[0]);
    close(gate[1]);
    close(trigger[0]);

    start_ns = read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    for (i = 0; i < n; i++) {
        int pidfd = (int)syscall(SYS_pidfd_open, pids[i], 0);
        struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = (uint64_t)(uint32_t)pidfd};
        siginfo_t info;
        if (pidfd < 0 || syscall(SYS_waitid, AP_P_PIDFD, pidfd, &info, WEXITED | WNOHANG | WNOWAIT | __WALL, NULL) ||
            epoll_ctl(reaper, EPOLL_CTL_ADD, pidfd, &event))
            die("register");
    }
    registered_ns = read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    close(trigger[1]);
    for (i = 0; i < n; i++)
        waitid(P_PID, (id_t)pids[i], &(siginfo_t){0}, WEXITED | WNOWAIT);
    ended_ns = read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    while (left > 0) {
        struct epoll_event events[BATCH];
        int pidfds[BATCH], ready = epoll_wait(reaper, events, BATCH, -1);
        for (i = 0; i < ready; i++) {
            siginfo_t info;
            struct rusage usage;
            pidfds[i] = (int)events[i].data.u64;
            if (syscall(SYS_waitid, AP_P_PIDFD, pidfds[i], &info, WEXITED | WNOHANG | __WALL, &usage))
                die("waitid");
        }
        close_all(pidfds, ready);
        left -= ready;
    }
    end_ns = read_clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    if (report)
        printf("%lld %lld\n", registered_ns - start_ns, end_ns - ended_ns);
    waitpid(holder, NULL, 0);
    close(reaper);
    free(pids);
}

int main(int argc, char **argv)
{
    int n, passes;
    struct rlimit limit;

    if (argc != 4)
        return 2;
    n = atoi(argv[2]);
    passes = atoi(argv[3]);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    pass(argv[1], WARM_UP, 0);
    while (passes-- > 0)
        pass(argv[1], n, 1);
    return 0;
}
