/* nopidfd: run a command with chosen system calls failing, by a seccomp filter, as an old kernel or a strict sandbox does.
 *
 *   nopidfd RULE[=ERRNO],... COMMAND [ARGUMENT...]
 *
 * An ERRNO is a name or a number, ENOSYS if there is none. The rules are in the table below. The filter holds for every
 * child, too, and survives exec. Built as a shared object it is ap_install_filter(rules), for this process from now on. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "syscalls.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#elif defined(__riscv) && __riscv_xlen == 64
#define ARCH AUDIT_ARCH_RISCV64
#else
#error "unsupported architecture: no AUDIT_ARCH is known for it"
#endif

/* As those of syscalls.h: older headers lack them. */
enum { NR_IO_URING_SETUP = 425, NR_PIDFD_GETFD = 438 };

/* A call is refused if the low half of argument `arg`, masked by `mask`, is `value`. A mask of 0 refuses every call. */
struct rule {
    const char *name;
    int number;
    unsigned int arg;
    uint32_t mask, value;
};

static const struct rule rules[] = {
    {"pidfd_open", SYS_pidfd_open, 0, 0, 0},
    {"pidfd_send_signal", SYS_pidfd_send_signal, 0, 0, 0},
    {"pidfd_send_signal_group", SYS_pidfd_send_signal, 3, 4, 4}, /* PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9 */
    {"pidfd_getfd", NR_PIDFD_GETFD, 0, 0, 0},
    {"pidfd_get_info", SYS_ioctl, 1, 0xC000FFFF, 0xC000FF0B}, /* PIDFD_GET_INFO with a struct of any size, Linux 6.13 */
    {"waitid", SYS_waitid, 0, 0, 0},
    {"waitid_pidfd", SYS_waitid, 0, 0xFFFFFFFF, AP_P_PIDFD}, /* Linux 5.4 */
    {"clone3", SYS_clone3, 0, 0, 0},
    {"close_range", SYS_close_range, 0, 0, 0}, /* Linux 5.9 */
    {"clone_pidfd", SYS_clone, 0, CLONE_PIDFD, CLONE_PIDFD}, /* by the old call, Linux 5.2 */
    {"epoll_add", SYS_epoll_ctl, 1, 0xFFFFFFFF, 1}, /* EPOLL_CTL_ADD */
    {"io_uring_setup", NR_IO_URING_SETUP, 0, 0, 0},
};

static const struct {
    const char *name;
    uint32_t code;
} errnos[] = {
    {"EACCES", EACCES}, {"EAGAIN", EAGAIN}, {"EINVAL", EINVAL}, {"EMFILE", EMFILE}, {"ENFILE", ENFILE}, {"ENOMEM", ENOMEM},
    {"ENOSPC", ENOSPC}, {"ENOSYS", ENOSYS}, {"ENOTTY", ENOTTY}, {"EPERM", EPERM},   {"ESRCH", ESRCH},
};

enum { RULE_LENGTH = 6, MAX_RULES = 32, MAX_LENGTH = 4 + MAX_RULES * RULE_LENGTH };

struct program {
    unsigned short length;
    struct sock_filter code[MAX_LENGTH];
};

/* Appends a statement, or a jump that skips `if_false` statements if its test fails. */
static void emit(struct program *program, int operation, int if_false, uint32_t operand)
{
    program->code[program->length++] =
        (struct sock_filter){.code = (uint16_t)operation, .jf = (uint8_t)if_false, .k = operand};
}

static void emit_rule(struct program *program, const struct rule *rule, uint32_t code)
{
    /* The low half comes first: every architecture above is little-endian. */
    uint32_t argument = (uint32_t)offsetof(struct seccomp_data, args) + 8 * rule->arg;

    emit(program, BPF_LD | BPF_W | BPF_ABS, 0, offsetof(struct seccomp_data, nr));
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, rule->mask != 0 ? 4 : 1, (uint32_t)rule->number);
    if (rule->mask != 0) {
        emit(program, BPF_LD | BPF_W | BPF_ABS, 0, argument);
        emit(program, BPF_ALU | BPF_AND | BPF_K, 0, rule->mask);
        emit(program, BPF_JMP | BPF_JEQ | BPF_K, 1, rule->value);
    }
    emit(program, BPF_RET | BPF_K, 0, SECCOMP_RET_ERRNO | code);
}

/* Returns the errno of that name or number, 0 if it is neither. */
static uint32_t parse_errno(const char *text)
{
    char *end;
    unsigned long number;
    size_t i;

    for (i = 0; i < sizeof errnos / sizeof *errnos; i++)
        if (strcmp(errnos[i].name, text) == 0)
            return errnos[i].code;
    number = strtoul(text, &end, 0);
    return *end == '\0' && number < 4096 ? (uint32_t)number : 0;
}

/* Compiles "RULE[=ERRNO]"; returns whether it is one. */
static int parse_rule(char *text, struct program *program)
{
    char *errno_name = strchr(text, '=');
    uint32_t code = ENOSYS;
    size_t i;

    if (errno_name != NULL) {
        *errno_name = '\0';
        code = parse_errno(errno_name + 1);
    }
    for (i = 0; i < sizeof rules / sizeof *rules && code != 0; i++)
        if (strcmp(rules[i].name, text) == 0) {
            emit_rule(program, &rules[i], code);
            return 1;
        }
    return 0;
}

/* Have the calls in `list` fail from now on, in this thread and in its new threads and children. -EINVAL: a rule is wrong.
 * Several filters may refuse a call: then the last one decides the errno. Other errors: see seccomp(2). */
int ap_install_filter(const char *list);

int ap_install_filter(const char *list)
{
    static struct program program; /* too large for the stack of an unknown caller */
    struct sock_fprog filter = {.filter = program.code};
    char copy[1024], *rule, *rest = copy;
    int count = 0;

    if (strlen(list) >= sizeof copy)
        return -EINVAL;
    memcpy(copy, list, strlen(list) + 1);
    program.length = 0;
    emit(&program, BPF_LD | BPF_W | BPF_ABS, 0, offsetof(struct seccomp_data, arch));
    program.code[program.length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0);
    emit(&program, BPF_RET | BPF_K, 0, SECCOMP_RET_ALLOW);
    while ((rule = strsep(&rest, ",")) != NULL)
        if (++count > MAX_RULES || !parse_rule(rule, &program))
            return -EINVAL;
    emit(&program, BPF_RET | BPF_K, 0, SECCOMP_RET_ALLOW);
    filter.len = program.length;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter) < 0)
        return -errno;
    return 0;
}

int main(int argc, char **argv)
{
    int result;

    if (argc < 3) {
        (void)fprintf(stderr, "usage: nopidfd RULE[=ERRNO],... COMMAND [ARGUMENT...]\n");
        return 2;
    }
    result = ap_install_filter(argv[1]);
    if (result < 0) {
        (void)fprintf(stderr, "nopidfd: %s: %s\n", argv[1], strerror(-result));
        return 2;
    }
    (void)execvp(argv[2], argv + 2);
    perror(argv[2]);
    return 127;
}
