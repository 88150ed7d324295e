/* The instant in which the kernel has already let go of a reaped process and does not tell its exit yet, held fast: the calls
 * of pidfd.c, but the first ones of ioctl fail with ESRCH. A shared object for the tests. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sys/ioctl.h>

/* How many calls of ioctl are to come too early. */
extern int too_early;
int too_early;

#define ioctl(fd, request, argument) (too_early > 0 ? (too_early--, errno = ESRCH, -1) : ioctl(fd, request, argument))
#include "../../cffi_build/pidfd.c"
