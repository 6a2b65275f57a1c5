/* Tree: directories keyed by file handle, in compact arrays (about 60 bytes each beyond the name).
 *
 * REFS      a node is named by its index; a node counts the nodes that have it as parent (kids).
 * LOCKING   none: one owner calls it, under the interpreter lock.
 * LIFETIME  LIVE -> ZOMBIE (drop: still found, because later records of one read may name it)
 *           -> FREE (sweep: only once no child is left). An index is used again only after that.
 */
#include "_native.h"
#include "_tree.h"
#include <stdlib.h>
#include <string.h>

static inline const uint8_t *key_of(const fw_tree *t, const fw_node *n)
{
    return t->arena + n->off;
}

static inline const char *name_of(const fw_tree *t, const fw_node *n)
{
    return (const char *)t->arena + n->off + n->keylen;
}

uint32_t fw_tree_find(const fw_tree *t, const uint8_t *key, size_t len)
{
    if (!t->slots)
        return FW_NONE;
    uint32_t h = fw_hash(key, len), i = h & t->mask, id;
    while ((id = t->slots[i]) != FW_NONE) {
        const fw_node *n = &t->nodes[id];
        if (n->hash == h && n->keylen == len && !memcmp(key_of(t, n), key, len))
            return id;
        i = (i + 1) & t->mask;
    }
    return FW_NONE;
}

static int slots_grow(fw_tree *t)
{
    uint32_t size = t->slots ? (t->mask + 1) * 2 : 64;
    uint32_t *s = malloc((size_t)size * sizeof *s);
    if (!s)
        return -1;
    memset(s, 0xff, (size_t)size * sizeof *s);
    for (uint32_t id = 0; id < t->limit; id++) {
        if (t->nodes[id].flags & FW_FREE)
            continue;
        uint32_t i = t->nodes[id].hash & (size - 1);
        while (s[i] != FW_NONE)
            i = (i + 1) & (size - 1);
        s[i] = id;
    }
    free(t->slots);
    t->slots = s;
    t->mask = size - 1;
    return 0;
}

static void slots_remove(fw_tree *t, uint32_t id)
{
    uint32_t i = t->nodes[id].hash & t->mask;
    while (t->slots[i] != id)
        i = (i + 1) & t->mask;
    /* Shift back what probed past the hole, so that no tombstones pile up. */
    for (uint32_t j = i;;) {
        j = (j + 1) & t->mask;
        uint32_t other = t->slots[j];
        if (other == FW_NONE)
            break;
        uint32_t home = t->nodes[other].hash & t->mask;
        if (((j - home) & t->mask) >= ((j - i) & t->mask)) {
            t->slots[i] = other;
            i = j;
        }
    }
    t->slots[i] = FW_NONE;
}

static int arena_room(fw_tree *t, size_t need)
{
    if (t->garbage > 65536 && t->garbage > t->used / 2) {
        uint8_t *a = malloc(t->used - t->garbage + need + 4096);
        if (!a)
            return -1;
        size_t at = 0;
        for (uint32_t id = 0; id < t->limit; id++) {
            fw_node *n = &t->nodes[id];
            if (n->flags & FW_FREE)
                continue;
            memcpy(a + at, t->arena + n->off, (size_t)n->keylen + n->namelen);
            n->off = (uint32_t)at;
            at += (size_t)n->keylen + n->namelen;
        }
        free(t->arena);
        t->arena = a;
        t->room = t->used - t->garbage + need + 4096;
        t->used = at;
        t->garbage = 0;
    }
    if (t->arena && t->used + need <= t->room)
        return 0;
    size_t room = t->room + t->room / 4 + need + 1024;
    if (room > 0xfffffff0u)
        return -1;
    uint8_t *a = realloc(t->arena, room);
    if (!a)
        return -1;
    t->arena = a;
    t->room = room;
    return 0;
}

static int live(const fw_tree *t, uint32_t id)
{
    return id < t->limit && !(t->nodes[id].flags & FW_FREE);
}

static uint32_t node_new(fw_tree *t)
{
    if (t->free != FW_NONE) {
        uint32_t id = t->free;
        t->free = t->nodes[id].parent;
        return id;
    }
    if (t->limit == t->cap) {
        uint32_t cap = t->cap + t->cap / 4 + 64;
        fw_node *n = realloc(t->nodes, (size_t)cap * sizeof *n);
        if (!n)
            return FW_NONE;
        t->nodes = n;
        t->cap = cap;
    }
    return t->limit++;
}

