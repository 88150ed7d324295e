/* What the kernel has and headers of older C libraries lack. The numbers of system calls since 424 are the same on every
 * architecture but alpha, and all of these are fixed for ever. Define _GNU_SOURCE before. cffi does not read this file. */
#ifndef AP_SYSCALLS_H
#define AP_SYSCALLS_H

#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424 /* Linux 5.1 */
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434 /* Linux 5.3 */
#endif
#ifndef SYS_clone3
#define SYS_clone3 435 /* Linux 5.3 */
#endif
#ifndef SYS_close_range
#define SYS_close_range 436 /* Linux 5.9 */
#endif

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000 /* Linux 5.2 */
#endif
#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL /* Linux 5.5, for clone3 alone */
#endif

/* P_PIDFD for waitid, Linux 5.4. In C libraries that have it, it is an enumerator, for which the preprocessor cannot ask. */
enum { AP_P_PIDFD = 3 };

/* The kernel's struct clone_args. Kernels before 5.5 know its first form alone, which ends before set_tid. */
struct ap_clone_args {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
    uint64_t set_tid, set_tid_size; /* Linux 5.5 */
};
enum { AP_CLONE_ARGS_V0 = 64 }; /* the size of the first form, CLONE_ARGS_SIZE_VER0 */
_Static_assert(sizeof(struct ap_clone_args) == 80, "the kernel tells the forms apart by size");

#endif
