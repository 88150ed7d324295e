/* What a forked child begins and ends with, in C. cffi does not read this file. */
#ifndef AP_LIVE_CHILD_H
#define AP_LIVE_CHILD_H

#include <Python.h>

/* In a newly forked child, with the GIL: call live(gate, mask), then end the process, also if that raises. */
_Noreturn void ap_live_child(PyObject *live, int gate, unsigned long long mask);

#endif