static void kid(fw_tree *t, uint32_t parent, int by)
{
    if (parent != FW_NONE)
        t->nodes[parent].kids += (uint32_t)by;
}

const fw_prefix *fw_tree_resolve(fw_tree *t, uint32_t id)
{
    fw_prefix *e = &t->prefixes[id % FW_PREFIXES];
    if (e->id == id && e->generation == t->generation)
        return e;
    uint32_t scope = 0, at = id;
    int inside = 0, cut = 0;
    size_t depth = 0, len = 0;
    for (;;) {
        const fw_node *n = &t->nodes[at];
        if (depth == t->chaincap) {
            size_t cap = t->chaincap * 2 + 64;
            uint32_t *c = realloc(t->chain, cap * sizeof *c);
            if (!c)
                goto nomem;
            t->chain = c;
            t->chaincap = cap;
        }
        t->chain[depth++] = at;
        len += (size_t)n->namelen + 1;
        if (n->flags & FW_CURRENT)
            scope |= FW_IN_CURRENT;
        if (!inside) {
            if (n->flags & FW_EXCLUDED)
                cut = 1;
            else if (n->flags & FW_ROOT && (t->recursive || depth == 1))
                inside = !cut;
        }
        if (n->flags & FW_TOP || n->parent == FW_NONE)
            break;
        at = n->parent;
        if (depth > t->count) { /* a loop: only merged renames can make one, for one window */
            inside = 0;
            depth = 0;
            at = id;
            break;
        }
    }
    if (!(t->nodes[at].flags & FW_TOP))
        inside = 0, depth = 0;
    if (inside)
        scope |= FW_IN;
    else if (depth && t->nodes[id].flags & FW_FILES)
        scope |= FW_IN_FILES;
    if (len > FW_PREFIX_MAX)
        e = &t->prefixes[FW_PREFIXES];
    if (len > e->cap) {
        char *p = realloc(e->prefix, len);
        if (!p)
            goto nomem;
        e->prefix = p;
        e->cap = len;
    }
    char *o = e->prefix;
    for (size_t i = depth; i--;) {
        const fw_node *n = &t->nodes[t->chain[i]];
        const char *name = name_of(t, n);
        size_t nl = n->namelen;
        if (n->flags & FW_TOP) {
            if (nl == 1 && name[0] == '/')
                nl = 0;
        } else
            *o++ = '/';
        memcpy(o, name, nl);
        o += nl;
    }
    e->len = depth ? (size_t)(o - e->prefix) : 0;
    e->id = id;
    e->scope = depth ? scope : 0;
    e->generation = t->generation;
    return e;
nomem:
    e->id = FW_NONE;
    PyErr_NoMemory();
    return NULL;
}

/* ---- Python type ---- */

/* Exactly an int: __index__ of anything else could run code that changes the tree meanwhile. */
static long long as_int(PyObject *o, int *over)
{
    *over = 0;
    if (PyLong_Check(o))
        return PyLong_AsLongLongAndOverflow(o, over);
    PyErr_SetString(PyExc_TypeError, "an integer is required");
    return -1;
}

static int arg_id(fw_tree *t, PyObject *o, uint32_t *ret)
{
    int over;
    long long v = as_int(o, &over);
    if (v == -1 && !over && PyErr_Occurred())
        return -1;
    if (over || v < 0 || v >= (long long)FW_NONE || !live(t, (uint32_t)v)) {
        PyErr_SetString(PyExc_KeyError, "no such directory");
        return -1;
    }
    *ret = (uint32_t)v;
    return 0;
}

static int arg_parent(fw_tree *t, PyObject *o, uint32_t *ret)
{
    int over;
    long long v = as_int(o, &over);
    if (v == -1 && !over && !PyErr_Occurred()) {
        *ret = FW_NONE;
        return 0;
    }
    return v == -1 && !over ? -1 : arg_id(t, o, ret);
}

static int arg_bytes(PyObject *o, char **p, Py_ssize_t *n, Py_ssize_t max, const char *what)
{
    if (PyBytes_AsStringAndSize(o, p, n) < 0)
        return -1;
    if (*n > max) {
        PyErr_Format(PyExc_ValueError, "%s longer than %zd bytes", what, max);
        return -1;
    }
    return 0;
}

