/* Index: what a consumer believes of names, by directory and name, in compact arrays: 64 bytes a name
 * and its share of the hash, beyond the name. _pure_index.py is the same in Python, and the reference.
 *
 * REFS      an entry names its directory by number, and its neighbours in the directory's list, which
 *           is in the order of the first listing: the next listing finds most entries by walking on.
 * LOCKING   none: one owner calls it, under the interpreter lock.
 * LIFETIME  a directory is held from its first listing, `hold` or `put`, or from the record that made
 *           it, until `forget` or the record that removed it. Numbers of entries and directories are
 *           used again, and change when much was removed (repack).
 */
#include "_native.h"
#include "_tree.h"
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { /* fanotify bits, include/uapi/linux/fanotify.h */
    MODIFY = 0x2, ATTRIB = 0x4, CLOSE_WRITE = 0x8, CREATE = 0x100, DELETE = 0x200,
    DELETE_SELF = 0x400, Q_OVERFLOW = 0x4000, RENAME = 0x10000000, ONDIR = 0x40000000 };
enum { /* what diff() found; contract.py has the same */
    CREATED = 1, DELETED = 2, MODIFIED = 4, ATTRIBUTES = 8, REPLACED = 16, WAS_DIR = 32 };
enum { LISTED_DIR = 1, LISTED_HIDDEN = 2 };
enum { /* of an entry: what it knows (the first three), and what it is */
    E_INO = 1, E_DATA = 2, E_CTIME = 4, E_KNOWN = 7, E_DIR = 8, E_SEEN = 16, E_FREE = 32 };
enum { AHEAD = 16 }; /* records, between the two of an exchange of names */
#define NAME_MOST 65535u

typedef struct {
    uint64_t ino, size;    /* ino: the identity that the scan makes of inode and birth time */
    int64_t mtime, ctime; /* ns; a ctime that is not known is a bound */
    uint64_t off;
    uint32_t hash, dir, next, prev;
    uint16_t namelen, flags;
} entry;

typedef struct {
    uint64_t off; /* the key */
    uint32_t hash, first, last, count;
    uint16_t keylen, held;
} directory;

typedef struct {
    uint64_t ino, size;
    int64_t mtime, ctime;
    uint32_t flags;
    fw_span name;
} listed;

typedef struct {
    PyObject_HEAD
    entry *entries;
    uint32_t limit, cap, free, count;
    uint32_t *slots, mask;
    directory *dirs;
    uint32_t dlimit, dcap, dfree, dcount;
    uint32_t *dslots, dmask;
    uint8_t *arena;
    size_t used, room, garbage;
    size_t at, off; /* of a window: how far its records were taken, */
    uint32_t skip;  /* and which of the next ones are taken already: bit n is the one n on */
    uint64_t seed; /* names are chosen by others: they must not choose where they fall */
} names_index;

/* ---- arrays ---- */

static uint32_t name_hash(const names_index *x, uint32_t dir, fw_span s)
{
    uint64_t h = x->seed ^ (dir * 0x9e3779b97f4a7c15ull) ^ s.n, w;
    const uint8_t *p = s.p;
    size_t n = s.n;
    for (; n >= 8; p += 8, n -= 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
    }
    w = 0;
    memcpy(&w, p, n);
    h = (h ^ w) * 0xff51afd7ed558ccdull;
    h ^= h >> 29;
    h *= 0xc4ceb9fe1a85ec53ull;
    return (uint32_t)(h ^ (h >> 32));
}

static int is_name_of(const names_index *x, const entry *e, fw_span s)
{
    return e->namelen == s.n && !memcmp(x->arena + e->off, s.p, s.n);
}

static uint32_t find(const names_index *x, uint32_t dir, fw_span s)
{
    if (!x->slots || dir == FW_NONE)
        return FW_NONE;
    uint32_t h = name_hash(x, dir, s), id;
    for (uint32_t i = h & x->mask; (id = x->slots[i]) != FW_NONE; i = (i + 1) & x->mask) {
        const entry *e = &x->entries[id];
        if (e->hash == h && e->dir == dir && is_name_of(x, e, s))
            return id;
    }
    return FW_NONE;
}

static uint32_t dir_find(const names_index *x, fw_span key)
{
    if (!x->dslots || !key.p)
        return FW_NONE;
    uint32_t h = fw_hash(key.p, key.n), id;
    for (uint32_t i = h & x->dmask; (id = x->dslots[i]) != FW_NONE; i = (i + 1) & x->dmask) {
        const directory *d = &x->dirs[id];
        if (d->hash == h && d->keylen == key.n && !memcmp(x->arena + d->off, key.p, key.n))
            return id;
    }
    return FW_NONE;
}

static void slot_in(uint32_t *slots, uint32_t mask, uint32_t hash, uint32_t id)
{
    uint32_t i = hash & mask;
    while (slots[i] != FW_NONE)
        i = (i + 1) & mask;
    slots[i] = id;
}

static uint32_t *slots_new(uint32_t size)
{
    uint32_t *s = malloc((size_t)size * sizeof *s);
    if (s)
        memset(s, 0xff, (size_t)size * sizeof *s);
    return s;
}

/* The hash of an id in the entries or, with dirs, in the directories. */
static uint32_t hash_of(const names_index *x, int dirs, uint32_t id)
{
    return dirs ? x->dirs[id].hash : x->entries[id].hash;
}

