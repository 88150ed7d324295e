/* The instant in which a process is reaped and the kernel does not report its exit yet: the functions of pidfd.c, but the
 * first calls of ioctl fail with ESRCH. A shared object for the tests. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <errno.h>
#include <sys/ioctl.h>

/* How many calls of ioctl fail. */
extern int too_early;
int too_early;

#define ioctl(fd, request, argument) (too_early > 0 ? (too_early--, errno = ESRCH, -1) : ioctl(fd, request, argument))
#include "../../cffi_build/pidfd.c"
