/* floor_fork MB SAMPLES: fork with a handshake, in C, from a process of MB megabytes of memory.
 *
 * Prints for each sample the nanoseconds from before the fork until the child has said that it is ready, and until it
 * has been reaped, after one fork that is not counted. */
#define _GNU_SOURCE 1
#include "floor.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

static void sample(int report)
{
    int ready[2];
    long long start_ns = read_clock_ns(CLOCK_MONOTONIC), ready_ns, end_ns;
    char word;
    pid_t pid;

    if (pipe2(ready, O_CLOEXEC))
        die("pipe");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0)
        _exit(write(ready[1], "r", 1) != 1);
    close(ready[1]);
    if (read(ready[0], &word, 1) != 1)
        die("read");
    ready_ns = read_clock_ns(CLOCK_MONOTONIC);
    if (waitpid(pid, NULL, 0) != pid)
        die("waitpid");
    end_ns = read_clock_ns(CLOCK_MONOTONIC);
    close(ready[0]);
    if (report)
        printf("%lld %lld\n", ready_ns - start_ns, end_ns - start_ns);
}

int main(int argc, char **argv)
{
    int samples;

    if (argc != 3)
        return 2;
    samples = atoi(argv[2]);
    touch((size_t)atol(argv[1]));
    setvbuf(stdout, NULL, _IOFBF, 1 << 16); /* written at the end: a child that copied it would write nothing, by _exit */
    sample(0);
    while (samples-- > 0) {
        (void)usleep(5000); /* the pause that all peers make */
        sample(1);
    }
    return 0;
}