static void slot_out(const names_index *x, int dirs, uint32_t id)
{
    uint32_t *slots = dirs ? x->dslots : x->slots, mask = dirs ? x->dmask : x->mask;
    uint32_t i = hash_of(x, dirs, id) & mask;
    while (slots[i] != id)
        i = (i + 1) & mask;
    /* Shift back what probed past the hole, so that no tombstones pile up. */
    for (uint32_t j = i;;) {
        j = (j + 1) & mask;
        uint32_t other = slots[j];
        if (other == FW_NONE)
            break;
        uint32_t home = hash_of(x, dirs, other) & mask;
        if (((j - home) & mask) >= ((j - i) & mask)) {
            slots[i] = other;
            i = j;
        }
    }
    slots[i] = FW_NONE;
}

/* Copy what is used of the arena to a new one, the names of each directory in the order of its list. */
static int arena_pack(names_index *x, size_t need)
{
    size_t room = x->used - x->garbage, at = 0;
    room += room / 8 + need + 4096;
    uint8_t *a = malloc(room);
    if (!a)
        return -1;
    for (uint32_t k = 0; k < x->dlimit; k++) {
        directory *d = &x->dirs[k];
        if (!d->held)
            continue;
        memcpy(a + at, x->arena + d->off, d->keylen);
        d->off = at;
        at += d->keylen;
        for (uint32_t i = d->first; i != FW_NONE; i = x->entries[i].next) {
            entry *e = &x->entries[i];
            memcpy(a + at, x->arena + e->off, e->namelen);
            e->off = at;
            at += e->namelen;
        }
    }
    free(x->arena);
    x->arena = a;
    x->room = room;
    x->used = at;
    x->garbage = 0;
    return 0;
}

static int arena_room(names_index *x, size_t need)
{
    if (x->arena && x->used + need <= x->room)
        return 0;
    if (x->garbage > 4096 && x->garbage > x->used / 4)
        return arena_pack(x, need);
    size_t room = x->room + x->room / 4 + need + 1024;
    uint8_t *a = realloc(x->arena, room);
    if (!a)
        return -1;
    x->arena = a;
    x->room = room;
    return 0;
}

static uint64_t arena_add(names_index *x, fw_span s)
{
    uint64_t at = x->used;
    memcpy(x->arena + at, s.p, s.n);
    x->used += s.n;
    return at;
}

/* Room for one more of count in slots of which a quarter stays empty. */
static int slots_room(names_index *x, int dirs)
{
    uint32_t count = dirs ? x->dcount : x->count, mask = dirs ? x->dmask : x->mask;
    uint32_t limit = dirs ? x->dlimit : x->limit;
    uint32_t *old = dirs ? x->dslots : x->slots;
    if (old && ((uint64_t)count + 1) * 4 <= ((uint64_t)mask + 1) * 3)
        return 0;
    if (old && mask > 0x7ffffffeu)
        return -1;
    uint32_t size = old ? (mask + 1) * 2 : 64, *s = slots_new(size);
    if (!s)
        return -1;
    for (uint32_t id = 0; id < limit; id++)
        if (dirs ? x->dirs[id].held : !(x->entries[id].flags & E_FREE))
            slot_in(s, size - 1, hash_of(x, dirs, id), id);
    free(old);
    if (dirs)
        x->dslots = s, x->dmask = size - 1;
    else
        x->slots = s, x->mask = size - 1;
    return 0;
}

/* ---- directories and entries; a number is FW_NONE with MemoryError set, or when there is none ---- */

static uint32_t dir_get(names_index *x, fw_span key)
{
    uint32_t id = dir_find(x, key);
    if (id != FW_NONE)
        return id;
    if (arena_room(x, key.n) < 0 || slots_room(x, 1) < 0)
        goto nomem;
    if (x->dfree != FW_NONE) {
        id = x->dfree;
        x->dfree = x->dirs[id].first;
    } else {
        if (x->dlimit == x->dcap) {
            uint32_t cap = x->dcap + x->dcap / 4 + 16;
            directory *d = realloc(x->dirs, (size_t)cap * sizeof *d);
            if (!d)
                goto nomem;
            x->dirs = d;
            x->dcap = cap;
        }
        id = x->dlimit++;
    }
    x->dirs[id] = (directory){.off = arena_add(x, key),
                              .hash = fw_hash(key.p, key.n),
                              .first = FW_NONE,
                              .last = FW_NONE,
                              .keylen = (uint16_t)key.n,
                              .held = 1};
    slot_in(x->dslots, x->dmask, x->dirs[id].hash, id);
    x->dcount++;
    return id;
nomem:
    PyErr_NoMemory();
    return FW_NONE;
}

/* A new entry at the end of its directory; the name is not there yet. */
static uint32_t add(names_index *x, uint32_t dir, fw_span name, int is_dir, int64_t bound)
{
    uint32_t id;
    if (arena_room(x, name.n) < 0 || slots_room(x, 0) < 0)
        goto nomem;
    if (x->free != FW_NONE) {
        id = x->free;
        x->free = x->entries[id].next;
    } else {
        if (x->limit == x->cap) {
            size_t cap = (size_t)x->cap + x->cap / 4 + 64;
            entry *e = cap < FW_NONE ? realloc(x->entries, cap * sizeof *e) : NULL;
            if (!e)
                goto nomem;
            x->entries = e;
            x->cap = (uint32_t)cap;
        }
        id = x->limit++;
    }
    directory *d = &x->dirs[dir];
    x->entries[id] = (entry){.ctime = bound,
                             .off = arena_add(x, name),
                             .hash = name_hash(x, dir, name),
                             .dir = dir,
                             .next = FW_NONE,
                             .prev = d->last,
                             .namelen = (uint16_t)name.n,
                             .flags = is_dir ? E_DIR : 0};
    if (d->last == FW_NONE)
        d->first = id;
    else
        x->entries[d->last].next = id;
    d->last = id;
    d->count++;
    slot_in(x->slots, x->mask, x->entries[id].hash, id);
    x->count++;
    return id;
nomem:
    PyErr_NoMemory();
    return FW_NONE;
}

