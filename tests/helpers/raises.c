/* Preloaded: whoever makes a session of its own gets SIGUSR1 in the middle of that. A shared object. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

pid_t setsid(void)
{
    (void)kill(getpid(), SIGUSR1); /* not raise(), which knows the thread's ID from memory that is its parent's */
    return (pid_t)syscall(SYS_setsid);
}
