/* Decoder: fanotify records of one window -> changes, by a Tree of directories.
 *
 * A window is what was read until the queue was seen empty. add() validates a chunk and notes what
 * happened to each object in it (pass 1); decode() makes the changes in order (pass 2) and stops
 * at each record that needs a decision; the owner takes it with record(), settles it, and goes on
 * with advance(). _pure_decode.py is the same in Python, and the reference.
 *
 * REFS      a window holds references to its chunks; notes point into them.
 * LOCKING   none: one owner calls it, under the interpreter lock.
 * LIFETIME  notes and chunks live until finish().
 */
#include "_native.h"
#include "_tree.h"
#include <stdlib.h>
#include <string.h>

enum { /* fanotify bits, include/uapi/linux/fanotify.h */
    ACCESS = 0x1, MODIFY = 0x2, ATTRIB = 0x4, CLOSE_WRITE = 0x8, OPEN = 0x20, CREATE = 0x100,
    DELETE = 0x200, DELETE_SELF = 0x400, OPEN_EXEC = 0x1000, Q_OVERFLOW = 0x4000,
    RENAME = 0x10000000, ONDIR = 0x40000000, NAMED = CREATE | DELETE | RENAME,
};
enum { STOP_NONE, STOP_DIR, STOP_SELF, STOP_UNKNOWN, STOP_HASH, STOP_BOTH, STOP_REPLACED,
       STOP_OVERFLOW, STOP_FILES, STOP_NAMELESS };
enum { /* notes on an object */
    N_CREATE = 1, N_DELETE = 2, N_BOTH = 4, N_ATTRIB = 8, N_GONE = 16, N_UNKNOWN = 32, N_BORN = 64,
    N_TWICE = 256, /* named again after a deletion, or created while it had a name */
    N_DIR = 128 };

typedef fw_span span;
typedef fw_record rec;

typedef struct {
    span key, deldir, delname; /* the name last deleted in this window */
    uint32_t hash;
    uint16_t names, renames;
    uint32_t flags;
} note;

typedef struct {
    PyObject *bytes, *time;
    const uint8_t *p;
    size_t n;
} chunk;

typedef struct {
    PyObject_HEAD
    fw_tree *tree;
    PyObject *make, *kinds, *exact, *current, *gone, *pid;
    long pidvalue;
    uint64_t want;
    char device[32];
    int32_t *pids;
    Py_ssize_t npids;
    chunk *chunks;
    size_t nchunks, chunkcap, at, off;
    note *notes;
    uint32_t nnotes, notecap, *slots, mask, records;
    uint64_t *dirrecs; /* chunk << 32 | offset */
    size_t ndirrecs, dirreccap;
    char *path;
    size_t pathcap;
    span victim;
    int blind; /* link counts are not reported */
    int busy; /* other code runs: nothing may change the window under it */
} decoder;

/* The record at off; NULL, or what is wrong with it. Lengths are multiples of 4, as the kernel makes
 * them (FANOTIFY_EVENT_ALIGN), so an info header always fits. A handle of no bytes is no handle. */
const char *fw_parse(const uint8_t *b, size_t n, size_t off, rec *r)
{
    if (n - off < 24)
        return "record header is cut short";
    const uint8_t *p = b + off;
    uint32_t len;
    uint16_t meta;
    memcpy(&len, p, 4);
    memcpy(&meta, p + 6, 2);
    if (len < 24 || len > n - off || len % 4)
        return "record length does not fit";
    if (p[4] != 3)
        return "metadata version is not 3";
    if (meta < 24 || meta > len || meta % 4)
        return "metadata length does not fit";
    memset(r, 0, sizeof *r);
    memcpy(&r->mask, p + 8, 8);
    memcpy(&r->pid, p + 20, 4);
    r->len = len;
    for (uint32_t q = meta; q < len;) {
        uint16_t il;
        uint8_t type = p[q];
        memcpy(&il, p + q + 2, 2);
        if (il < 4 || il > len - q || il % 4)
            return "info length does not fit";
        if (type == 1 || type == 2 || type == 3 || type == 10 || type == 12) {
            uint32_t hb;
            if (il < 20)
                return "file handle is cut short";
            memcpy(&hb, p + q + 12, 4);
            if (hb > 128 || 20 + hb > il)
                return "file handle does not fit";
            span key = {p + q + 16, hb ? hb + 4 : 0}, name = {p + q + 20 + hb, il - 20 - hb};
            if (type == 1)
                r->target = key;
            else {
                const uint8_t *nul = name.n ? memchr(name.p, 0, name.n) : NULL;
                if (nul)
                    name.n = (uint32_t)(nul - name.p);
                if (type == 3)
                    name.n = 0;
                if (type == 12)
                    r->dir2 = key, r->name2 = name;
                else
                    r->dir = key, r->name = name, r->has_name = 1;
            }
        }
        q += il;
    }
    /* Marks on single directories: what came from a directory without one has no old name. */
    if (r->mask & RENAME && r->dir2.n && !r->has_name) {
        r->has_name = 1;
        if (r->mask & ONDIR)
            r->name = (span){r->name2.p, 0};
        else {
            r->mask = (r->mask & ~(uint64_t)RENAME) | CREATE;
            r->dir = r->dir2, r->name = r->name2;
            r->dir2 = r->name2 = (span){NULL, 0};
        }
    }
    return NULL;
}

int fw_decode_error(size_t off, const char *why)
{
    PyObject *m = PyImport_ImportModule("fanwise._errors");
    PyObject *type = m ? PyObject_GetAttrString(m, "DecodeError") : NULL;
    PyObject *e = type ? PyObject_CallFunction(type, "ns", (Py_ssize_t)off, why) : NULL;
    if (e)
        PyErr_SetObject(type, e);
    Py_XDECREF(e);
    Py_XDECREF(type);
    Py_XDECREF(m);
    return -1;
}

