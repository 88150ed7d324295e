#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "live_child.h"

#include "pidfd.h"
#include "reaper.h"
#include "child.h"
#include "epolls.h"
#include "sigchld.h"
#include "tracked_fds.h"
#include "clone.h"
#include "fork.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* How long find_lost_child waits for a message of the child. */
enum { LOST_CHILD_MS = 1000 };

/* Held across each fork, so that no child inherits the gate of another child that is being made. */
static pthread_mutex_t fork_lock = PTHREAD_MUTEX_INITIALIZER;

static int exit_code;

void ap_set_exit_code(int code)
{
    exit_code = code;
}

static struct stat ready_socket;

void ap_note_ready_fd(int fd)
{
    (void)fstat(fd, &ready_socket);
}

int ap_is_ready_fd(int fd)
{
    struct stat found;

    return fstat(fd, &found) == 0 && found.st_ino == ready_socket.st_ino && found.st_dev == ready_socket.st_dev;
}

void ap_after_fork_in_child(void)
{
    ap_close_inherited();
    ap_sigchld_after_fork();
    fork_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

_Noreturn void ap_live_child(PyObject *live, int gate, unsigned long long mask)
{
    exit_code = 1; /* not the one that the parent had set before it forked */
    (void)PyObject_CallFunction(live, "iK", gate, mask);
    /* It returns only if the child is to be killed by a signal, or if a signal handler has raised in its last frame. */
    if (exit_code < 0) {
        (void)signal(-exit_code, SIG_DFL);
        (void)raise(-exit_code);
        _exit(128 - exit_code); /* the child has blocked the signal */
    }
    _exit(exit_code);
}

/* Append the exception that is set, with its traceback, to a list. */
static void keep_exception(PyObject *failures)
{
    PyObject *type, *value, *traceback;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (value != NULL) {
        if (traceback != NULL)
            (void)PyException_SetTraceback(value, traceback);
        (void)PyList_Append(failures, value);
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* Fork by a function of Python's. Returns 0, or 1 if it has raised something. */
static int fork_by(PyObject *fork, PyObject *live, PyObject *failures, int gate, unsigned long long mask, int *ret_pid)
{
    PyGILState_STATE gil = PyGILState_Ensure(); /* cffi has released it */
    PyObject *result = PyObject_CallObject(fork, NULL);
    long pid = result == NULL ? -1 : PyLong_AsLong(result);
    int raised;

    if (pid == 0)
        ap_live_child(live, gate, mask);
    Py_XDECREF(result);
    if (pid < 0 && PyErr_Occurred() == NULL)
        PyErr_SetString(PyExc_RuntimeError, "os.fork() has returned a negative number");
    raised = PyErr_Occurred() != NULL;
    if (raised)
        keep_exception(failures);
    else
        *ret_pid = (int)pid;
    PyGILState_Release(gil);
    return raised;
}

/* Find the child of a `fork` that has raised. If it raised after the fork, a child waits at its gate. It sends one byte when
 * our side is shut down, and the kernel adds its pid in our PID namespace (SCM_CREDENTIALS). Returns 0 if there is no
 * child. */
static int find_lost_child(int gate)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(struct ucred))];
    } control = {0};
    char word;
    struct iovec part = {.iov_base = &word, .iov_len = 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct pollfd told = {.fd = gate, .events = POLLIN};
    struct ucred sender;
    int on = 1;

    if (setsockopt(gate, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0 || shutdown(gate, SHUT_WR) < 0
        || poll(&told, 1, LOST_CHILD_MS) <= 0 || recvmsg(gate, &message, MSG_DONTWAIT) <= 0
        || CMSG_FIRSTHDR(&message) == NULL || CMSG_FIRSTHDR(&message)->cmsg_type != SCM_CREDENTIALS)
        return 0;
    memcpy(&sender, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof sender);
    return sender.pid;
}

int ap_child_fork(ap_child *child, int reaper, int number, unsigned long long fork, unsigned long long live,
                  unsigned long long failures)
{
    unsigned long long mask;
    long long ends;
    int childs, result;

    (void)pthread_mutex_lock(&fork_lock);
    ends = ap_reaper_open_gate(reaper, number);
    if (ends < 0) {
        (void)pthread_mutex_unlock(&fork_lock);
        return (int)ends;
    }
    child->gate = (int)(ends >> 32);
    childs = (int)(ends & 0xFFFFFFFF);
    mask = ap_set_signal_mask(~0ULL);
    ap_expect_fork(childs);
    if (fork != 0)
        result = fork_by((PyObject *)(uintptr_t)fork, (PyObject *)(uintptr_t)live, (PyObject *)(uintptr_t)failures, childs,
                         mask, &child->pid);
    else
        result = ap_fork(0, live, childs, mask, &child->pid, &child->pidfd);
    ap_expect_fork(-1);
    (void)close(childs);
    if (result == 1) {
        child->pid = find_lost_child(child->gate);
        ap_child_undo(child, reaper);
    }
    (void)ap_set_signal_mask(mask);
    (void)pthread_mutex_unlock(&fork_lock);
    return result;
}

int ap_child_release(ap_child *child, int reaper)
{
    int pidfd = ap_reaper_add(reaper, child->pid, 0);

    if (pidfd < 0)
        return pidfd;
    child->pidfd = pidfd;
    (void)send(child->gate, "g", 1, MSG_NOSIGNAL); /* EPIPE: it was killed; the reaper reports its exit */
    return 0;
}

void ap_child_undo(ap_child *child, int reaper)
{
    ap_exit unused;

    /* After its release other code may have reaped it, and the pid may be another process's. */
    if (child->pid > 0 && ap_waitid(P_PID, child->pid, WEXITED | WNOHANG | WNOWAIT, &unused) >= 0
        && kill(child->pid, SIGKILL) == 0)
        while (ap_waitid(P_PID, child->pid, WEXITED, &unused) == -EINTR)
            ;
    child->pid = 0;
    if (child->pidfd >= 0)
        ap_reaper_remove(reaper, child->pidfd);
    child->pidfd = -1;
    ap_child_close_gate(child);
}

void ap_child_close_gate(ap_child *child)
{
    int gate = child->gate;

    child->gate = -1;
    if (gate >= 0)
        ap_close_tracked_fd(gate);
}
