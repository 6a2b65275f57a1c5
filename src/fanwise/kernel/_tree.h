/* The directory tree keyed by file handle, shared by _table.c (the Python type) and _decode.c. */
#ifndef FW_TREE_H
#define FW_TREE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>

#define FW_NONE 0xffffffffu
#define FW_KEY_MAX 132 /* 4 bytes of handle type + MAX_HANDLE_SZ */

/* Node flags; the Python side uses the same numbers (_pure_tree.py). */
#define FW_ROOT 1u     /* a watched root: inside from here down */
#define FW_TOP 2u      /* root of the mount: its name is an absolute path */
#define FW_EXCLUDED 4u /* excluded subtree */
#define FW_FILES 8u    /* only named files in this directory are watched */
#define FW_CURRENT 16u /* paths below may be newer than the record */
#define FW_ZOMBIE 32u  /* removed, kept until its window ends and its children left */
#define FW_SCANNED 64u /* its subdirectories are known or being read */
#define FW_FREE 128u
/* What a caller may set; the other two are the tree's own. */
#define FW_SETTABLE (FW_ROOT | FW_TOP | FW_EXCLUDED | FW_FILES | FW_CURRENT | FW_SCANNED)

/* Scope of a directory, as resolve() tells it. */
#define FW_IN 1u
#define FW_IN_CURRENT 2u
#define FW_IN_FILES 4u

typedef struct {
    uint32_t parent, hash, off, flags, kids;
    uint16_t namelen, keylen;
} fw_node;

typedef struct {
    uint32_t id, scope;
    uint64_t generation;
    char *prefix; /* absolute path of the directory, "" for "/" */
    size_t len, cap;
} fw_prefix;

#define FW_PREFIXES 1024
#define FW_PREFIX_MAX 65536 /* a longer path shares one more slot: whoever makes them pays */

typedef struct {
    PyObject_HEAD
    fw_node *nodes;
    uint32_t limit, cap, free, count;
    uint32_t *slots, mask;
    uint8_t *arena;
    size_t used, room, garbage;
    uint32_t *zombies, nzombies, zcap;
    uint32_t *chain;
    size_t chaincap;
    uint64_t generation;
    int recursive;
    fw_prefix *prefixes;
} fw_tree;

static inline uint32_t fw_hash(const uint8_t *p, size_t n)
{
    uint64_t h = 0x9e3779b97f4a7c15ull ^ n;
    while (n >= 8) {
        uint64_t w;
        __builtin_memcpy(&w, p, 8);
        h = (h ^ w) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
        p += 8;
        n -= 8;
    }
    uint64_t w = 0;
    __builtin_memcpy(&w, p, n);
    h = (h ^ w) * 0xff51afd7ed558ccdull;
    h ^= h >> 29;
    h *= 0xc4ceb9fe1a85ec53ull;
    return (uint32_t)(h ^ (h >> 32));
}

uint32_t fw_tree_find(const fw_tree *t, const uint8_t *key, size_t len);
/* The cached prefix of a directory; NULL with MemoryError set. */
const fw_prefix *fw_tree_resolve(fw_tree *t, uint32_t id);

#endif
