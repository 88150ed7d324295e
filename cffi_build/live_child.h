/* The first and the last of a forked child, in C. Not for cffi. */
#ifndef AP_LIVE_CHILD_H
#define AP_LIVE_CHILD_H

#include <Python.h>

/* In a newly forked child, with the GIL: call live(gate, mask), and end the process, whatever comes of that. */
_Noreturn void ap_live_child(PyObject *live, int gate, unsigned long long mask);

#endif
