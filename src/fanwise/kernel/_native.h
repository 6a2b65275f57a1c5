/* Shared by the files of fanwise.kernel._native. */
#ifndef FW_NATIVE_H
#define FW_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Each adds its types to the module; -1 with a Python error set. */
int fw_add_drain(PyObject *m);
int fw_add_tree(PyObject *m);
int fw_add_decoder(PyObject *m);
int fw_add_scan(PyObject *m);

#endif