static int same(span a, span b)
{
    return a.n == b.n && (!a.n || !memcmp(a.p, b.p, a.n));
}

/* An event on a directory itself: name "." (or a DFID without a name). */
int fw_is_self(const rec *r)
{
    return r->has_name && !r->target.n && (!r->name.n || (r->name.n == 1 && r->name.p[0] == '.'));
}

static note *note_find(const decoder *d, span key)
{
    if (!d->slots || !key.n)
        return NULL;
    uint32_t h = fw_hash(key.p, key.n);
    for (uint32_t i = h & d->mask;; i = (i + 1) & d->mask) {
        if (d->slots[i] == FW_NONE)
            return NULL;
        note *t = &d->notes[d->slots[i]];
        if (t->hash == h && same(t->key, key))
            return t;
    }
}

static int notes_grow(decoder *d)
{
    uint32_t cap = d->notecap ? d->notecap * 2 : 512;
    note *n = realloc(d->notes, cap * sizeof *n);
    if (!n)
        return -1;
    d->notes = n;
    uint32_t *s = malloc(cap * 2ul * sizeof *s);
    if (!s)
        return -1;
    memset(s, 0xff, cap * 2ul * sizeof *s);
    d->mask = cap * 2 - 1;
    for (uint32_t k = 0; k < d->nnotes; k++) {
        uint32_t i = n[k].hash & d->mask;
        while (s[i] != FW_NONE)
            i = (i + 1) & d->mask;
        s[i] = k;
    }
    free(d->slots);
    d->slots = s;
    d->notecap = cap;
    return 0;
}

static note *note_get(decoder *d, span key)
{
    if (d->nnotes == d->notecap && notes_grow(d) < 0) {
        PyErr_NoMemory();
        return NULL;
    }
    uint32_t h = fw_hash(key.p, key.n), i = h & d->mask;
    for (; d->slots[i] != FW_NONE; i = (i + 1) & d->mask) {
        note *t = &d->notes[d->slots[i]];
        if (t->hash == h && same(t->key, key))
            return t;
    }
    d->slots[i] = d->nnotes;
    note *t = &d->notes[d->nnotes++];
    *t = (note){.key = key, .hash = h};
    return t;
}

static uint32_t find(const decoder *d, span key)
{
    return key.n ? fw_tree_find(d->tree, key.p, key.n) : FW_NONE;
}

static int outside(decoder *d, uint32_t id, int *ret)
{
    const fw_prefix *e = fw_tree_resolve(d->tree, id);
    if (!e)
        return -1;
    *ret = !(e->scope & (FW_IN | FW_IN_FILES));
    return 0;
}

/* Pass 1 on one record. */
static int take_note(decoder *d, const rec *r, size_t ci, size_t off)
{
    if (r->mask & Q_OVERFLOW)
        return 0;
    if (!r->has_name) { /* link counts and last closes */
        if (!r->target.n || !(r->mask & (ATTRIB | DELETE_SELF)))
            return 0;
        note *t = note_get(d, r->target);
        if (!t)
            return -1;
        t->flags |= (r->mask & ATTRIB ? N_ATTRIB : 0) | (r->mask & DELETE_SELF ? N_GONE : 0);
        return 0;
    }
    int out = 0, any = 0;
    const span dirs[2] = {r->dir, r->dir2};
    for (int i = 0; i < 2; i++) {
        if (!dirs[i].n)
            continue;
        uint32_t id = find(d, dirs[i]);
        if (id == FW_NONE) {
            note *t = note_get(d, dirs[i]);
            if (!t)
                return -1;
            if (!(t->flags & N_BORN))
                t->flags |= N_UNKNOWN;
            any = 1;
        } else {
            if (outside(d, id, &out) < 0)
                return -1;
            any |= !out;
        }
    }
    if (fw_is_self(r)) {
        if (r->dir.n && r->mask & DELETE_SELF) {
            note *t = note_get(d, r->dir);
            if (!t)
                return -1;
            t->flags |= N_GONE | N_DIR;
        }
        return 0;
    }
    if (r->target.n && r->mask & NAMED) {
        if (r->mask & ONDIR) {
            if (d->ndirrecs == d->dirreccap) {
                size_t cap = d->dirreccap * 2 + 64;
                uint64_t *p = realloc(d->dirrecs, cap * sizeof *p);
                if (!p) {
                    PyErr_NoMemory();
                    return -1;
                }
                d->dirrecs = p;
                d->dirreccap = cap;
            }
            d->dirrecs[d->ndirrecs++] = (uint64_t)ci << 32 | off;
        } else if (!any)
            return 0; /* all of it is outside the roots */
        note *t = note_get(d, r->target);
        if (!t)
            return -1;
        if (t->flags & N_DELETE || (r->mask & CREATE && t->names))
            t->flags |= N_TWICE;
        if (t->names < 0xffff)
            t->names++;
        if (r->mask & ONDIR)
            t->flags |= N_BORN | N_DIR;
        if (r->mask & RENAME && t->renames < 0xffff)
            t->renames++;
        if (r->mask & CREATE)
            t->flags |= N_CREATE;
        if (r->mask & DELETE)
            t->flags |= N_DELETE;
        if ((r->mask & (CREATE | DELETE)) == (CREATE | DELETE))
            t->flags |= N_BOTH;
    }
    return 0;
}

static int refuse_busy(const decoder *d)
{
    if (d->busy)
        PyErr_SetString(PyExc_RuntimeError, "the decoder is in use");
    return d->busy;
}