static void drop(names_index *x, uint32_t id)
{
    entry *e = &x->entries[id];
    directory *d = &x->dirs[e->dir];
    if (e->prev == FW_NONE)
        d->first = e->next;
    else
        x->entries[e->prev].next = e->next;
    if (e->next == FW_NONE)
        d->last = e->prev;
    else
        x->entries[e->next].prev = e->prev;
    d->count--;
    slot_out(x, 0, id);
    x->garbage += e->namelen;
    e->flags = E_FREE;
    e->next = x->free;
    x->free = id;
    x->count--;
}

static void dir_drop(names_index *x, uint32_t dir)
{
    if (dir == FW_NONE)
        return;
    while (x->dirs[dir].first != FW_NONE)
        drop(x, x->dirs[dir].first);
    slot_out(x, 1, dir);
    directory *d = &x->dirs[dir];
    x->garbage += d->keylen;
    d->held = 0;
    d->first = x->dfree;
    x->dfree = dir;
    x->dcount--;
}

/* Put a name of which no more is known than that it is there. */
static uint32_t put(names_index *x, uint32_t dir, fw_span name, int is_dir, int64_t bound)
{
    uint32_t id = find(x, dir, name);
    if (id == FW_NONE)
        return add(x, dir, name, is_dir, bound);
    entry *e = &x->entries[id];
    e->ino = e->size = 0;
    e->mtime = 0;
    e->ctime = bound;
    e->flags = is_dir ? E_DIR : 0;
    return id;
}

/* Put a name with what was known of it, over another if need be; its ctime is not known any more. */
static int bring(names_index *x, uint32_t dir, fw_span name, const entry *was)
{
    uint32_t id = put(x, dir, name, was->flags & E_DIR, was->ctime);
    if (id == FW_NONE)
        return -1;
    entry *e = &x->entries[id];
    e->ino = was->ino;
    e->size = was->size;
    e->mtime = was->mtime;
    e->flags |= was->flags & (E_INO | E_DATA);
    return 0;
}

/* Give memory back when most of it is not used; no number that was taken before holds after it. */
static void repack(names_index *x)
{
    int spare = x->limit > 4096 && x->count < x->limit / 4;
    int dspare = x->dlimit > 1024 && x->dcount < x->dlimit / 4;
    if (!spare && !dspare) {
        if (x->garbage > 65536 && x->garbage > x->used / 2)
            arena_pack(x, 0); /* or not: there was room before */
        return;
    }
    uint32_t cap = x->count + x->count / 8 + 64, size = 64;
    uint32_t dcap = x->dcount + x->dcount / 8 + 16, dsize = 64, at = 0, dat = 0;
    while ((uint64_t)size * 3 < ((uint64_t)x->count + 1) * 4)
        size *= 2;
    while ((uint64_t)dsize * 3 < ((uint64_t)x->dcount + 1) * 4)
        dsize *= 2;
    entry *entries = malloc((size_t)cap * sizeof *entries);
    directory *dirs = malloc((size_t)dcap * sizeof *dirs);
    uint32_t *slots = slots_new(size), *dslots = slots_new(dsize);
    if (!entries || !dirs || !slots || !dslots || arena_pack(x, 0) < 0) {
        free(entries);
        free(dirs);
        free(slots);
        free(dslots);
        return; /* it stays as large as it is */
    }
    for (uint32_t k = 0; k < x->dlimit; k++) {
        if (!x->dirs[k].held)
            continue;
        directory *d = &dirs[dat];
        *d = x->dirs[k];
        d->first = d->last = FW_NONE;
        for (uint32_t i = x->dirs[k].first; i != FW_NONE; i = x->entries[i].next) {
            entry *e = &entries[at];
            *e = x->entries[i];
            e->dir = dat;
            e->hash = name_hash(x, dat, (fw_span){x->arena + e->off, e->namelen});
            e->prev = d->last;
            e->next = FW_NONE;
            if (d->last == FW_NONE)
                d->first = at;
            else
                entries[d->last].next = at;
            d->last = at;
            slot_in(slots, size - 1, e->hash, at++);
        }
        slot_in(dslots, dsize - 1, d->hash, dat++);
    }
    free(x->entries);
    free(x->dirs);
    free(x->slots);
    free(x->dslots);
    x->entries = entries;
    x->dirs = dirs;
    x->slots = slots;
    x->dslots = dslots;
    x->limit = at;
    x->cap = cap;
    x->mask = size - 1;
    x->dlimit = dat;
    x->dcap = dcap;
    x->dmask = dsize - 1;
    x->free = x->dfree = FW_NONE;
}

static void reset(names_index *x)
{
    free(x->entries);
    free(x->slots);
    free(x->dirs);
    free(x->dslots);
    free(x->arena);
    x->entries = NULL;
    x->dirs = NULL;
    x->slots = x->dslots = NULL;
    x->arena = NULL;
    x->limit = x->cap = x->count = x->mask = 0;
    x->dlimit = x->dcap = x->dcount = x->dmask = 0;
    x->used = x->room = x->garbage = 0;
    x->free = x->dfree = FW_NONE;
}

/* ---- a listing ---- */