static int arg_flags(PyObject *o, uint32_t *ret)
{
    int over;
    long long v = as_int(o, &over);
    if (v == -1 && !over && PyErr_Occurred())
        return -1;
    if (over || v & ~(long long)FW_SETTABLE) {
        PyErr_SetString(PyExc_ValueError, "not flags of a directory");
        return -1;
    }
    *ret = (uint32_t)v;
    return 0;
}

static int need(Py_ssize_t have, Py_ssize_t want)
{
    if (have == want)
        return 0;
    PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", want, have);
    return -1;
}

static int set_name(fw_tree *t, uint32_t id, uint32_t parent, const char *name, Py_ssize_t nl)
{
    fw_node *n = &t->nodes[id];
    if (n->parent == parent && n->namelen == nl && !memcmp(name_of(t, n), name, (size_t)nl))
        return 0;
    uint8_t key[FW_KEY_MAX];
    size_t kl = n->keylen;
    memcpy(key, key_of(t, n), kl);
    if (arena_room(t, kl + (size_t)nl) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    n = &t->nodes[id];
    t->garbage += kl + n->namelen;
    n->off = (uint32_t)t->used;
    memcpy(t->arena + t->used, key, kl);
    memcpy(t->arena + t->used + kl, name, (size_t)nl);
    t->used += kl + (size_t)nl;
    n->namelen = (uint16_t)nl;
    kid(t, n->parent, -1);
    kid(t, parent, 1);
    n->parent = parent;
    t->generation++;
    return 0;
}

static PyObject *tree_put(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    fw_tree *t = (fw_tree *)self;
    char *key, *name;
    Py_ssize_t kl, nl;
    uint32_t parent, flags;
    if (need(na, 4) || arg_bytes(a[0], &key, &kl, FW_KEY_MAX, "handle key") ||
        arg_parent(t, a[1], &parent) || arg_bytes(a[2], &name, &nl, 65535, "name") ||
        arg_flags(a[3], &flags))
        return NULL;
    uint32_t id = fw_tree_find(t, (uint8_t *)key, (size_t)kl);
    if (id != FW_NONE) {
        if (set_name(t, id, parent, name, nl) < 0)
            return NULL;
        if (t->nodes[id].flags & FW_ZOMBIE) /* sweep() then passes it over */
            t->nodes[id].flags &= ~FW_ZOMBIE;
        if (flags & ~t->nodes[id].flags) {
            t->nodes[id].flags |= flags;
            t->generation++;
        }
        return PyLong_FromUnsignedLong(id);
    }
    if ((!t->slots || (uint64_t)(t->count + 1) * 4 > (uint64_t)(t->mask + 1) * 3) &&
        slots_grow(t) < 0)
        return PyErr_NoMemory();
    if (arena_room(t, (size_t)(kl + nl)) < 0 || (id = node_new(t)) == FW_NONE)
        return PyErr_NoMemory();
    fw_node *n = &t->nodes[id];
    *n = (fw_node){.parent = parent,
                   .hash = fw_hash((uint8_t *)key, (size_t)kl),
                   .off = (uint32_t)t->used,
                   .flags = flags,
                   .namelen = (uint16_t)nl,
                   .keylen = (uint16_t)kl};
    memcpy(t->arena + t->used, key, (size_t)kl);
    memcpy(t->arena + t->used + kl, name, (size_t)nl);
    t->used += (size_t)(kl + nl);
    kid(t, parent, 1);
    t->count++;
    uint32_t i = n->hash & t->mask;
    while (t->slots[i] != FW_NONE)
        i = (i + 1) & t->mask;
    t->slots[i] = id;
    /* The index may have been used before: its cached prefix is someone else's. */
    if (t->prefixes[id % FW_PREFIXES].id == id)
        t->prefixes[id % FW_PREFIXES].id = FW_NONE;
    return PyLong_FromUnsignedLong(id);
}

static PyObject *tree_find(PyObject *self, PyObject *key)
{
    char *k;
    Py_ssize_t kl;
    if (PyBytes_AsStringAndSize(key, &k, &kl) < 0)
        return NULL;
    uint32_t id = fw_tree_find((fw_tree *)self, (uint8_t *)k, (size_t)kl);
    return PyLong_FromLongLong(id == FW_NONE ? -1 : (long long)id);
}

static PyObject *tree_move(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    fw_tree *t = (fw_tree *)self;
    uint32_t id, parent;
    char *name;
    Py_ssize_t nl;
    if (need(na, 3) || arg_id(t, a[0], &id) || arg_parent(t, a[1], &parent) ||
        arg_bytes(a[2], &name, &nl, 65535, "name") || set_name(t, id, parent, name, nl) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *tree_flag(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    fw_tree *t = (fw_tree *)self;
    uint32_t id, set, clear;
    if (need(na, 3) || arg_id(t, a[0], &id) || arg_flags(a[1], &set) || arg_flags(a[2], &clear))
        return NULL;
    uint32_t flags = (t->nodes[id].flags & ~clear) | set;
    if ((flags ^ t->nodes[id].flags) & ~FW_SCANNED)
        t->generation++;
    t->nodes[id].flags = flags;
    Py_RETURN_NONE;
}

static PyObject *tree_info(PyObject *self, PyObject *o)
{
    fw_tree *t = (fw_tree *)self;
    uint32_t id;
    if (arg_id(t, o, &id))
        return NULL;
    const fw_node *n = &t->nodes[id];
    return Py_BuildValue("(Ly#Iy#I)", n->parent == FW_NONE ? -1LL : (long long)n->parent,
                         name_of(t, n), (Py_ssize_t)n->namelen, n->flags,
                         (const char *)key_of(t, n), (Py_ssize_t)n->keylen, n->kids);
}

static PyObject *tree_resolve(PyObject *self, PyObject *o)
{
    fw_tree *t = (fw_tree *)self;
    uint32_t id;
    if (arg_id(t, o, &id))
        return NULL;
    const fw_prefix *e = fw_tree_resolve(t, id);
    if (!e)
        return NULL;
    return Py_BuildValue("(Iy#)", e->scope, e->prefix ? e->prefix : "", (Py_ssize_t)e->len);
}

static PyObject *tree_drop(PyObject *self, PyObject *o)
{
    fw_tree *t = (fw_tree *)self;
    uint32_t id;
    if (arg_id(t, o, &id))
        return NULL;
    if (t->nodes[id].flags & FW_ZOMBIE)
        Py_RETURN_NONE;
    if (t->nzombies == t->zcap) {
        uint32_t cap = t->zcap * 2 + 64;
        uint32_t *z = realloc(t->zombies, (size_t)cap * sizeof *z);
        if (!z)
            return PyErr_NoMemory();
        t->zombies = z;
        t->zcap = cap;
    }
    t->nodes[id].flags |= FW_ZOMBIE;
    t->zombies[t->nzombies++] = id;
    Py_RETURN_NONE;
}

static PyObject *tree_sweep(PyObject *self, PyObject *unused)
{
    (void)unused;
    fw_tree *t = (fw_tree *)self;
    long freed = 0;
    for (uint32_t i = 0; i < t->nzombies; i++) {
        /* One that was revived by put(), or is listed twice, is no zombie. Dropped parents stand
         * before their children or after them: the last child takes them along. */
        uint32_t id = t->zombies[i], parent;
        for (; id != FW_NONE; id = parent) {
            fw_node *n = &t->nodes[id];
            if (!(n->flags & FW_ZOMBIE) || n->kids)
                break;
            parent = n->parent;
            slots_remove(t, id);
            kid(t, parent, -1);
            t->garbage += (size_t)n->keylen + n->namelen;
            n->flags = FW_FREE;
            n->parent = t->free;
            t->free = id;
            t->count--;
            if (t->prefixes[id % FW_PREFIXES].id == id)
                t->prefixes[id % FW_PREFIXES].id = FW_NONE;
            freed++;
        }
    }
    uint32_t keep = 0;
    for (uint32_t i = 0; i < t->nzombies; i++)
        if (t->nodes[t->zombies[i]].flags & FW_ZOMBIE)
            t->zombies[keep++] = t->zombies[i];
    t->nzombies = keep;
    return PyLong_FromLong(freed);
}

static void tree_reset(fw_tree *t)
{
    free(t->nodes);
    free(t->slots);
    free(t->arena);
    free(t->zombies);
    t->nodes = NULL;
    t->slots = t->zombies = NULL;
    t->arena = NULL;
    t->limit = t->cap = t->count = t->mask = t->nzombies = t->zcap = 0;
    t->used = t->room = t->garbage = 0;
    t->free = FW_NONE;
    t->generation++;
}

static PyObject *tree_clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    tree_reset((fw_tree *)self);
    Py_RETURN_NONE;
}

static PyObject *tree_ids(PyObject *self, PyObject *unused)
{
    (void)unused;
    fw_tree *t = (fw_tree *)self;
    PyObject *l = PyList_New(0);
    for (uint32_t id = 0; l && id < t->limit; id++) {
        if (t->nodes[id].flags & (FW_FREE | FW_ZOMBIE))
            continue;
        PyObject *o = PyLong_FromUnsignedLong(id);
        if (!o || PyList_Append(l, o) < 0)
            Py_CLEAR(l);
        Py_XDECREF(o);
    }
    return l;
}

static Py_ssize_t tree_len(PyObject *self)
{
    return ((fw_tree *)self)->count;
}

static PyObject *tree_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    fw_tree *t = (fw_tree *)self;
    size_t n = sizeof *t + (size_t)t->cap * sizeof *t->nodes + t->room + t->zcap * 4ul;
    if (t->slots)
        n += ((size_t)t->mask + 1) * 4;
    return PyLong_FromSize_t(n);
}

static PyObject *tree_get_recursive(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((fw_tree *)self)->recursive);
}

