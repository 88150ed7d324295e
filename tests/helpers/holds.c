/* Preloaded: if requested, the next call of sigaction(SIGCHLD) blocks, once. A shared object. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <dlfcn.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

/* Have the next call of sigaction(SIGCHLD) write a byte to `entered`, and continue when it can read one from `go`. */
void hold_next(int entered, int go);

static _Atomic(int) armed;
static int said, awaited;

void hold_next(int entered, int go)
{
    said = entered;
    awaited = go;
    atomic_store(&armed, 1);
}

int sigaction(int number, const struct sigaction *restrict new, struct sigaction *restrict old)
{
    static int (*real)(int, const struct sigaction *, struct sigaction *);
    char byte = 'x';

    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "sigaction");
    if (number == SIGCHLD && atomic_exchange(&armed, 0)) {
        (void)!write(said, &byte, 1);
        (void)!read(awaited, &byte, 1);
    }
    return real(number, new, old);
}
