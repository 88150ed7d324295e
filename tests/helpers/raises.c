/* Preloaded: a process that calls setsid() gets SIGUSR1 inside the call. A shared object. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

pid_t setsid(void)
{
    (void)kill(getpid(), SIGUSR1); /* not raise(): it reads the thread's ID from memory, which is its parent's */
    return (pid_t)syscall(SYS_setsid);
}