typedef struct {
    int what, is_dir;
    PyObject *name;
} row;

typedef struct {
    row *p;
    size_t n, cap;
} rows;

static int row_add(rows *r, int what, const uint8_t *p, size_t n, int is_dir)
{
    if (r->n == r->cap) {
        size_t cap = r->cap * 2 + 64;
        row *p2 = realloc(r->p, cap * sizeof *p2);
        if (!p2) {
            PyErr_NoMemory();
            return -1;
        }
        r->p = p2;
        r->cap = cap;
    }
    PyObject *name = PyBytes_FromStringAndSize((const char *)p, (Py_ssize_t)n);
    if (!name)
        return -1;
    r->p[r->n++] = (row){what, is_dir, name};
    return 0;
}

static int row_order(const void *one, const void *two)
{
    const row *a = one, *b = two;
    int gone = (b->what == DELETED) - (a->what == DELETED);
    if (gone)
        return gone;
    Py_ssize_t n = PyBytes_Size(a->name), m = PyBytes_Size(b->name);
    int d = memcmp(PyBytes_AsString(a->name), PyBytes_AsString(b->name),
                   (size_t)(n < m ? n : m));
    return d ? d : (n > m) - (n < m);
}

static PyObject *rows_list(rows *r)
{
    if (r->n > 1)
        qsort(r->p, r->n, sizeof *r->p, row_order);
    PyObject *l = PyList_New((Py_ssize_t)r->n);
    for (size_t i = 0; l && i < r->n; i++) {
        PyObject *o = Py_BuildValue("(iOO)", r->p[i].what, r->p[i].name,
                                    r->p[i].is_dir ? Py_True : Py_False);
        if (!o || PyList_SetItem(l, (Py_ssize_t)i, o) < 0)
            Py_CLEAR(l);
    }
    return l;
}

static void rows_free(rows *r)
{
    for (size_t i = 0; i < r->n; i++)
        Py_DECREF(r->p[i].name);
    free(r->p);
}

enum { HEAD = 40 }; /* u64 identity, size, i64 mtime, ctime, u32 flags, u16 length of the name, u16 0 */

/* The entry of a listing at off, and where the next begins; NULL, or what is wrong. */
static const char *unpack(const uint8_t *p, size_t n, size_t *off, listed *ret)
{
    uint16_t length;
    if (n - *off < HEAD)
        return "listing is cut short";
    p += *off;
    memcpy(&ret->ino, p, 8);
    memcpy(&ret->size, p + 8, 8);
    memcpy(&ret->mtime, p + 16, 8);
    memcpy(&ret->ctime, p + 24, 8);
    memcpy(&ret->flags, p + 32, 4);
    memcpy(&length, p + 36, 2);
    *off += HEAD;
    if (!length || length > n - *off)
        return "name in a listing does not fit";
    ret->name = (fw_span){p + HEAD, length};
    *off += length;
    return NULL;
}

static int is_dir_of(const entry *e)
{
    return (e->flags & E_DIR) != 0;
}

static int replaced(const entry *e)
{
    return REPLACED | (is_dir_of(e) ? WAS_DIR : 0);
}

/* What became of an entry, by what is listed of it now. */
static int difference(const entry *e, const listed *now, int64_t told)
{
    int is_dir = (now->flags & LISTED_DIR) != 0, data = e->flags & E_DATA;
    if (is_dir_of(e) != is_dir)
        return replaced(e);
    if (now->flags & LISTED_HIDDEN) /* nothing is seen but the name and the type */
        return 0;
    if (e->flags & E_INO && e->ino != now->ino)
        return replaced(e);
    int later = now->ctime > (e->ctime > told ? e->ctime : told);
    if (is_dir)
        /* Its names change its times; what changes only its ctime is told live as of the directory
         * itself, which no record joins with the name: so only what is later than all told. */
        return data && e->mtime == now->mtime && later ? ATTRIBUTES : 0;
    if (data && (e->size != now->size || e->mtime != now->mtime))
        return MODIFIED;
    if (e->flags & E_CTIME ? now->ctime != e->ctime : later)
        return data ? ATTRIBUTES : MODIFIED;
    return 0;
}

static void set(entry *e, const listed *now)
{
    uint16_t dir = now->flags & LISTED_DIR ? E_DIR : 0;
    if (now->flags & LISTED_HIDDEN) {
        if ((e->flags & E_DIR) != dir) {
            e->flags = (uint16_t)((e->flags & E_SEEN) | dir);
            e->ino = e->size = 0;
            e->mtime = e->ctime = 0;
        }
        return;
    }
    e->ino = now->ino;
    e->size = now->size;
    e->mtime = now->mtime;
    e->ctime = now->ctime;
    e->flags = (uint16_t)((e->flags & E_SEEN) | dir | E_KNOWN);
}

static int is_name(fw_span s)
{
    return s.p && s.n && s.n <= NAME_MOST && !(s.n == 1 && s.p[0] == '.');
}

