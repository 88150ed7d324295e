/* floor_fork_server MB SAMPLES: what a fork server costs in C, for a process of MB megabytes of memory.
 *
 * The server is made first, by a process that has touched as much memory as a Python interpreter has; it forks siblings, with
 * a pidfd from birth, by the same messages as ours: a request with the worker's socket, a reply with its pidfd, and over the
 * worker's socket what it is to do, leave to do it, and its word that it is ready. Prints for each sample the nanoseconds
 * until it is ready, and until it has been reaped, after one that is not counted. */
#define _GNU_SOURCE 1
#include "floor.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { INTERPRETER_MB = 14 };

static const char ORDER[] = "what to run";

static long raw_fork(uint64_t flags, int *ret_pidfd)
{
    struct ap_clone_args args = {.flags = flags | CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)ret_pidfd};
    return syscall(SYS_clone3, &args, AP_CLONE_ARGS_V0);
}

static ssize_t send_fd(int wire, const void *data, size_t size, int fd)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec part = {(void *)(uintptr_t)data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    return sendmsg(wire, &message, 0);
}

static ssize_t receive_fd(int wire, void *data, size_t size, int *ret_fd)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof *ret_fd)];
    struct iovec part = {data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(wire, &message, MSG_CMSG_CLOEXEC);

    if (length > 0)
        memcpy(ret_fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof *ret_fd);
    return length;
}

static void serve(int wire)
{
    char request[8];
    int gate, pidfd;

    while (receive_fd(wire, request, sizeof request, &gate) > 0) {
        long pid = raw_fork(CLONE_PARENT, &pidfd);
        if (pid == 0) {
            char order[sizeof ORDER];
            _exit(read(gate, order, sizeof ORDER) != sizeof ORDER || write(gate, "s", 1) != 1 || read(gate, order, 1) != 1 ||
                  write(gate, "r", 1) != 1);
        }
        close(gate);
        if (pid < 0 || send_fd(wire, &pid, sizeof pid, pidfd) < 0)
            _exit(1);
        close(pidfd);
    }
    _exit(0);
}

static void sample(int wire, int report)
{
    long long start_ns = read_clock_ns(CLOCK_MONOTONIC), ready_ns, end_ns;
    char word;
    int gate[2], pidfd;
    long pid;
    siginfo_t info;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, gate))
        die("socketpair");
    if (send_fd(wire, "request", 8, gate[1]) < 0)
        die("request");
    close(gate[1]);
    if (write(gate[0], ORDER, sizeof ORDER) != sizeof ORDER)
        die("order");
    if (receive_fd(wire, &pid, sizeof pid, &pidfd) <= 0)
        die("reply");
    if (write(gate[0], "g", 1) != 1 || read(gate[0], &word, 1) != 1 || read(gate[0], &word, 1) != 1)
        die("gate");
    ready_ns = read_clock_ns(CLOCK_MONOTONIC);
    if (syscall(SYS_waitid, AP_P_PIDFD, pidfd, &info, WEXITED | __WALL, NULL))
        die("waitid");
    end_ns = read_clock_ns(CLOCK_MONOTONIC);
    close(pidfd);
    close(gate[0]);
    if (report)
        printf("%lld %lld\n", ready_ns - start_ns, end_ns - start_ns);
}

int main(int argc, char **argv)
{
    int wire[2], samples, pidfd;
    long server;

    if (argc != 3)
        return 2;
    samples = atoi(argv[2]);
    touch(INTERPRETER_MB);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, wire))
        die("socketpair");
    server = raw_fork(0, &pidfd); /* exit signal 0, which its workers inherit */
    if (server < 0)
        die("clone3");
    if (server == 0) {
        close(wire[0]);
        serve(wire[1]);
    }
    close(wire[1]);
    touch((size_t)atol(argv[1]));
    sample(wire[0], 0);
    while (samples-- > 0) {
        (void)usleep(5000); /* the pause that all peers make */
        sample(wire[0], 1);
    }
    close(wire[0]);
    return syscall(SYS_waitid, AP_P_PIDFD, pidfd, NULL, WEXITED | __WALL, NULL) != 0;
}
