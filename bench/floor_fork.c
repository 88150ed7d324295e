/* floor_fork MB SAMPLES: fork with a handshake, in C, from a process of MB megabytes of memory.
 *
 * Prints for each sample the nanoseconds from before the fork until the child has said that it is ready, and until it
 * has been reaped, after one fork that is not counted. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void sample(int report)
{
    int ready[2];
    long long start_ns = now_ns(), ready_ns, end_ns;
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
    ready_ns = now_ns();
    if (waitpid(pid, NULL, 0) != pid)
        die("waitpid");
    end_ns = now_ns();
    close(ready[0]);
    if (report)
        printf("%lld %lld\n", ready_ns - start_ns, end_ns - start_ns);
}

int main(int argc, char **argv)
{
    size_t size;
    int samples;

    if (argc != 3)
        return 2;
    size = (size_t)atol(argv[1]) << 20;
    samples = atoi(argv[2]);
    if (size > 0) {
        char *ballast = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (ballast == MAP_FAILED)
            die("mmap");
        /* Small pages, as a Python heap that has grown bit by bit has them. */
        (void)madvise(ballast, size, MADV_NOHUGEPAGE);
        memset(ballast, 1, size);
    }
    setvbuf(stdout, NULL, _IOFBF, 1 << 16); /* written at the end: a child that copied it would write nothing, by _exit */
    sample(0);
    while (samples-- > 0) {
        (void)usleep(5000); /* the pause that all peers make */
        sample(1);
    }
    return 0;
}