static PyObject *decoder_add(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    decoder *d = (decoder *)self;
    if (refuse_busy(d))
        return NULL;
    char *p;
    Py_ssize_t n;
    if (na != 2) {
        PyErr_SetString(PyExc_TypeError, "add(data, time)");
        return NULL;
    }
    if (PyBytes_AsStringAndSize(a[0], &p, &n) < 0)
        return NULL;
    if ((uint64_t)n > 0xfffffff0u) {
        PyErr_SetString(PyExc_ValueError, "chunk too large");
        return NULL;
    }
    rec r;
    const uint8_t *b = (const uint8_t *)p;
    for (size_t off = 0; off < (size_t)n; off += r.len) { /* whole chunk, or none of it */
        const char *why = fw_parse(b, (size_t)n, off, &r);
        if (why) {
            fw_decode_error(off, why);
            return NULL;
        }
    }
    if (d->nchunks == d->chunkcap) {
        size_t cap = d->chunkcap * 2 + 16;
        chunk *c = realloc(d->chunks, cap * sizeof *c);
        if (!c)
            return PyErr_NoMemory();
        d->chunks = c;
        d->chunkcap = cap;
    }
    Py_INCREF(a[0]);
    Py_INCREF(a[1]);
    d->chunks[d->nchunks++] = (chunk){a[0], a[1], b, (size_t)n};
    uint32_t before = d->records;
    for (size_t off = 0; off < (size_t)n; off += r.len) {
        fw_parse(b, (size_t)n, off, &r);
        if (take_note(d, &r, d->nchunks - 1, off) < 0)
            return NULL;
        d->records++;
    }
    return PyLong_FromUnsignedLong(d->records - before);
}

int fw_window_chunk(PyObject *self, size_t i, span *ret)
{
    const decoder *d = (const decoder *)self;
    if (i >= d->nchunks)
        return 0;
    *ret = (span){d->chunks[i].p, (uint32_t)d->chunks[i].n};
    return 1;
}

void fw_window_at(PyObject *self, size_t *i, size_t *off)
{
    const decoder *d = (const decoder *)self;
    *i = d->at, *off = d->off;
    while (*i < d->nchunks && *off >= d->chunks[*i].n)
        ++*i, *off = 0;
}

static PyObject *bytes_of(span s)
{
    return PyBytes_FromStringAndSize((const char *)s.p, (Py_ssize_t)s.n);
}

static int suspect(const decoder *d, const note *t)
{
    if (d->blind && !(t->flags & N_DIR) && (t->names >= 2 || t->flags & N_BOTH))
        return 1;
    return t->renames >= 2 || (t->flags & N_GONE && t->flags & N_TWICE) ||
           ((t->names >= 2 || t->flags & N_BOTH) && t->flags & N_ATTRIB && !(t->flags & N_GONE));
}

/* [(key, notes, names, renames)] of the objects whose order may be unknowable: renamed twice,
 * gone but named again after a deletion, or named twice with a link count reported and still there. The owner looks closer. */
static PyObject *decoder_suspects(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    PyObject *l = PyList_New(0);
    for (uint32_t k = 0; l && k < d->nnotes; k++) {
        const note *t = &d->notes[k];
        if (!suspect(d, t))
            continue;
        PyObject *o = Py_BuildValue("(y#III)", (const char *)t->key.p, (Py_ssize_t)t->key.n,
                                    t->flags, (unsigned)t->names, (unsigned)t->renames);
        if (!o || PyList_Append(l, o) < 0)
            Py_CLEAR(l);
        Py_XDECREF(o);
    }
    return l;
}

typedef struct { /* a name of an object */
    uint32_t note, hash;
    span dir, name;
    int held, again;
} place;

typedef struct {
    place *p;
    uint32_t *slots, n, cap, mask;
} places;

static place *place_get(places *t, uint32_t note, span dir, span name)
{
    if (t->n * 2 >= t->cap) {
        uint32_t cap = t->cap ? t->cap * 2 : 256;
        place *p = realloc(t->p, cap * sizeof *p);
        if (p)
            t->p = p;
        uint32_t *slots = p ? calloc(cap, sizeof *slots) : NULL;
        if (!slots)
            return NULL;
        free(t->slots);
        t->slots = slots;
        t->cap = cap;
        t->mask = cap - 1;
        for (uint32_t k = 0; k < t->n; k++) {
            uint32_t i = p[k].hash & t->mask;
            while (slots[i])
                i = (i + 1) & t->mask;
            slots[i] = k + 1;
        }
    }
    uint32_t h = fw_hash(dir.p, dir.n) * 31 + fw_hash(name.p, name.n) * 7 + note, i = h & t->mask;
    for (; t->slots[i]; i = (i + 1) & t->mask) {
        place *e = &t->p[t->slots[i] - 1];
        if (e->hash == h && e->note == note && same(e->dir, dir) && same(e->name, name)) {
            e->again = 1;
            return e;
        }
    }
    place *e = &t->p[t->n++];
    t->slots[i] = t->n;
    *e = (place){.note = note, .hash = h, .dir = dir, .name = name};
    return e;
}

/* Replays the names of the files among the suspects; doubt has a byte for each note. */
static int replay(const decoder *d, places *t, uint8_t *doubt)
{
    for (size_t i = 0; i < d->nchunks; i++) {
        const chunk *c = &d->chunks[i];
        rec r;
        for (size_t off = 0; off < c->n; off += r.len) {
            fw_parse(c->p, c->n, off, &r);
            if (!(r.mask & NAMED) || !r.target.n)
                continue;
            const note *n = note_find(d, r.target);
            if (!n || n->flags & N_DIR || !suspect(d, n))
                continue;
            uint32_t at = (uint32_t)(n - d->notes);
            place *e;
            if (r.dir.n && r.has_name && r.name.p) {
                if (!(e = place_get(t, at, r.dir, r.name)))
                    return -1;
                if ((r.mask & (CREATE | DELETE)) == (CREATE | DELETE))
                    doubt[at] = 1;
                e->held = (r.mask & CREATE) != 0;
            }
            if (r.dir2.n && r.name2.p) {
                if (!(e = place_get(t, at, r.dir2, r.name2)))
                    return -1;
                e->held = 1;
            }
        }
    }
    return 0;
}

