/* A program that looks at its descriptors: reporter END [FD...]
 *
 * Exits with 254 unless exactly 0, 1, 2 and those named are open. Then it copies stdin to stdout, if END starts with '+', and
 * ends as the rest of END says: an exit code, or minus the signal that kills it. */
#include <dirent.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

static int is_wanted(int fd, int count, char **wanted)
{
    int i;

    for (i = 0; i < count; i++)
        if (atoi(wanted[i]) == fd)
            return 1;
    return fd <= 2;
}

int main(int argc, char **argv)
{
    DIR *descriptors = opendir("/proc/self/fd");
    struct dirent *entry;
    const char *end;
    int found = 0, code;

    if (argc < 2 || descriptors == NULL)
        _exit(253);
    while ((entry = readdir(descriptors)) != NULL) {
        int fd = atoi(entry->d_name);
        if (entry->d_name[0] == '.' || fd == dirfd(descriptors))
            continue;
        if (!is_wanted(fd, argc - 2, argv + 2))
            _exit(254);
        found++;
    }
    if (found != 3 + argc - 2)
        _exit(254);

    end = argv[1];
    if (*end == '+') {
        char text[4096];
        ssize_t length;
        while ((length = read(0, text, sizeof text)) > 0)
            if (write(1, text, (size_t)length) != length)
                _exit(252);
        end++;
    }
    code = atoi(end);
    (void)prctl(PR_SET_DUMPABLE, 0); /* no core dumps */
    if (code < 0) {
        sigset_t none;
        (void)sigemptyset(&none);
        (void)sigprocmask(SIG_SETMASK, &none, 0);
        (void)signal(-code, SIG_DFL);
        (void)kill(getpid(), -code);
    }
    _exit(code);
}
