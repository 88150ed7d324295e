/* The child of the benchmarks: lives until nobody can write to its stdin any more, then exits with 0.
 *
 * Ten thousand of these live at once, so there is no libc in it where we know how to do without: an exec of some 10 KB that
 * touches a handful of pages. It also ends by itself when the process that made it is killed. */

#if defined(__x86_64__)

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
enum { READ = 0, EXIT_GROUP = 231 };

#elif defined(__aarch64__)

static long call(long number, long a, long b, long c)
{
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}
enum { READ = 63, EXIT_GROUP = 94 };

#endif

#if defined(__x86_64__) || defined(__aarch64__)

void _start(void)
{
    char byte;

    while (call(READ, 0, (long)&byte, 1) > 0)
        ;
    for (;;)
        call(EXIT_GROUP, 0, 0, 0);
}

#else

#include <unistd.h>

int main(void)
{
    char byte;

    while (read(0, &byte, 1) > 0)
        ;
    _exit(0);
}

#endif