static int put_gone(PyObject *gone, const place *e, span key)
{
    PyObject *dir = bytes_of(e->dir), *name = bytes_of(e->name), *k = bytes_of(key), *names = NULL;
    int ret = -1;
    if (dir && name && k) {
        names = PyDict_GetItemWithError(gone, dir);
        if (names)
            ret = PyDict_SetItem(names, name, k);
        else if (!PyErr_Occurred()) {
            names = PyDict_New();
            if (names && !PyDict_SetItem(names, name, k))
                ret = PyDict_SetItem(gone, dir, names);
            Py_XDECREF(names);
        }
    }
    Py_XDECREF(dir);
    Py_XDECREF(name);
    Py_XDECREF(k);
    return ret;
}

/* What there is to ask where link counts are not reported: see the twin. */
static PyObject *decoder_doubts(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    places t = {0};
    uint8_t *doubt = calloc((size_t)d->nnotes + 1, 1);
    PyObject *files = PyList_New(0), *dirs = PyList_New(0), *gone = PyDict_New(), *out = NULL;
    if (!doubt || !files || !dirs || !gone)
        goto done;
    if (replay(d, &t, doubt) < 0) {
        PyErr_NoMemory();
        goto done;
    }
    for (uint32_t k = 0; k < t.n; k++) {
        const place *e = &t.p[k];
        if (e->again && e->held)
            doubt[e->note] = 1;
        else if (e->again && put_gone(gone, e, d->notes[e->note].key) < 0)
            goto done;
    }
    for (uint32_t k = 0; k < d->nnotes; k++) {
        const note *n = &d->notes[k];
        int dir = n->flags & N_DIR && suspect(d, n);
        if (!dir && !doubt[k])
            continue;
        PyObject *o = dir ? Py_BuildValue("(y#I)", (const char *)n->key.p, (Py_ssize_t)n->key.n,
                                          n->flags)
                          : bytes_of(n->key);
        int bad = !o || PyList_Append(dir ? dirs : files, o) < 0;
        Py_XDECREF(o);
        if (bad)
            goto done;
    }
    out = Py_BuildValue("(OOO)", files, dirs, gone);
done:
    if (!out && !PyErr_Occurred())
        PyErr_NoMemory();
    Py_XDECREF(files);
    Py_XDECREF(dirs);
    Py_XDECREF(gone);
    free(doubt);
    free(t.p);
    free(t.slots);
    return out;
}

/* Handle keys of directories that records name and nothing explains. */
static PyObject *decoder_unknown(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    PyObject *l = PyList_New(0);
    for (uint32_t k = 0; l && k < d->nnotes; k++) {
        if (!(d->notes[k].flags & N_UNKNOWN))
            continue;
        PyObject *o = bytes_of(d->notes[k].key);
        if (!o || PyList_Append(l, o) < 0)
            Py_CLEAR(l);
        Py_XDECREF(o);
    }
    return l;
}