static int take_listed(names_index *x, uint32_t dir, fw_span listing, PyObject *firsts, int learn,
                       int64_t told, rows *out)
{
    uint32_t at = x->dirs[dir].first; /* where the next name is found if the order is the same */
    for (size_t off = 0; off < listing.n;) {
        listed now;
        unpack(listing.p, listing.n, &off, &now);
        if (firsts && is_name(now.name)) {
            PyObject *name = PyBytes_FromStringAndSize((const char *)now.name.p, now.name.n);
            PyObject *first = name ? PyDict_GetItemWithError(firsts, name) : NULL;
            Py_XDECREF(name);
            if (first)
                continue;
            if (PyErr_Occurred())
                return -1;
        }
        uint32_t id = at;
        if (id == FW_NONE || !is_name_of(x, &x->entries[id], now.name))
            id = find(x, dir, now.name);
        int is_dir = (now.flags & LISTED_DIR) != 0, what;
        if (id == FW_NONE) {
            id = add(x, dir, now.name, is_dir, 0);
            if (id == FW_NONE)
                return -1;
            what = CREATED;
        } else {
            entry *e = &x->entries[id];
            at = e->next;
            if (e->flags & E_SEEN) /* listed twice: the first counts */
                continue;
            if (learn && e->flags & E_KNOWN) {
                e->flags |= E_SEEN;
                continue;
            }
            what = difference(e, &now, told);
        }
        set(&x->entries[id], &now);
        x->entries[id].flags |= E_SEEN;
        if (what && !learn && row_add(out, what, now.name.p, now.name.n, is_dir) < 0)
            return -1;
    }
    return 0;
}

static int take_firsts(names_index *x, uint32_t dir, PyObject *firsts, int learn, rows *out)
{
    PyObject *key, *value;
    Py_ssize_t pos = 0;
    while (PyDict_Next(firsts, &pos, &key, &value)) {
        Py_ssize_t n = PyBytes_Size(key);
        if (n > (Py_ssize_t)NAME_MOST)
            continue;
        fw_span name = {(const uint8_t *)PyBytes_AsString(key), (uint32_t)n};
        int is_dir = PyTuple_GetItem(value, 1) == Py_True, what = CREATED;
        if (!is_name(name) || PyTuple_GetItem(value, 0) != Py_True)
            continue;
        uint32_t id = find(x, dir, name);
        if (id != FW_NONE) {
            entry *e = &x->entries[id];
            if (learn || is_dir_of(e) == is_dir) {
                e->flags |= E_SEEN;
                continue;
            }
            what = replaced(e);
        }
        id = put(x, dir, name, is_dir, 0);
        if (id == FW_NONE)
            return -1;
        x->entries[id].flags |= E_SEEN;
        if (!learn && row_add(out, what, name.p, name.n, is_dir) < 0)
            return -1;
    }
    return 0;
}

/* ---- records ---- */

typedef struct {
    PyObject *decoder; /* or NULL: only the one chunk */
    fw_span chunk;
    size_t at, off;
} cursor;

static int next(cursor *c, fw_record *r)
{
    while (c->off >= c->chunk.n) {
        c->off = 0;
        if (!c->decoder || !fw_window_chunk(c->decoder, ++c->at, &c->chunk)) {
            c->chunk.n = 0;
            return 0;
        }
    }
    if (fw_parse(c->chunk.p, c->chunk.n, c->off, r))
        return 0; /* cannot be: it was validated */
    c->off += r->len;
    return 1;
}

/* Whether the next record is before some position in the window. */
static int is_before(cursor *c, size_t at, size_t off)
{
    fw_span chunk;
    while (c->off >= c->chunk.n && fw_window_chunk(c->decoder, c->at + 1, &chunk))
        c->at++, c->off = 0, c->chunk = chunk;
    return c->at < at || (c->at == at && c->off < off);
}

static int same(fw_span a, fw_span b)
{
    return a.n == b.n && (!a.n || !memcmp(a.p, b.p, a.n));
}

static int same_name(fw_span dir, fw_span name, int there, fw_span dir2, fw_span name2)
{
    return there && same(dir, dir2) && same(name, name2);
}

/* Whether the records go on with the second one of an exchange of two names (RENAME_EXCHANGE) of
 * which r is the first: the same names the other way round, and another object. How many records on
 * it is, or 0; ret is that record. */
static int exchange(cursor c, const fw_record *r, fw_record *ret)
{
    for (int on = 1; on <= AHEAD && next(&c, ret); on++) {
        if (ret->mask & Q_OVERFLOW)
            return 0;
        if (!(ret->mask & (CREATE | DELETE | RENAME)))
            continue;
        int two = ret->name2.p != NULL;
        if (ret->mask & RENAME && same_name(ret->dir, ret->name, ret->has_name, r->dir2, r->name2) &&
            same_name(ret->dir2, ret->name2, two, r->dir, r->name)) {
            int no = !r->target.n || !ret->target.n || same(r->target, ret->target);
            return no || r->pid != ret->pid ? 0 : on;
        }
        if (same_name(ret->dir, ret->name, ret->has_name, r->dir, r->name) ||
            same_name(ret->dir, ret->name, ret->has_name, r->dir2, r->name2) ||
            same_name(ret->dir2, ret->name2, two, r->dir, r->name) ||
            same_name(ret->dir2, ret->name2, two, r->dir2, r->name2))
            return 0;
    }
    return 0;
}

static uint32_t dir_named(const names_index *x, fw_span key, fw_span name)
{
    return is_name(name) && key.n ? dir_find(x, key) : FW_NONE;
}

/* Take an entry out, or make one up that stands for it where it is not held or another type. */
static void take(names_index *x, uint32_t id, uint64_t mask, int64_t before, entry *ret)
{
    int is_dir = (mask & ONDIR) != 0;
    if (id != FW_NONE && is_dir_of(&x->entries[id]) == is_dir)
        *ret = x->entries[id];
    else
        *ret = (entry){.ctime = before, .flags = is_dir ? E_DIR : 0};
    if (id != FW_NONE)
        drop(x, id);
}

