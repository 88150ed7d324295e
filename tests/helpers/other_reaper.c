/* Other code that reaps the children of this process, fast: a shared object for the tests. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "syscalls.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* What to do with SIGCHLD, behind Python's back. */
enum { IGNORE = 0, NOCLDWAIT = 1, REAP_ALL = 2 };

static struct sigaction saved;
static pthread_t thread;
static atomic_int stopping;
static atomic_long reaped;
static atomic_int handler_reaps;

static void reap_all(int number)
{
    int saved_errno = errno;

    (void)number;
    /* Not once it was replaced: a newer handler may still call it. */
    while (atomic_load(&handler_reaps) && waitpid(-1, NULL, WNOHANG) > 0)
        ;
    errno = saved_errno;
}

/* Remember what SIGCHLD is set to. */
void other_save_sigchld(void);
void other_save_sigchld(void)
{
    (void)sigaction(SIGCHLD, NULL, &saved);
}

/* Restore that. */
void other_restore_sigchld(void);
void other_restore_sigchld(void)
{
    atomic_store(&handler_reaps, 0);
    (void)sigaction(SIGCHLD, &saved, NULL);
}

void other_set_sigchld(int how);
void other_set_sigchld(int how)
{
    struct sigaction action;

    atomic_store(&handler_reaps, how == REAP_ALL);
    (void)memset(&action, 0, sizeof action);
    action.sa_handler = how == IGNORE ? SIG_IGN : how == NOCLDWAIT ? SIG_DFL : reap_all;
    action.sa_flags = how == NOCLDWAIT ? SA_NOCLDWAIT : SA_RESTART;
    (void)sigaction(SIGCHLD, &action, NULL);
}

static void *reap_for_ever(void *unused)
{
    const struct timespec moment = {.tv_nsec = 20000};

    (void)unused;
    while (!atomic_load(&stopping)) {
        if (waitpid(-1, NULL, 0) > 0)
            (void)atomic_fetch_add(&reaped, 1);
        else
            (void)nanosleep(&moment, NULL); /* ECHILD: there are no children now */
    }
    return NULL;
}

/* Start a thread that reaps every child. Returns 0, or an errno. */
int other_reaper_start(void);
int other_reaper_start(void)
{
    sigset_t all, old;
    int err;

    atomic_store(&stopping, 0);
    atomic_store(&reaped, 0);
    (void)sigfillset(&all); /* no signals in this thread */
    (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    err = pthread_create(&thread, NULL, reap_for_ever, NULL);
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    return err;
}

/* End the thread. It may wait for one more child. Returns how many children it has reaped. */
long other_reaper_stop(void);
long other_reaper_stop(void)
{
    atomic_store(&stopping, 1);
    (void)pthread_join(thread, NULL);
    return atomic_load(&reaped);
}

/* Run a shell program in a new child with the pid `pid` and its standard input from `input`. Returns the pid, or -errno:
 * EPERM, we may not choose it; EEXIST, it is in use. Linux 5.5. See clone3(2). */
int other_run_as(int pid, int input, const char *program);
int other_run_as(int pid, int input, const char *program)
{
    struct ap_clone_args args = {.exit_signal = SIGCHLD, .set_tid = (uintptr_t)&pid, .set_tid_size = 1};
    long child = syscall(SYS_clone3, &args, sizeof args);

    if (child == 0) {
        (void)dup2(input, 0);
        (void)execl("/bin/sh", "sh", "-c", program, (char *)NULL);
        _exit(127);
    }
    return child < 0 ? -errno : (int)child;
}