static PyObject *opt(span s, int there)
{
    if (there && s.p)
        return bytes_of(s);
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *record_tuple(const rec *r, PyObject *time, span victim)
{
    return Py_BuildValue("(KiONNNNNN)", (unsigned long long)r->mask, (int)r->pid, time,
                         opt(r->dir, r->dir.n > 0), opt(r->name, r->has_name),
                         opt(r->dir2, r->dir2.n > 0), opt(r->name2, r->dir2.n > 0),
                         opt(r->target, r->target.n > 0), opt(victim, victim.n > 0));
}

/* Every name record of directories in this window, in order. */
static PyObject *decoder_dir_records(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    PyObject *l = PyList_New(0);
    for (size_t k = 0; l && k < d->ndirrecs; k++) {
        const chunk *c = &d->chunks[d->dirrecs[k] >> 32];
        rec r;
        fw_parse(c->p, c->n, (size_t)(d->dirrecs[k] & 0xffffffffu), &r);
        PyObject *o = record_tuple(&r, c->time, (span){NULL, 0});
        if (!o || PyList_Append(l, o) < 0)
            Py_CLEAR(l);
        Py_XDECREF(o);
    }
    return l;
}

static int among(PyObject *wanted, span s)
{
    PyObject *key = bytes_of(s);
    int in = key ? PySequence_Contains(wanted, key) : -1;
    Py_XDECREF(key);
    return in;
}

static PyObject *some_records(decoder *d, PyObject *wanted, int by_directory)
{
    if (refuse_busy(d))
        return NULL;
    d->busy = 1;
    PyObject *l = PyList_New(0);
    for (size_t i = 0; l && i < d->nchunks; i++) {
        const chunk *c = &d->chunks[i];
        rec r;
        for (size_t off = 0; l && off < c->n; off += r.len) {
            fw_parse(c->p, c->n, off, &r);
            if (!(r.mask & NAMED) || !r.target.n)
                continue;
            int in = 0;
            if (by_directory) {
                if (r.dir.n)
                    in = among(wanted, r.dir);
                if (!in && r.dir2.n)
                    in = among(wanted, r.dir2);
            } else if (wanted == Py_None) {
                const note *t = note_find(d, r.target);
                in = t && !(t->flags & N_GONE);
            } else
                in = among(wanted, r.target);
            PyObject *o = in > 0 ? record_tuple(&r, c->time, (span){NULL, 0}) : NULL;
            if (in < 0 || (in > 0 && (!o || PyList_Append(l, o) < 0)))
                Py_CLEAR(l);
            Py_XDECREF(o);
        }
    }
    d->busy = 0;
    return l;
}

/* Name records in order: of the objects in a set, or of all that may still be there (None). */
static PyObject *decoder_name_records(PyObject *self, PyObject *wanted)
{
    return some_records((decoder *)self, wanted, 0);
}

/* Name records in order: of the directories in a set. */
static PyObject *decoder_records_in(PyObject *self, PyObject *wanted)
{
    return some_records((decoder *)self, wanted, 1);
}

static int ignored(const decoder *d, int32_t pid)
{
    for (Py_ssize_t i = 0; i < d->npids; i++)
        if (d->pids[i] == pid)
            return 1;
    return 0;
}

static PyObject *path_str(decoder *d, const fw_prefix *e, span name)
{
    size_t n = e->len + 1 + name.n;
    if (n > d->pathcap) {
        char *p = realloc(d->path, n + 256);
        if (!p)
            return PyErr_NoMemory();
        d->path = p;
        d->pathcap = n + 256;
    }
    memcpy(d->path, e->prefix, e->len);
    d->path[e->len] = '/';
    memcpy(d->path + e->len + 1, name.p, name.n);
    return PyUnicode_DecodeFSDefaultAndSize(d->path, (Py_ssize_t)n);
}

static PyObject *self_str(const fw_prefix *e)
{
    return e->len ? PyUnicode_DecodeFSDefaultAndSize(e->prefix, (Py_ssize_t)e->len)
                  : PyUnicode_FromString("/");
}

static PyObject *identity_str(const decoder *d, span key)
{
    static const char hex[] = "0123456789abcdef";
    char b[sizeof d->device + 16 + 2 * FW_KEY_MAX], *o = b;
    if (!key.n) {
        Py_INCREF(Py_None);
        return Py_None;
    }
    for (const char *s = d->device; *s; s++)
        *o++ = *s;
    *o++ = '/';
    uint32_t type;
    memcpy(&type, key.p, 4);
    int shift = 28;
    while (shift && !(type >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        *o++ = hex[type >> shift & 15];
    *o++ = '/';
    for (uint32_t i = 4; i < key.n; i++) {
        *o++ = hex[key.p[i] >> 4];
        *o++ = hex[key.p[i] & 15];
    }
    return PyUnicode_FromStringAndSize(b, o - b);
}

static unsigned kind_index(uint64_t m)
{
    return (m & CREATE ? 1 : 0) | (m & MODIFY ? 2 : 0) | (m & CLOSE_WRITE ? 4 : 0) |
           (m & ATTRIB ? 8 : 0) | (m & RENAME ? 16 : 0) | (m & DELETE ? 32 : 0) |
           (m & OPEN ? 64 : 0) | (m & ACCESS ? 128 : 0) | (m & OPEN_EXEC ? 256 : 0);
}

/* Append make(kinds, path, old_path, is_dir, pid, identity, time, path_source[, replaced,
 * unlinked, exists]) to rows. Steals path and old. */
static int emit(decoder *d, PyObject *rows, uint64_t bits, PyObject *path, PyObject *old, int dir,
                const rec *r, span key, PyObject *time, int current, int unlinked, PyObject *exists)
{
    int ret = -1;
    PyObject *row = NULL, *identity = NULL;
    if (!path || (r->mask & RENAME && !old))
        goto out;
    if (!d->pid || d->pidvalue != r->pid) {
        PyObject *pid = PyLong_FromLong(r->pid);
        if (!pid)
            goto out;
        Py_XDECREF(d->pid);
        d->pid = pid;
        d->pidvalue = r->pid;
    }
    identity = identity_str(d, key);
    PyObject *kinds = PyList_GetItem(d->kinds, (Py_ssize_t)kind_index(bits)); /* borrowed */
    if (!identity || !kinds)
        goto out;
    PyObject *was = old ? old : Py_None, *is_dir = dir ? Py_True : Py_False;
    PyObject *source = current ? d->current : d->exact;
    if (unlinked || exists)
        row = PyObject_CallFunctionObjArgs(d->make, kinds, path, was, is_dir, d->pid, identity,
                                           time, source, Py_None, unlinked ? Py_True : Py_False,
                                           exists ? exists : Py_None, NULL);
    else
        row = PyObject_CallFunctionObjArgs(d->make, kinds, path, was, is_dir, d->pid, identity,
                                           time, source, NULL);
    ret = row ? PyList_Append(rows, row) : -1;
out:
    Py_XDECREF(row);
    Py_XDECREF(identity);
    Py_XDECREF(path);
    Py_XDECREF(old);
    return ret;
}

/* The object that a rename put out of its name: its nameless ATTRIB is the next record of that
 * process, and is not the first half of an unlink or a link (ATTRIB, then DELETE or CREATE). The
 * owner decides; this only finds the candidate. */
static span victim_of(const decoder *d, const rec *ren)
{
    const span none = {NULL, 0};
    size_t ci = d->at, off = d->off + ren->len;
    span found = none;
    for (int left = 64; left && ci < d->nchunks;) {
        const chunk *c = &d->chunks[ci];
        if (off >= c->n) {
            ci++;
            off = 0;
            continue;
        }
        rec r;
        fw_parse(c->p, c->n, off, &r);
        off += r.len;
        left--;
        if (r.pid != ren->pid || r.mask & Q_OVERFLOW)
            continue;
        if (found.n) {
            int undone = r.mask & (CREATE | DELETE) && same(r.target, found);
            return undone ? none : found;
        }
        if (r.has_name || !(r.mask & ATTRIB) || !r.target.n || same(r.target, ren->target))
            return none;
        found = r.target;
    }
    return found;
}

static int tmp_name(span n)
{
    if (n.n < 2 || n.p[0] != '#')
        return 0;
    for (uint32_t i = 1; i < n.n; i++)
        if (n.p[i] < '0' || n.p[i] > '9')
            return 0;
    return 1;
}

/* Whether the name was deleted before this window and the object lives on in an open file:
 * gone maps handle key -> set of (directory key + name). */
static int is_gone(const decoder *d, const rec *r)
{
    if (!r->target.n || !PyDict_Size(d->gone))
        return 0;
    PyObject *key = bytes_of(r->target);
    PyObject *names = key ? PyDict_GetItemWithError(d->gone, key) : NULL;
    Py_XDECREF(key);
    if (!names)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *a = bytes_of(r->dir), *b = bytes_of(r->name);
    PyObject *name = a && b ? PySequence_Concat(a, b) : NULL;
    int ret = name ? PySequence_Contains(names, name) : -1;
    Py_XDECREF(name);
    Py_XDECREF(a);
    Py_XDECREF(b);
    return ret;
}

static int forget_gone(const decoder *d, span key)
{
    if (!PyDict_Size(d->gone))
        return 0;
    PyObject *k = bytes_of(key);
    if (!k)
        return -1;
    int has = PyDict_Contains(d->gone, k);
    int ret = has > 0 ? PyDict_DelItem(d->gone, k) : has;
    Py_DECREF(k);
    return ret;
}

/* The name leads to the object again: it is not "unlinked" any more. */
static int name_back(const decoder *d, span key, span dir, span name)
{
    note *t = note_find(d, key);
    if (t && t->delname.p && same(t->deldir, dir) && same(t->delname, name))
        t->delname.p = NULL;
    if (!PyDict_Size(d->gone))
        return 0;
    rec r = {.target = key, .dir = dir, .name = name};
    int was = is_gone(d, &r);
    return was > 0 ? forget_gone(d, key) : was;
}

/* One record in pass 2: a STOP_ code, or -1. */
static int step(decoder *d, const rec *r, PyObject *time, PyObject *rows)
{
    uint64_t bits = r->mask & d->want;
    d->victim = (span){NULL, 0};
    if (r->mask & Q_OVERFLOW)
        return STOP_OVERFLOW;
    if (!r->has_name) {
        if (r->mask & DELETE_SELF && r->target.n && forget_gone(d, r->target) < 0)
            return -1;
        return bits & ~(uint64_t)ATTRIB && r->target.n ? STOP_NAMELESS : 0;
    }
    int quiet = d->npids && ignored(d, r->pid);
    uint32_t id = find(d, r->dir);
    if (fw_is_self(r)) {
        if (r->mask & (ATTRIB | DELETE_SELF))
            return STOP_SELF;
        if (!bits || quiet)
            return 0;
        if (id == FW_NONE)
            return STOP_UNKNOWN;
        const fw_prefix *e = fw_tree_resolve(d->tree, id);
        if (!e)
            return -1;
        if (!(e->scope & FW_IN))
            return 0;
        return emit(d, rows, bits, self_str(e), Py_NewRef(Py_None), 1, r, r->dir, time,
                    e->scope & FW_IN_CURRENT, 0, NULL);
    }
    if (r->mask & ONDIR && r->mask & NAMED)
        return STOP_DIR;
    if (id == FW_NONE)
        return STOP_UNKNOWN;
    const fw_prefix *e = fw_tree_resolve(d->tree, id);
    if (!e)
        return -1;
    uint32_t scope = e->scope;
    if (r->mask & RENAME) {
        uint32_t id2 = find(d, r->dir2);
        if (id2 == FW_NONE)
            return STOP_UNKNOWN;
        const fw_prefix *e2 = fw_tree_resolve(d->tree, id2);
        if (!e2)
            return -1;
        uint32_t scope2 = e2->scope;
        if (!((scope | scope2) & (FW_IN | FW_IN_FILES)))
            return 0;
        if ((scope | scope2) & FW_IN_FILES)
            return STOP_FILES;
        if (name_back(d, r->target, r->dir2, r->name2) < 0)
            return -1;
        d->victim = victim_of(d, r);
        if (d->victim.n)
            return STOP_REPLACED;
        if (quiet)
            return 0;
        if (scope & FW_IN && scope2 & FW_IN) {
            if (!bits)
                return 0;
            PyObject *path = path_str(d, e2, r->name2);
            /* e2 and e may share a cache slot: find e anew. */
            e = fw_tree_resolve(d->tree, id);
            return emit(d, rows, RENAME, path, e ? path_str(d, e, r->name) : NULL, 0, r, r->target,
                        time, (scope | scope2) & FW_IN_CURRENT, 0, NULL);
        }
        uint64_t as = scope2 & FW_IN ? CREATE : DELETE;
        if (!(d->want & as))
            return 0;
        PyObject *path;
        if (scope2 & FW_IN)
            path = path_str(d, e2, r->name2);
        else {
            e = fw_tree_resolve(d->tree, id);
            path = e ? path_str(d, e, r->name) : NULL;
        }
        Py_INCREF(Py_None);
        return emit(d, rows, as, path, Py_None, 0, r, r->target, time,
                    (scope2 & FW_IN ? scope2 : scope) & FW_IN_CURRENT, 0, NULL);
    }
    if (scope & FW_IN_FILES)
        return STOP_FILES;
    if (!(scope & FW_IN))
        return 0;
    PyObject *exists = NULL;
    int unlinked = 0;
    if (r->mask & (CREATE | DELETE) && r->target.n) {
        note *t = note_find(d, r->target);
        if (r->mask & CREATE && r->mask & DELETE) {
            if (!t || !(t->flags & N_GONE))
                return STOP_BOTH;
            exists = Py_False;
        } else if (r->mask & CREATE) {
            if (name_back(d, r->target, r->dir, r->name) < 0)
                return -1;
        }
        if (t && r->mask & DELETE)
            t->deldir = r->dir, t->delname = r->name;
    } else if (r->target.n) {
        note *t = note_find(d, r->target);
        if (t && t->delname.p && same(t->deldir, r->dir) && same(t->delname, r->name))
            unlinked = 1;
        else if ((unlinked = is_gone(d, r)) < 0)
            return -1;
    }
    /* A name that was deleted had been a name, and is not that of an O_TMPFILE file. */
    if (!unlinked && !(r->mask & NAMED) && tmp_name(r->name))
        return STOP_HASH;
    if (!bits || quiet)
        return 0;
    if ((bits & (CREATE | DELETE)) != (CREATE | DELETE))
        exists = NULL;
    return emit(d, rows, bits, path_str(d, e, r->name), NULL, (r->mask & ONDIR) != 0, r, r->target,
                time, scope & FW_IN_CURRENT, unlinked, exists);
}

static int cursor(decoder *d)
{
    while (d->at < d->nchunks && d->off >= d->chunks[d->at].n) {
        d->at++;
        d->off = 0;
    }
    return d->at < d->nchunks;
}

static PyObject *decoder_decode(PyObject *self, PyObject *limit)
{
    decoder *d = (decoder *)self;
    Py_ssize_t most = PyLong_AsSsize_t(limit);
    if ((most == -1 && PyErr_Occurred()) || refuse_busy(d))
        return NULL;
    most = most < 0 ? 0 : most > PY_SSIZE_T_MAX / 8 ? PY_SSIZE_T_MAX / 8 : most;
    PyObject *rows = PyList_New(0);
    if (!rows)
        return NULL;
    int stop = STOP_NONE;
    d->busy = 1;
    d->victim = (span){NULL, 0};
    /* A slice is bounded by what it makes and by what it passes over. */
    for (Py_ssize_t seen = 0; seen < most * 8 && PyList_Size(rows) < most && cursor(d); seen++) {
        const chunk *c = &d->chunks[d->at];
        rec r;
        fw_parse(c->p, c->n, d->off, &r);
        stop = step(d, &r, c->time, rows);
        if (stop)
            break;
        d->off += r.len;
    }
    d->busy = 0;
    if (stop < 0) {
        Py_DECREF(rows);
        return NULL;
    }
    return Py_BuildValue("(Ni)", rows, stop);
}

static PyObject *decoder_record(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    if (!cursor(d)) {
        PyErr_SetString(PyExc_IndexError, "no record left");
        return NULL;
    }
    const chunk *c = &d->chunks[d->at];
    rec r;
    fw_parse(c->p, c->n, d->off, &r);
    return record_tuple(&r, c->time, d->victim);
}

/* The next record of the process whose record decode() stopped at, or None. */
static PyObject *decoder_peek(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    rec first, r;
    if (!cursor(d))
        Py_RETURN_NONE;
    size_t ci = d->at, off = d->off;
    fw_parse(d->chunks[ci].p, d->chunks[ci].n, off, &first);
    off += first.len;
    for (int left = 64; left && ci < d->nchunks;) {
        const chunk *c = &d->chunks[ci];
        if (off >= c->n) {
            ci++;
            off = 0;
            continue;
        }
        fw_parse(c->p, c->n, off, &r);
        if (r.pid == first.pid)
            return record_tuple(&r, c->time, (span){NULL, 0});
        off += r.len;
        left--;
    }
    Py_RETURN_NONE;
}

static PyObject *decoder_advance(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    if (refuse_busy(d))
        return NULL;
    if (cursor(d)) {
        const chunk *c = &d->chunks[d->at];
        rec r;
        fw_parse(c->p, c->n, d->off, &r);
        d->off += r.len;
        d->victim = (span){NULL, 0};
    }
    Py_RETURN_NONE;
}

/* The notes on one object: (notes, names, renames). */
static PyObject *decoder_notes(PyObject *self, PyObject *key)
{
    char *p;
    Py_ssize_t n;
    if (PyBytes_AsStringAndSize(key, &p, &n) < 0)
        return NULL;
    const note *t = note_find((decoder *)self, (span){(uint8_t *)p, (uint32_t)n});
    return Py_BuildValue("(III)", t ? t->flags : 0, t ? (unsigned)t->names : 0u,
                         t ? (unsigned)t->renames : 0u);
}

static void window_clear(decoder *d)
{
    for (size_t i = 0; i < d->nchunks; i++) {
        Py_CLEAR(d->chunks[i].bytes);
        Py_CLEAR(d->chunks[i].time);
    }
    d->nchunks = d->at = d->off = d->ndirrecs = 0;
    d->victim = (span){NULL, 0}; /* it points into a chunk */
    /* A rare large window must not keep its memory, nor its cost to small ones. */
    if (d->notecap > 65536 || (d->notecap > 4096 && d->nnotes < d->notecap / 8)) {
        free(d->notes);
        free(d->slots);
        d->notes = NULL;
        d->slots = NULL;
        d->notecap = d->mask = 0;
    } else if (d->nnotes)
        memset(d->slots, 0xff, ((size_t)d->mask + 1) * sizeof *d->slots);
    d->nnotes = d->records = 0;
}

/* End the window; [(key, directory key, name)] whose name was deleted while the object lives. */
static PyObject *decoder_finish(PyObject *self, PyObject *unused)
{
    (void)unused;
    decoder *d = (decoder *)self;
    if (refuse_busy(d))
        return NULL;
    PyObject *l = PyList_New(0);
    for (uint32_t k = 0; l && k < d->nnotes; k++) {
        const note *t = &d->notes[k];
        if (!t->delname.p || t->flags & N_GONE)
            continue;
        PyObject *o = Py_BuildValue("(NNN)", bytes_of(t->key), bytes_of(t->deldir),
                                    bytes_of(t->delname));
        if (!o || PyList_Append(l, o) < 0)
            Py_CLEAR(l);
        Py_XDECREF(o);
    }
    if (l)
        window_clear(d);
    return l;
}

/* A whole window at once, where nothing in it needs a look: add, decode, finish. None: it does, and
 * the window is open, noted and not decoded. Else (changes, stop, what finish() gives, or None when
 * the window is still open). One call, because an idle process pays for each in cache misses. */
static PyObject *decoder_plain(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    decoder *d = (decoder *)self;
    if (na != 3) {
        PyErr_SetString(PyExc_TypeError, "plain(data, time, limit)");
        return NULL;
    }
    PyObject *n = decoder_add(self, a, 2);
    if (!n)
        return NULL;
    Py_DECREF(n);
    for (uint32_t k = 0; k < d->nnotes; k++)
        if (d->notes[k].flags & N_UNKNOWN || suspect(d, &d->notes[k]))
            Py_RETURN_NONE;
    PyObject *made = decoder_decode(self, a[2]);
    if (!made)
        return NULL;
    PyObject *rows = PyTuple_GetItem(made, 0), *stop = PyTuple_GetItem(made, 1); /* borrowed */
    PyObject *left = Py_None, *out = NULL;
    if (PyLong_AsLong(stop) == STOP_NONE && !cursor(d))
        left = decoder_finish(self, NULL);
    else
        Py_INCREF(left);
    if (left)
        out = Py_BuildValue("(OON)", rows, stop, left);
    Py_DECREF(made);
    return out;
}

static PyObject *decoder_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    static char *names[] = {"tree", "make", "kinds", "want", "device", "pids", "gone", "blind", NULL};
    int blind = 0;
    PyObject *tree, *make, *kinds, *pids, *gone;
    unsigned long long want;
    const char *device;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOKsOO|p:Decoder", names, &tree, &make, &kinds,
                                     &want, &device, &pids, &gone, &blind))
        return NULL;
    PyObject *m = PyType_GetModule(type);
    PyObject *tt = m ? PyObject_GetAttrString(m, "Tree") : NULL;
    if (!tt)
        return NULL;
    int ok = PyObject_TypeCheck(tree, (PyTypeObject *)tt); /* not isinstance(), which can lie */
    Py_DECREF(tt);
    if (!ok || !PyList_Check(kinds) || PyList_Size(kinds) != 512 || !PyDict_Check(gone) ||
        strlen(device) >= sizeof((decoder *)0)->device) {
        PyErr_SetString(PyExc_TypeError, "Decoder(Tree, make, list of 512, mask, device, pids, {})");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    decoder *d = (decoder *)alloc(type, 0);
    if (!d)
        return NULL;
    d->tree = (fw_tree *)Py_NewRef(tree);
    d->make = Py_NewRef(make);
    d->kinds = Py_NewRef(kinds);
    d->gone = Py_NewRef(gone);
    d->want = want;
    d->blind = blind;
    strcpy(d->device, device);
    d->exact = PyUnicode_InternFromString("exact");
    d->current = PyUnicode_InternFromString("current");
    Py_ssize_t n = PySequence_Size(pids);
    if (!d->exact || !d->current || n < 0)
        goto fail;
    d->pids = calloc((size_t)n + 1, sizeof *d->pids);
    if (!d->pids) {
        PyErr_NoMemory();
        goto fail;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *o = PySequence_GetItem(pids, i);
        long v = o ? PyLong_AsLong(o) : -1;
        Py_XDECREF(o);
        if (v == -1 && PyErr_Occurred())
            goto fail;
        d->pids[d->npids++] = (int32_t)v;
    }
    return (PyObject *)d;
fail:
    Py_DECREF(d);
    return NULL;
}

static void decoder_dealloc(PyObject *self)
{
    decoder *d = (decoder *)self;
    PyTypeObject *type = Py_TYPE(self);
    window_clear(d);
    free(d->notes);
    free(d->slots);
    free(d->chunks);
    free(d->dirrecs);
    free(d->pids);
    free(d->path);
    Py_XDECREF((PyObject *)d->tree);
    Py_XDECREF(d->make);
    Py_XDECREF(d->kinds);
    Py_XDECREF(d->gone);
    Py_XDECREF(d->exact);
    Py_XDECREF(d->current);
    Py_XDECREF(d->pid);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *decoder_pending(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(cursor((decoder *)self));
}

static PyObject *decoder_records(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(((decoder *)self)->records);
}

#define FAST(f) ((PyCFunction)(void (*)(void))(f))
static PyMethodDef decoder_methods[] = {
    {"add", FAST(decoder_add), METH_FASTCALL, "Validate a chunk and note it; its records."},
    {"unknown", decoder_unknown, METH_NOARGS, "Keys of directories that nothing explains."},
    {"suspects", decoder_suspects, METH_NOARGS, "Objects whose order may be unknowable."},
    {"doubts", decoder_doubts, METH_NOARGS, "What is to be asked where no link count is told."},
    {"dir_records", decoder_dir_records, METH_NOARGS, "Name records of directories, in order."},
    {"name_records", decoder_name_records, METH_O, "Name records of some objects, in order."},
    {"records_in", decoder_records_in, METH_O, "Name records of some directories, in order."},
    {"notes", decoder_notes, METH_O, "(notes, names, renames) of an object."},
    {"plain", FAST(decoder_plain), METH_FASTCALL, "A window that needs no look, at once."},
    {"decode", decoder_decode, METH_O, "(changes, stop) of the next slice."},
    {"record", decoder_record, METH_NOARGS, "The record at which decode() stopped."},
    {"peek", decoder_peek, METH_NOARGS, "The next record of the same process."},
    {"advance", decoder_advance, METH_NOARGS, "Pass over that record."},
    {"finish", decoder_finish, METH_NOARGS, "End the window; names deleted of living objects."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef decoder_getset[] = {
    {"pending", decoder_pending, NULL, "Whether records are left in the window.", NULL},
    {"records", decoder_records, NULL, "Records added to the window.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot decoder_slots[] = {
    {Py_tp_new, decoder_new},         {Py_tp_dealloc, decoder_dealloc},
    {Py_tp_methods, decoder_methods}, {Py_tp_getset, decoder_getset},
    {Py_tp_doc, "Records of one window to changes."}, {0, NULL},
};
static PyType_Spec decoder_spec = {
    .name = "fanwise.kernel._native.Decoder",
    .basicsize = sizeof(decoder),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = decoder_slots,
};

int fw_add_decoder(PyObject *m)
{
    PyObject *type = PyType_FromModuleAndSpec(m, &decoder_spec, NULL);
    if (!type)
        return -1;
    int ret = PyModule_AddObjectRef(m, "Decoder", type);
    Py_DECREF(type);
    return ret;
}