static int apply_rename(names_index *x, const cursor *c, const fw_record *r, int64_t before,
                        uint32_t *skip)
{
    uint32_t dir = dir_named(x, r->dir, r->name), dir2 = dir_named(x, r->dir2, r->name2);
    if (dir == FW_NONE && dir2 == FW_NONE)
        return 0;
    uint32_t id = find(x, dir, r->name);
    if (dir == dir2 && same(r->name, r->name2)) {
        if (id != FW_NONE)
            x->entries[id].flags &= (uint16_t)~E_CTIME;
        return 0;
    }
    uint32_t id2 = find(x, dir2, r->name2);
    fw_record back;
    int on = id2 == FW_NONE ? 0 : exchange(*c, r, &back);
    entry one, two;
    take(x, id, r->mask, before, &one);
    take(x, id2, on ? back.mask : 0, before, &two);
    if (dir2 != FW_NONE && bring(x, dir2, r->name2, &one) < 0)
        return -1;
    if (on) {
        *skip |= 1u << on;
        if (dir != FW_NONE && bring(x, dir, r->name, &two) < 0)
            return -1;
    }
    return 0;
}

static int apply_one(names_index *x, const cursor *c, const fw_record *r, int64_t before,
                     uint32_t *skip)
{
    if (!r->has_name || r->mask & Q_OVERFLOW)
        return 0;
    if (fw_is_self(r)) {
        if (r->mask & DELETE_SELF && r->dir.n)
            dir_drop(x, dir_find(x, r->dir));
        return 0;
    }
    if (r->mask & RENAME)
        return apply_rename(x, c, r, before, skip);
    if (!(r->mask & (CREATE | DELETE | MODIFY | ATTRIB | CLOSE_WRITE)))
        return 0;
    uint32_t dir = dir_named(x, r->dir, r->name);
    if (dir == FW_NONE)
        return 0;
    int of_dir = r->mask & ONDIR && r->target.n;
    if ((r->mask & (CREATE | DELETE)) == CREATE) {
        if (put(x, dir, r->name, (r->mask & ONDIR) != 0, before) == FW_NONE)
            return -1;
        return of_dir && dir_get(x, r->target) == FW_NONE ? -1 : 0;
    }
    uint32_t id = find(x, dir, r->name);
    if (r->mask & DELETE) {
        if (id != FW_NONE)
            drop(x, id);
        if (of_dir && !(r->mask & CREATE)) /* else what was made in it follows */
            dir_drop(x, dir_find(x, r->target));
    } else if (id != FW_NONE)
        x->entries[id].flags &= (uint16_t)~(E_DATA | E_CTIME);
    return 0;
}

/* ---- Python type ---- */

static int need(Py_ssize_t have, Py_ssize_t least, Py_ssize_t most)
{
    if (have >= least && have <= most)
        return 0;
    PyErr_Format(PyExc_TypeError, "takes %zd to %zd arguments, got %zd", least, most, have);
    return -1;
}

static int arg_key(PyObject *o, fw_span *ret)
{
    char *p;
    Py_ssize_t n;
    if (PyBytes_AsStringAndSize(o, &p, &n) < 0)
        return -1;
    if (n > FW_KEY_MAX) {
        PyErr_SetString(PyExc_ValueError, "handle key longer than 132 bytes");
        return -1;
    }
    *ret = (fw_span){(const uint8_t *)p, (uint32_t)n};
    return 0;
}

static int arg_name(PyObject *o, fw_span *ret)
{
    char *p;
    Py_ssize_t n;
    if (PyBytes_AsStringAndSize(o, &p, &n) < 0)
        return -1;
    *ret = (fw_span){(const uint8_t *)p, n > (Py_ssize_t)NAME_MOST ? 0 : (uint32_t)n};
    if (is_name(*ret))
        return 0;
    PyErr_SetString(PyExc_ValueError, "not a name");
    return -1;
}

/* Exactly an int: __index__ of anything else could run code that changes the index meanwhile. */
static int arg_ns(PyObject *const *a, Py_ssize_t na, Py_ssize_t at, int64_t *ret)
{
    *ret = 0;
    if (na <= at)
        return 0;
    if (!PyLong_Check(a[at])) {
        PyErr_SetString(PyExc_TypeError, "nanoseconds: an integer is required");
        return -1;
    }
    *ret = PyLong_AsLongLong(a[at]);
    return *ret == -1 && PyErr_Occurred() ? -1 : 0;
}

static int arg_bool(PyObject *o, int *ret)
{
    if (!PyBool_Check(o)) {
        PyErr_SetString(PyExc_TypeError, "a bool is required");
        return -1;
    }
    *ret = o == Py_True;
    return 0;
}

static int arg_firsts(PyObject *o)
{
    PyObject *key, *value;
    Py_ssize_t pos = 0;
    int ok = PyDict_Check(o);
    while (ok && PyDict_Next(o, &pos, &key, &value))
        ok = PyBytes_CheckExact(key) && PyTuple_Check(value) && PyTuple_Size(value) == 2 &&
             PyBool_Check(PyTuple_GetItem(value, 0)) && PyBool_Check(PyTuple_GetItem(value, 1));
    if (!ok)
        PyErr_SetString(PyExc_TypeError, "firsts: bytes -> (bool, bool)");
    return ok ? 0 : -1;
}

