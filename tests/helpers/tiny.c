/* A child that lives until its standard input has no writer any more, then exits with the first byte of its argument.
 *
 * Ten thousand of these live at once: no libc, a handful of pages. */

#if defined(__x86_64__)

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
enum { READ = 0, EXIT_GROUP = 231 };
__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call live\n");

#elif defined(__aarch64__)

static long call(long number, long a, long b, long c)
{
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}
enum { READ = 63, EXIT_GROUP = 94 };
__asm__(".globl _start\n_start: mov x0, sp\n bl live\n");

#else
#error unsupported architecture
#endif

/* `stack` is as the kernel leaves it: argc, then argv. */
void live(char **stack);
void live(char **stack)
{
    char byte;

    while (call(READ, 0, (long)&byte, 1) > 0)
        ;
    for (;;)
        call(EXIT_GROUP, (unsigned char)stack[2][0], 0, 0);
}
