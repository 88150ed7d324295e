/* A child that reads two bytes from its standard input, and ends as they say: 'x' and its exit code, or 's' and the signal
 * that kills it. */
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(void)
{
    unsigned char order[2] = {'x', 99};
    sigset_t none;

    (void)prctl(PR_SET_DUMPABLE, 0); /* no thousands of core dumps */
    if (read(0, order, sizeof order) != (ssize_t)sizeof order)
        _exit(99);
    if (order[0] == 's') {
        (void)sigemptyset(&none);
        (void)sigprocmask(SIG_SETMASK, &none, 0);
        (void)signal(order[1], SIG_DFL);
        (void)kill(getpid(), order[1]);
    }
    _exit(order[1]);
}
