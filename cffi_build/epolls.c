#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "epolls.h"
#include "tracked_fds.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <unistd.h>

/* A fork hook may close an inherited epoll and open another one at the same number. So the parent marks its epolls by
 * O_APPEND: the flag belongs to the open file, the child sees it, epoll ignores it, and a new epoll does not have it. */
#define MARK O_APPEND

/* A number beyond this (fs.nr_open's default is 2^20) is not looked for without /proc. */
enum { MAX_NUMBER = 1 << 26 };

static int *noted; /* descriptors; ~fd of one that could not be marked */
static int noted_count, noted_room, out_of_memory;

/* Per thread, and copied to the child that it forks: `probe` + 1 if the next fork was announced; whether the last one
 * was. */
static __thread int expected_by, was_expected;

static void note(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    if (noted_count == noted_room) {
        int room = noted_room > 0 ? 2 * noted_room : 64;
        int *more = realloc(noted, (size_t)room * sizeof *more);
        if (more == NULL) {
            out_of_memory = 1;
            return;
        }
        noted = more;
        noted_room = room;
    }
    if (flags >= 0 && !(flags & MARK) && fcntl(fd, F_SETFL, flags | MARK) < 0)
        fd = ~fd;
    noted[noted_count++] = fd;
}

/* Returns 1 if `fd` is an epoll descriptor, 0 if it is not, -1 if it is not open. */
static int is_epoll(int fd, int probe)
{
    /* Delete an entry that is not there: only an epoll answers ENOENT. No cheaper call tells. */
    if (epoll_ctl(fd, EPOLL_CTL_DEL, probe, NULL) == 0)
        return 0;
    return errno == ENOENT ? 1 : errno == EBADF ? -1 : 0;
}

/* Note `fd` if it is an epoll descriptor. Returns whether it is open. */
static int look_at(int fd, int probe)
{
    int found = ap_is_tracked_fd(fd) ? 0 : is_epoll(fd, probe); /* a forked child closes tracked ones, reapers among them */

    if (found == 1)
        note(fd);
    return found >= 0;
}

/* Look at each number from 0 on until `open_count` open ones were seen, but not beyond `far`. Returns how many are still
 * missing. */
static long look_at_low(long open_count, int probe)
{
    int fd, far = (int)open_count * 2 + 256;

    for (fd = 0; open_count > 0 && fd < far; fd++)
        open_count -= look_at(fd, probe);
    return open_count;
}

/* Look at each number that /proc lists. Returns -errno if it lists none. */
static int look_at_listed(int probe)
{
    DIR *descriptors = opendir("/proc/self/fd");
    struct dirent *entry;

    if (descriptors == NULL)
        return -errno;
    while ((entry = readdir(descriptors)) != NULL)
        if (entry->d_name[0] != '.')
            (void)look_at(atoi(entry->d_name), probe);
    (void)closedir(descriptors);
    return 0;
}

/* Returns a number above all open descriptors, without /proc. select(2) reads its sets only up to the size of the process's
 * descriptor table, and fails with EBADF for a number below that size that is not open. */
static int table_size(void)
{
    int size;

    for (size = 256; size < MAX_NUMBER; size *= 2) {
        unsigned char *set = calloc(1, (size_t)size / 8 + sizeof(fd_set));
        struct timeval now = {0, 0};
        int is_beyond;

        if (set == NULL)
            break;
        ((unsigned long *)(void *)set)[(size_t)size / (8 * sizeof(unsigned long))] = 1; /* the bit of `size` */
        is_beyond = fcntl(size, F_GETFD) < 0 && select(size + 1, (fd_set *)(void *)set, NULL, NULL, &now) == 0;
        free(set);
        if (is_beyond)
            break;
    }
    return size;
}

void ap_note_epolls(int probe)
{
    struct stat folder;
    int fd;

    noted_count = out_of_memory = 0;
    if (stat("/proc/self/fd", &folder) == 0) {
        /* Since Linux 6.2 its size is the number of open descriptors; before, it is 0. */
        if (folder.st_size > 0 && look_at_low(folder.st_size, probe) == 0)
            return;
        noted_count = 0;
        if (look_at_listed(probe) == 0)
            return;
    }
    /* There is no /proc, or none of this PID namespace, or no descriptor left to read it with. */
    for (fd = table_size() - 1; fd >= 0; fd--)
        (void)look_at(fd, probe);
}

void ap_expect_fork(int probe)
{
    expected_by = probe + 1;
}

void ap_prepare_fork(void)
{
    was_expected = expected_by != 0;
    if (was_expected)
        ap_note_epolls(expected_by - 1);
    expected_by = 0;
}

int ap_hook_forks(void)
{
    /* Prepare hooks run in reverse order, and Python's run before all of them. So one that is registered early runs last. */
    return -pthread_atfork(ap_prepare_fork, NULL, NULL);
}

int ap_is_expected_child(void)
{
    return was_expected;
}

void ap_occupy(int fd)
{
    int inert = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    if (inert < 0 || inert == fd)
        return;
    (void)dup3(inert, fd, O_CLOEXEC);
    (void)close(inert);
}

/* Put a copy of *inert, opened at first use, at `fd`. */
static void replace(int fd, int *inert)
{
    if (*inert < 0)
        *inert = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (*inert < 0) /* there is none, or no descriptor for it */
        *inert = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (*inert >= 0)
        (void)dup3(*inert, fd, O_CLOEXEC);
    else {
        (void)close(fd);
        ap_occupy(fd);
    }
}

int ap_detach_epolls(int probe)
{
    int inert = -1, count = 0, i;

    if (!was_expected) /* it was forked by a call that runs no hooks: take all epolls for inherited */
        ap_note_epolls(probe);
    for (i = 0; i < noted_count; i++) {
        int is_unmarked = noted[i] < 0, fd = is_unmarked ? ~noted[i] : noted[i];
        if (is_epoll(fd, probe) != 1 || (!is_unmarked && !(fcntl(fd, F_GETFL) & MARK)))
            continue; /* a hook has closed it, and may have opened another file there */
        replace(fd, &inert); /* see the header */
        count++;
    }
    if (inert >= 0)
        (void)close(inert);
    return out_of_memory ? -ENOMEM : count;
}
