/* Starts programs by spawn.c without Python, so that it can be compiled in many ways: see test_clone3.py.
 *
 *   spawner PROGRAM [ARGUMENT...]
 *
 * Starts PROGRAM five times, each time with a pidfd, and once what is not there. Exits with 0 if all was right, else says what was
 * not. */
#include <Python.h>

#include "pidfd.h"
#include "reaper.h"
#include "spawn.h"
#include "syscalls.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

/* What spawn.c wants of Python: there is one thread here. */
PyGILState_STATE PyGILState_Ensure(void)
{
    return PyGILState_LOCKED;
}

void PyGILState_Release(PyGILState_STATE state)
{
    (void)state;
}

static int fail(const char *what, int result)
{
    (void)fprintf(stderr, "%s: %d\n", what, result);
    return 1;
}

int main(int argc, char **argv)
{
    char block[1024], *end = block;
    int reaper = ap_reaper_open(), result, i;
    ap_program program = {0, -1, 0};
    ap_exit ended;

    if (argc < 2 || reaper < 0)
        return fail("usage", argc);
    for (i = 1; i < argc; i++)
        end = stpcpy(end, argv[i]) + 1;
    for (i = 0; i < 5; i++) {
        result = ap_spawn(&program, reaper, argv[1], 1, block, argc - 1, NULL, -1, "/", NULL, 0, -1, -1, -1, -1, -1,
                          AP_SPAWN_CLOSE_FDS | AP_SPAWN_RESTORE_SIGNALS);
        if (result != 0 || program.pid <= 0 || program.pidfd < 0 || !program.held)
            return fail("ap_spawn", result);
        if (ap_waitid(AP_P_PIDFD, program.pidfd, WEXITED, &ended) != 1 || ended.status != 3 << 8)
            return fail("status", ended.status);
    }
    program = (ap_program){0, -1, 0};
    result = ap_spawn(&program, reaper, "/no/such", 1, block, argc - 1, NULL, -1, NULL, NULL, 0, -1, -1, -1, -1, -1, 0);
    if (result != -(AP_STEP_EXEC << 16 | ENOENT) || program.pid != 0)
        return fail("what is not there", result);
    result = ap_spawn(&program, reaper, argv[1], 1, block, argc - 1, NULL, -1, "/no/such", NULL, 0, -1, -1, -1, -1, -1, 0);
    if (result != -(AP_STEP_CHDIR << 16 | ENOENT) || program.pid != 0)
        return fail("a folder that is not there", result);
    if (waitpid(-1, NULL, __WALL) != -1 || errno != ECHILD)
        return fail("a child is left", errno);
    return 0;
}