static PyObject *index_diff(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    names_index *x = (names_index *)self;
    fw_span key;
    char *p;
    Py_ssize_t n;
    int learn;
    int64_t told;
    if (need(na, 4, 5) || arg_key(a[0], &key) || PyBytes_AsStringAndSize(a[1], &p, &n) < 0 ||
        (a[2] != Py_None && arg_firsts(a[2])) || arg_bool(a[3], &learn) || arg_ns(a, na, 4, &told))
        return NULL;
    if ((uint64_t)n > 0xfffffff0u) {
        PyErr_SetString(PyExc_ValueError, "listing too large");
        return NULL;
    }
    fw_span listing = {(const uint8_t *)p, (uint32_t)n};
    for (size_t off = 0; off < listing.n;) { /* the whole listing, or none of it */
        listed now;
        const char *why = unpack(listing.p, listing.n, &off, &now);
        if (why) {
            PyErr_SetString(PyExc_ValueError, why);
            return NULL;
        }
    }
    PyObject *firsts = a[2] != Py_None && PyDict_Size(a[2]) ? a[2] : NULL;
    uint32_t dir = dir_get(x, key);
    if (dir == FW_NONE)
        return NULL;
    rows out = {NULL, 0, 0};
    /* Nothing here runs other code: of objects, only bytes are made until the index is done. */
    int ret = take_listed(x, dir, listing, firsts, learn, told, &out);
    if (!ret && firsts)
        ret = take_firsts(x, dir, firsts, learn, &out);
    for (uint32_t id = x->dirs[dir].first, after; id != FW_NONE; id = after) {
        entry *e = &x->entries[id];
        after = e->next;
        if (e->flags & E_SEEN)
            e->flags &= (uint16_t)~E_SEEN;
        else if (!learn && !ret) {
            ret = row_add(&out, DELETED, x->arena + e->off, e->namelen, is_dir_of(e));
            if (!ret)
                drop(x, id);
        }
    }
    repack(x);
    PyObject *l = ret ? NULL : rows_list(&out);
    rows_free(&out);
    return l;
}

static PyObject *index_apply(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    names_index *x = (names_index *)self;
    int64_t before;
    if (need(na, 1, 3) || arg_ns(a, na, 1, &before))
        return NULL;
    if (na > 2 && !PyBool_Check(a[2])) {
        PyErr_SetString(PyExc_TypeError, "a bool is required");
        return NULL;
    }
    int all = na < 3 || a[2] == Py_True;
    size_t to = 0, off_to = 0;
    cursor c = {NULL, {NULL, 0}, 0, 0};
    fw_record r;
    if (PyBytes_Check(a[0])) {
        char *p;
        Py_ssize_t n;
        if (PyBytes_AsStringAndSize(a[0], &p, &n) < 0)
            return NULL;
        if ((uint64_t)n > 0xfffffff0u) {
            PyErr_SetString(PyExc_ValueError, "chunk too large");
            return NULL;
        }
        c.chunk = (fw_span){(const uint8_t *)p, (uint32_t)n};
        for (size_t off = 0; off < c.chunk.n; off += r.len) {
            const char *why = fw_parse(c.chunk.p, c.chunk.n, off, &r);
            if (why) {
                fw_decode_error(off, why);
                return NULL;
            }
        }
        x->at = x->off = x->skip = 0;
        all = 1;
    } else {
        PyObject *m = PyType_GetModule(Py_TYPE(self));
        PyObject *type = m ? PyObject_GetAttrString(m, "Decoder") : NULL;
        if (!type)
            return NULL;
        int ok = PyObject_TypeCheck(a[0], (PyTypeObject *)type);
        Py_DECREF(type);
        if (!ok) {
            PyErr_SetString(PyExc_TypeError, "a Decoder or bytes");
            return NULL;
        }
        c.decoder = a[0];
        fw_window_chunk(c.decoder, x->at, &c.chunk); /* none: all of it was taken */
        c.at = x->at, c.off = x->off;
        fw_window_at(c.decoder, &to, &off_to);
    }
    uint32_t skip = x->skip;
    while ((all || is_before(&c, to, off_to)) && next(&c, &r)) {
        int done = skip & 1;
        skip &= ~1u;
        if (!done && apply_one(x, &c, &r, before, &skip) < 0)
            return NULL;
        skip >>= 1;
    }
    x->at = all ? 0 : c.at, x->off = all ? 0 : c.off, x->skip = all ? 0 : skip;
    repack(x);
    Py_RETURN_NONE;
}