static PyObject *tree_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    int recursive = 1;
    static char *names[] = {"recursive", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "|p:Tree", names, &recursive))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    fw_tree *t = (fw_tree *)alloc(type, 0);
    if (!t)
        return NULL;
    t->free = FW_NONE;
    t->recursive = recursive;
    t->prefixes = calloc(FW_PREFIXES + 1, sizeof *t->prefixes);
    if (!t->prefixes) {
        Py_DECREF(t);
        return PyErr_NoMemory();
    }
    for (int i = 0; i <= FW_PREFIXES; i++)
        t->prefixes[i].id = FW_NONE;
    return (PyObject *)t;
}

static void tree_dealloc(PyObject *self)
{
    fw_tree *t = (fw_tree *)self;
    PyTypeObject *type = Py_TYPE(self);
    tree_reset(t);
    free(t->chain);
    if (t->prefixes)
        for (int i = 0; i <= FW_PREFIXES; i++)
            free(t->prefixes[i].prefix);
    free(t->prefixes);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

#define FAST(f) ((PyCFunction)(void (*)(void))(f))
static PyMethodDef tree_methods[] = {
    {"put", FAST(tree_put), METH_FASTCALL, "Insert or move a directory; its index."},
    {"find", tree_find, METH_O, "The index of a handle key, or -1."},
    {"move", FAST(tree_move), METH_FASTCALL, "Give a directory a new parent and name."},
    {"flag", FAST(tree_flag), METH_FASTCALL, "Set and clear flags."},
    {"info", tree_info, METH_O, "(parent, name, flags, key, kids) of a directory."},
    {"resolve", tree_resolve, METH_O, "(scope, path) of a directory."},
    {"drop", tree_drop, METH_O, "Mark a directory removed; it is found until sweep()."},
    {"sweep", tree_sweep, METH_NOARGS, "Free the removed directories that have no child."},
    {"clear", tree_clear, METH_NOARGS, "Forget everything."},
    {"ids", tree_ids, METH_NOARGS, "The indexes of all directories."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef tree_getset[] = {
    {"nbytes", tree_nbytes, NULL, "Bytes of memory held.", NULL},
    {"recursive", tree_get_recursive, NULL, "Whether roots reach below their own names.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot tree_slots[] = {
    {Py_tp_new, tree_new},         {Py_tp_dealloc, tree_dealloc}, {Py_tp_methods, tree_methods},
    {Py_tp_getset, tree_getset},   {Py_mp_length, tree_len},
    {Py_tp_doc, "Directories keyed by file handle."}, {0, NULL},
};
static PyType_Spec tree_spec = {
    .name = "fanwise.kernel._native.Tree",
    .basicsize = sizeof(fw_tree),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = tree_slots,
};

int fw_add_tree(PyObject *m)
{
    PyObject *type = PyType_FromModuleAndSpec(m, &tree_spec, NULL);
    if (!type)
        return -1;
    int ret = PyModule_AddObjectRef(m, "Tree", type);
    Py_DECREF(type);
    return ret;
}
