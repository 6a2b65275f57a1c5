/* fanwise.kernel._native: the module. Heap types, multi-phase init and no static mutable state, so
 * that it may be loaded by several interpreters and without the interpreter lock. */
#include "_native.h"

static int fw_exec(PyObject *m)
{
    if (fw_add_drain(m) < 0 || fw_add_tree(m) < 0 || fw_add_decoder(m) < 0 ||
        fw_add_index(m) < 0 || fw_add_scan(m) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot fw_slots[] = {
    {Py_mod_exec, (void *)fw_exec},
    /* Hidden by the limited API of 3.11, whose interpreters refuse slots that they do not know. */
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef fw_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fanwise.kernel._native",
    .m_doc = "The native parts of fanwise.",
    .m_size = 0,
    .m_slots = fw_slots,
};

/* PyMODINIT_FUNC exports the symbol in spite of -fvisibility=hidden. */
PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&fw_module);
}