static PyObject *index_hold(PyObject *self, PyObject *key)
{
    fw_span k;
    if (arg_key(key, &k) || dir_get((names_index *)self, k) == FW_NONE)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *index_put(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    names_index *x = (names_index *)self;
    fw_span key, name;
    int is_dir;
    int64_t bound;
    if (need(na, 3, 4) || arg_key(a[0], &key) || arg_name(a[1], &name) ||
        arg_bool(a[2], &is_dir) || arg_ns(a, na, 3, &bound))
        return NULL;
    uint32_t dir = dir_get(x, key);
    if (dir == FW_NONE || put(x, dir, name, is_dir, bound) == FW_NONE)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *index_remove(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    names_index *x = (names_index *)self;
    fw_span key, name;
    if (need(na, 2, 2) || arg_key(a[0], &key) || arg_name(a[1], &name))
        return NULL;
    uint32_t id = find(x, dir_find(x, key), name);
    if (id != FW_NONE) {
        drop(x, id);
        repack(x);
    }
    return PyBool_FromLong(id != FW_NONE);
}

static PyObject *index_move(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    names_index *x = (names_index *)self;
    fw_span key, name, key2, name2;
    if (need(na, 4, 4) || arg_key(a[0], &key) || arg_name(a[1], &name) || arg_key(a[2], &key2) ||
        arg_name(a[3], &name2))
        return NULL;
    uint32_t id = find(x, dir_find(x, key), name);
    if (id == FW_NONE)
        Py_RETURN_FALSE;
    uint32_t dir2 = dir_get(x, key2);
    if (dir2 == FW_NONE)
        return NULL;
    entry was = x->entries[id];
    drop(x, id);
    if (bring(x, dir2, name2, &was) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *index_find(PyObject *self, PyObject *const *a, Py_ssize_t na)
{
    names_index *x = (names_index *)self;
    fw_span key, name;
    if (need(na, 2, 2) || arg_key(a[0], &key) || arg_name(a[1], &name))
        return NULL;
    uint32_t id = find(x, dir_find(x, key), name);
    if (id == FW_NONE)
        Py_RETURN_NONE;
    return PyBool_FromLong(is_dir_of(&x->entries[id]));
}

static PyObject *index_names(PyObject *self, PyObject *key)
{
    names_index *x = (names_index *)self;
    fw_span k;
    if (arg_key(key, &k))
        return NULL;
    uint32_t dir = dir_find(x, k);
    rows out = {NULL, 0, 0};
    int ret = 0;
    for (uint32_t id = dir == FW_NONE ? FW_NONE : x->dirs[dir].first; id != FW_NONE && !ret;
         id = x->entries[id].next) {
        const entry *e = &x->entries[id];
        ret = row_add(&out, 0, x->arena + e->off, e->namelen, is_dir_of(e));
    }
    if (out.n > 1)
        qsort(out.p, out.n, sizeof *out.p, row_order);
    PyObject *l = ret ? NULL : PyList_New((Py_ssize_t)out.n);
    for (size_t i = 0; l && i < out.n; i++) {
        PyObject *o = PyTuple_Pack(2, out.p[i].name, out.p[i].is_dir ? Py_True : Py_False);
        if (!o || PyList_SetItem(l, (Py_ssize_t)i, o) < 0)
            Py_CLEAR(l);
    }
    rows_free(&out);
    return l;
}

static PyObject *index_forget(PyObject *self, PyObject *key)
{
    names_index *x = (names_index *)self;
    fw_span k;
    if (arg_key(key, &k))
        return NULL;
    dir_drop(x, dir_find(x, k));
    repack(x);
    Py_RETURN_NONE;
}

static PyObject *index_clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    names_index *x = (names_index *)self;
    reset(x);
    x->at = x->off = x->skip = 0;
    Py_RETURN_NONE;
}

static Py_ssize_t index_len(PyObject *self)
{
    return ((names_index *)self)->count;
}

static int index_contains(PyObject *self, PyObject *key)
{
    fw_span k;
    if (arg_key(key, &k))
        return -1;
    return dir_find((names_index *)self, k) != FW_NONE;
}

static PyObject *index_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    names_index *x = (names_index *)self;
    size_t n = sizeof *x + (size_t)x->cap * sizeof *x->entries + (size_t)x->dcap * sizeof *x->dirs;
    n += x->room + (x->slots ? ((size_t)x->mask + 1) * 4 : 0);
    n += x->dslots ? ((size_t)x->dmask + 1) * 4 : 0;
    return PyLong_FromSize_t(n);
}

static PyObject *index_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kw, ":Index", names))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    names_index *x = (names_index *)alloc(type, 0);
    if (!x)
        return NULL;
    reset(x);
    if (getrandom(&x->seed, sizeof x->seed, GRND_NONBLOCK) != sizeof x->seed)
        x->seed = (uint64_t)time(NULL) * 0x9e3779b97f4a7c15ull ^ (uint64_t)(uintptr_t)x;
    return (PyObject *)x;
}

static void index_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    reset((names_index *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

#define FAST(f) ((PyCFunction)(void (*)(void))(f))
static PyMethodDef index_methods[] = {
    {"diff", FAST(index_diff), METH_FASTCALL, "Take a listing; what differs."},
    {"apply", FAST(index_apply), METH_FASTCALL, "Take the records of a window or a chunk."},
    {"hold", index_hold, METH_O, "Hold a directory."},
    {"put", FAST(index_put), METH_FASTCALL, "Put a name of which no more is known."},
    {"remove", FAST(index_remove), METH_FASTCALL, "Remove a name; whether it was there."},
    {"move", FAST(index_move), METH_FASTCALL, "Move a name; whether it was there."},
    {"find", FAST(index_find), METH_FASTCALL, "Whether a name is a directory; None: not there."},
    {"names", index_names, METH_O, "(name, is a directory) of a directory, by name."},
    {"forget", index_forget, METH_O, "Hold a directory no longer, nor its names."},
    {"clear", index_clear, METH_NOARGS, "Forget everything."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef index_getset[] = {
    {"nbytes", index_nbytes, NULL, "Bytes of memory held.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot index_slots[] = {
    {Py_tp_new, index_new},         {Py_tp_dealloc, index_dealloc}, {Py_tp_methods, index_methods},
    {Py_tp_getset, index_getset},   {Py_mp_length, index_len},      {Py_sq_contains, index_contains},
    {Py_tp_doc, "What is believed of names."}, {0, NULL},
};
static PyType_Spec index_spec = {
    .name = "fanwise.kernel._native.Index",
    .basicsize = sizeof(names_index),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = index_slots,
};

int fw_add_index(PyObject *m)
{
    PyObject *type = PyType_FromModuleAndSpec(m, &index_spec, NULL);
    if (!type)
        return -1;
    int ret = PyModule_AddObjectRef(m, "Index", type);
    Py_DECREF(type);
    return ret;
}
