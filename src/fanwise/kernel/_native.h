/* Shared by the files of fanwise.kernel._native. */
#ifndef FW_NATIVE_H
#define FW_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

typedef struct {
    const uint8_t *p;
    uint32_t n;
} fw_span;

/* One fanotify record; its spans point into the chunk that it is in. */
typedef struct {
    uint64_t mask;
    int32_t pid;
    uint32_t len;
    fw_span dir, name, dir2, name2, target;
    int has_name; /* DFID_NAME or OLD_DFID_NAME was there */
} fw_record;

/* The record at off; NULL, or what is wrong with it. */
const char *fw_parse(const uint8_t *b, size_t n, size_t off, fw_record *r);
/* Set DecodeError; -1. */
int fw_decode_error(size_t off, const char *why);
/* An event on a directory itself: name "." (or a DFID without a name). */
int fw_is_self(const fw_record *r);
/* The chunk at place i of the window of a Decoder; 0 behind the last. It lives until the window ends. */
int fw_window_chunk(PyObject *decoder, size_t i, fw_span *chunk);
/* Where the next record to decode stands: its chunk, and where in it. */
void fw_window_at(PyObject *decoder, size_t *i, size_t *off);

/* Each adds its types to the module; -1 with a Python error set. */
int fw_add_drain(PyObject *m);
int fw_add_tree(PyObject *m);
int fw_add_decoder(PyObject *m);
int fw_add_index(PyObject *m);
int fw_add_scan(PyObject *m);

#endif
