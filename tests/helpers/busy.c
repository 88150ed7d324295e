/* Threads that call malloc and fork all the time, without the GIL, until they are stopped. A shared object. */
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile int stopping;

void busy_stop(void);
void busy_stop(void)
{
    stopping = 1;
}

/* Returns how many blocks were allocated. */
long busy_allocate(void);
long busy_allocate(void)
{
    enum { KEPT = 64 };
    void *kept[KEPT] = {0};
    unsigned int random = 1;
    long count;
    int i;

    for (count = 0; !stopping; count++) {
        random = random * 1103515245U + 12345U;
        i = (int)(random >> 8 & (KEPT - 1));
        free(kept[i]);
        kept[i] = malloc(16 + (random >> 16 & 0x3fff));
    }
    for (i = 0; i < KEPT; i++)
        free(kept[i]);
    return count;
}

/* Returns how many processes were forked; -1 if a fork failed. Each has copies of all descriptors for an instant. */
long busy_fork(void);
long busy_fork(void)
{
    long count;

    for (count = 0; !stopping; count++) {
        pid_t pid = fork();
        if (pid < 0)
            return -1;
        if (pid == 0)
            _exit(0);
        (void)waitpid(pid, NULL, 0); /* ECHILD: another waitpid() was first */
    }
    return count;
}
