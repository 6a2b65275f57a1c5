/* scan_dirs: the subdirectories of some directories, by handle, without the interpreter lock; with
 * names, also all their names, or entries with inode, size and times.
 * mark_dirs: the same by path, with a mark set on each before it is listed.
 * present_in: which of some names lead to anything, a directory at a time.
 * mount_at: the mount that a path leads to: what an idle watch asks before each change.
 *
 * For each key: open by handle, getdents64, name_to_handle_at and stat for every subdirectory, and
 * for entries statx for every name.
 * Nothing stays open; a leaf has no subdirectory itself. A name on which something is mounted is no
 * subdirectory: its handle is hidden.
 */
#define _GNU_SOURCE
#include "_native.h"
#include "_tree.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct dent {
    uint64_t ino;
    int64_t off;
    unsigned short len;
    unsigned char type;
    char name[];
};

typedef struct {
    unsigned char *p; /* u32 parent, u16 key length (high bit: leaf), u16 name length, key, name */
    size_t used, room;
} found;

#define LEAF 0x8000u

enum { NAMES = 1, ENTRIES = 2 };            /* what the lists hold */
enum { LISTED_DIR = 1, LISTED_HIDDEN = 2 }; /* contract.py has the same, and these */
enum { LIST_FILES = 1, LIST_LEAVES = 2 };

static int reserve(found *f, size_t need)
{
    if (f->used + need <= f->room)
        return 0;
    size_t room = f->room * 2 + need + 4096;
    unsigned char *p = realloc(f->p, room);
    if (!p)
        return -1;
    f->p = p;
    f->room = room;
    return 0;
}

static uint64_t nanoseconds(const struct statx_timestamp *t)
{
    int64_t ns;
    if (__builtin_mul_overflow(t->tv_sec, 1000000000, &ns) ||
        __builtin_add_overflow(ns, (int64_t)t->tv_nsec, &ns))
        ns = t->tv_sec < 0 ? INT64_MIN : INT64_MAX;
    return (uint64_t)ns;
}

/* Inode numbers are used again at once (ext4): with the birth time, where there is one, it is unlikely
 * that another file looks the same. */
static uint64_t identity(const struct statx *st)
{
    uint64_t born = st->stx_mask & STATX_BTIME ? nanoseconds(&st->stx_btime) : 0;
    return st->stx_ino ^ born * 0x9e3779b97f4a7c15ull;
}

/* One entry for the blob, as contract.LISTED: -1 without memory, 1 when the name is gone, else 0. A
 * mount that lies over a name hides its data; what cannot be looked at shows none. */
static int push_entry(found *f, int fd, const char *name, int *dir)
{
    struct statx st;
    uint16_t n = (uint16_t)strlen(name), zero = 0;
    uint32_t flags = 0;
    uint64_t data[4] = {0, 0, 0, 0};
    if (statx(fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT,
              STATX_BASIC_STATS | STATX_BTIME, &st)) {
        if (errno == ENOENT || errno == ESTALE)
            return 1;
        flags = LISTED_HIDDEN;
    } else {
        *dir = S_ISDIR(st.stx_mode);
        if (st.stx_attributes & STATX_ATTR_MOUNT_ROOT)
            flags = LISTED_HIDDEN;
        else {
            data[0] = identity(&st);
            data[1] = st.stx_size;
            data[2] = nanoseconds(&st.stx_mtime);
            data[3] = nanoseconds(&st.stx_ctime);
        }
    }
    if (reserve(f, 40 + (size_t)n) < 0)
        return -1;
    flags |= *dir ? LISTED_DIR : 0;
    unsigned char *o = f->p + f->used;
    memcpy(o, data, 32);
    memcpy(o + 32, &flags, 4);
    memcpy(o + 36, &n, 2);
    memcpy(o + 38, &zero, 2);
    memcpy(o + 40, name, n);
    f->used += 40 + (size_t)n;
    return 0;
}

/* One name for the blob: "name\0", of a directory "name/\0". */
static int push_name(found *f, const char *name, int dir)
{
    size_t n = strlen(name), need = n + 1 + (dir != 0);
    if (reserve(f, need) < 0)
        return -1;
    memcpy(f->p + f->used, name, n);
    f->used += n;
    if (dir)
        f->p[f->used++] = '/';
    f->p[f->used++] = 0;
    return 0;
}

static int push(found *f, uint32_t parent, const struct file_handle *h, const char *name, int leaf)
{
    uint16_t kl = (uint16_t)(h->handle_bytes + 4), nl = (uint16_t)strlen(name);
    uint16_t marked = (uint16_t)(kl | (leaf ? LEAF : 0));
    size_t need = 8 + (size_t)kl + nl;
    if (reserve(f, need) < 0)
        return -1;
    unsigned char *o = f->p + f->used;
    memcpy(o, &parent, 4);
    memcpy(o + 4, &marked, 2);
    memcpy(o + 6, &nl, 2);
    memcpy(o + 8, &h->handle_type, 4);
    memcpy(o + 12, h->f_handle, h->handle_bytes);
    memcpy(o + 8 + kl, name, nl);
    f->used += need;
    return 0;
}

/* The step that `names` may take otherwise one day, where a filesystem has no handles to open. */
static int open_dir(int mount, const uint8_t *key, size_t kl)
{
    union {
        struct file_handle h;
        char room[sizeof(struct file_handle) + 128];
    } u;
    u.h.handle_bytes = (unsigned)(kl - 4);
    memcpy(&u.h.handle_type, key, 4);
    memcpy(u.h.f_handle, key + 4, kl - 4);
    return open_by_handle_at(mount, &u.h, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOATIME);
}

static int scan_one(int mount, const uint8_t *key, size_t kl, uint32_t parent, char *buf,
                    size_t room, found *f, found *names, int what)
{
    union {
        struct file_handle h;
        char room[sizeof(struct file_handle) + 128];
    } u;
    int fd = open_dir(mount, key, kl);
    if (fd < 0)
        return errno;
    int mine = -1, err = 0;
    for (;;) {
        long n = syscall(SYS_getdents64, fd, buf, room);
        if (n < 0)
            err = errno;
        if (n <= 0 || err)
            break;
        for (long o = 0; o < n && !err;) {
            struct dent *e = (struct dent *)(buf + o);
            o += e->len;
            if (e->name[0] == '.' && (!e->name[1] || (e->name[1] == '.' && !e->name[2])))
                continue;
            struct stat st;
            int dir = e->type == DT_DIR;
            if (what == ENTRIES) {
                int ret = push_entry(names, fd, e->name, &dir);
                if (ret < 0)
                    err = ENOMEM;
                if (ret)
                    continue; /* removed meanwhile: the stream tells */
            } else if (what == NAMES) {
                if (e->type == DT_UNKNOWN) {
                    if (fstatat(fd, e->name, &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT))
                        continue; /* removed meanwhile: the stream tells */
                    dir = S_ISDIR(st.st_mode);
                }
                if (push_name(names, e->name, dir) < 0) {
                    err = ENOMEM;
                    break;
                }
            }
            if (!dir && e->type != DT_UNKNOWN)
                continue;
            int mid;
            if (mine < 0) {
                u.h.handle_bytes = 128;
                if (name_to_handle_at(fd, "", &u.h, &mine, AT_EMPTY_PATH)) {
                    err = errno;
                    break;
                }
            }
            u.h.handle_bytes = 128;
            if (name_to_handle_at(fd, e->name, &u.h, &mid, 0))
                continue; /* removed meanwhile: the stream tells */
            if (mid != mine || fstatat(fd, e->name, &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) ||
                !S_ISDIR(st.st_mode))
                continue;
            /* Two links: "." and the name, so no "..", so no subdirectory. Filesystems that do not
             * count (btrfs: 1) are read. Reading a leaf was most of the cost of a scan. */
            if (push(f, parent, &u.h, e->name, st.st_nlink == 2) < 0)
                err = ENOMEM;
        }
    }
    close(fd);
    return err;
}

static PyObject *scan_dirs(PyObject *self, PyObject *args)
{
    (void)self;
    int mount;
    int what = 0;
    PyObject *keys, *out = NULL, *failed = NULL, *lists = NULL;
    if (!PyArg_ParseTuple(args, "iO|i:scan_dirs", &mount, &keys, &what))
        return NULL;
    if (what < 0 || what > ENTRIES) {
        PyErr_SetString(PyExc_ValueError, "names: 0, 1 or 2");
        return NULL;
    }
    Py_ssize_t n = PySequence_Size(keys);
    if (n < 0)
        return NULL;
    enum { ROOM = 1 << 16 };
    found f = {NULL, 0, 0}, names = {NULL, 0, 0};
    char *buf = malloc(ROOM);
    uint8_t(*copies)[FW_KEY_MAX] = calloc((size_t)n + 1, FW_KEY_MAX);
    uint8_t *lens = calloc((size_t)n + 1, 1);
    int *errs = calloc((size_t)n + 1, sizeof *errs);
    size_t *ends = calloc((size_t)n + 1, sizeof *ends);
    if (!buf || !copies || !lens || !errs || !ends) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *k = PySequence_GetItem(keys, i);
        char *p;
        Py_ssize_t kl;
        if (!k || PyBytes_AsStringAndSize(k, &p, &kl) < 0) {
            Py_XDECREF(k);
            goto done;
        }
        if (kl < 4 || kl > FW_KEY_MAX) {
            Py_DECREF(k);
            PyErr_SetString(PyExc_ValueError, "not a handle key");
            goto done;
        }
        memcpy(copies[i], p, (size_t)kl);
        lens[i] = (uint8_t)kl;
        Py_DECREF(k);
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n; i++) {
        size_t before = names.used;
        errs[i] = scan_one(mount, copies[i], lens[i], (uint32_t)i, buf, ROOM, &f, &names, what);
        if (errs[i])
            names.used = before;
        ends[i] = names.used;
    }
    Py_END_ALLOW_THREADS
    out = PyList_New(0);
    failed = PyList_New(0);
    lists = PyList_New(0);
    for (Py_ssize_t i = 0; what && lists && i < n; i++) {
        size_t begin = i ? ends[i - 1] : 0;
        if (errs[i])
            continue;
        PyObject *k = PySequence_GetItem(keys, i);
        PyObject *e = k ? Py_BuildValue("(Ny#)", k, names.p ? (char *)names.p + begin : "",
                                        (Py_ssize_t)(ends[i] - begin))
                        : NULL;
        if (!e || PyList_Append(lists, e) < 0)
            Py_CLEAR(lists);
        Py_XDECREF(e);
    }
    for (size_t o = 0; out && failed && o < f.used;) {
        uint32_t parent;
        uint16_t kl, nl;
        memcpy(&parent, f.p + o, 4);
        memcpy(&kl, f.p + o + 4, 2);
        memcpy(&nl, f.p + o + 6, 2);
        int leaf = (kl & LEAF) != 0;
        kl &= (uint16_t)~LEAF;
        PyObject *k = PySequence_GetItem(keys, (Py_ssize_t)parent);
        PyObject *e = k ? Py_BuildValue("(y#Ny#O)", (char *)f.p + o + 8, (Py_ssize_t)kl, k,
                                        (char *)f.p + o + 8 + kl, (Py_ssize_t)nl,
                                        leaf ? Py_True : Py_False)
                        : NULL;
        if (!e || PyList_Append(out, e) < 0)
            Py_CLEAR(out);
        Py_XDECREF(e);
        o += 8 + (size_t)kl + nl;
    }
    for (Py_ssize_t i = 0; out && failed && i < n; i++) {
        if (!errs[i])
            continue;
        PyObject *k = PySequence_GetItem(keys, i);
        PyObject *e = k ? Py_BuildValue("(Ni)", k, errs[i]) : NULL;
        if (!e || PyList_Append(failed, e) < 0)
            Py_CLEAR(failed);
        Py_XDECREF(e);
    }
done:
    free(buf);
    free(copies);
    free(lens);
    free(errs);
    free(ends);
    free(names.p);
    free(f.p);
    if (out && failed && lists)
        return Py_BuildValue("(NNN)", out, failed, lists);
    Py_XDECREF(out);
    Py_XDECREF(failed);
    Py_XDECREF(lists);
    return NULL;
}

#ifndef AT_HANDLE_FID
#define AT_HANDLE_FID 0x200
#endif

typedef struct {
    int group, inotify, all, fid;
    uint64_t mask;
} marking;

typedef struct {
    char *path; /* NUL-terminated copies, one after the other */
    size_t path_at;
    uint8_t key[FW_KEY_MAX];
    uint8_t keylen;
    int err, wd;
} marked;

/* A path longer than the kernel takes is walked in pieces. */
static int open_long(char *path, int flags)
{
    int at = AT_FDCWD;
    char *p = path;
    for (;;) {
        size_t n = strlen(p);
        char *cut = NULL;
        if (n > 4000) {
            cut = p + 4000;
            while (cut > p && *cut != '/')
                cut--;
            if (cut == p) {
                errno = ENAMETOOLONG;
                break;
            }
            *cut = 0;
        }
        int fd = openat(at, p, cut ? O_PATH | O_DIRECTORY | O_CLOEXEC : flags);
        int err = errno;
        if (at >= 0)
            close(at);
        if (cut)
            *cut = '/';
        if (fd < 0 || !cut) {
            errno = err;
            return fd;
        }
        at = fd;
        p = cut + 1;
    }
    if (at >= 0)
        close(at);
    return -1;
}

static int handle_of(int fd, const char *name, struct file_handle *h, int *mount, int *fid)
{
    h->handle_bytes = 128;
    int flags = (*name ? 0 : AT_EMPTY_PATH) | (*fid ? AT_HANDLE_FID : 0);
    if (!name_to_handle_at(fd, name, h, mount, flags))
        return 0;
    if (errno == EINVAL && *fid) { /* a kernel that does not know the flag (before v6.5) */
        *fid = 0;
        return handle_of(fd, name, h, mount, fid);
    }
    return -1;
}

static int mark_one(marking *m, marked *d, uint32_t index, char *path, char *buf, size_t room,
                    found *f)
{
    union {
        struct file_handle h;
        char room[sizeof(struct file_handle) + 128];
    } u;
    int flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW;
    int fd = open_long(path, flags | O_NOATIME);
    if (fd < 0 && errno == EPERM) /* another user's */
        fd = open_long(path, flags);
    if (fd < 0)
        return errno;
    int mine, err = 0;
    if (handle_of(fd, "", &u.h, &mine, &m->fid))
        err = errno;
    else if (u.h.handle_bytes + 4 != d->keylen || memcmp(&u.h.handle_type, d->key, 4) ||
             memcmp(u.h.f_handle, d->key + 4, u.h.handle_bytes))
        err = ESTALE; /* another one stands there now */
    else if (m->inotify) {
        char proc[40];
        snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
        d->wd = inotify_add_watch(m->group, proc, (uint32_t)m->mask);
        if (d->wd < 0)
            err = errno;
    } else if (fanotify_mark(m->group, FAN_MARK_ADD, m->mask, fd, NULL))
        err = errno;
    struct stat st;
    int files = m->all & LIST_FILES, some = m->all != 0;
    if (!err && !some) {
        if (fstat(fd, &st))
            err = errno;
        else
            some = st.st_nlink != 2; /* else a leaf: nothing to list */
    }
    while (!err && some) {
        long n = syscall(SYS_getdents64, fd, buf, room);
        if (n < 0)
            err = errno;
        if (n <= 0 || err)
            break;
        for (long o = 0; o < n && !err;) {
            struct dent *e = (struct dent *)(buf + o);
            o += e->len;
            if (!files && e->type != DT_DIR && e->type != DT_UNKNOWN)
                continue;
            if (e->name[0] == '.' && (!e->name[1] || (e->name[1] == '.' && !e->name[2])))
                continue;
            int mid, dir = e->type == DT_DIR;
            if (handle_of(fd, e->name, &u.h, &mid, &m->fid) || mid != mine)
                continue; /* removed meanwhile, or hidden by a mount */
            if (e->type == DT_UNKNOWN) {
                if (fstatat(fd, e->name, &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT))
                    continue;
                dir = S_ISDIR(st.st_mode);
            }
            if ((dir || files) && push(f, index, &u.h, e->name, dir) < 0)
                err = ENOMEM;
        }
    }
    close(fd);
    return err;
}

static PyObject *mark_dirs(PyObject *self, PyObject *args)
{
    (void)self;
    marking m = {.fid = 1};
    unsigned long long mask;
    PyObject *items, *out = NULL, *ends = NULL;
    if (!PyArg_ParseTuple(args, "ipKOi:mark_dirs", &m.group, &m.inotify, &mask, &items, &m.all))
        return NULL;
    m.mask = mask;
    Py_ssize_t n = PySequence_Size(items);
    if (n < 0)
        return NULL;
    enum { ROOM = 1 << 16 };
    found f = {NULL, 0, 0};
    char *buf = malloc(ROOM), *paths = NULL;
    size_t used = 0, have = 0;
    marked *d = calloc((size_t)n + 1, sizeof *d);
    if (!buf || !d) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(items, i);
        char *key, *path;
        Py_ssize_t kl, pl;
        if (!item || !PyArg_ParseTuple(item, "y#y#", &key, &kl, &path, &pl)) {
            Py_XDECREF(item);
            goto done;
        }
        if (kl < 4 || kl > FW_KEY_MAX) {
            Py_DECREF(item);
            PyErr_SetString(PyExc_ValueError, "not a handle key");
            goto done;
        }
        if (used + (size_t)pl + 1 > have) {
            have = have * 2 + (size_t)pl + 4096;
            char *p = realloc(paths, have);
            if (!p) {
                Py_DECREF(item);
                PyErr_NoMemory();
                goto done;
            }
            paths = p;
        }
        d[i].path_at = used;
        memcpy(paths + used, path, (size_t)pl);
        paths[used + (size_t)pl] = 0;
        used += (size_t)pl + 1;
        memcpy(d[i].key, key, (size_t)kl);
        d[i].keylen = (uint8_t)kl;
        d[i].wd = -1;
        Py_DECREF(item);
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n; i++)
        d[i].err = mark_one(&m, &d[i], (uint32_t)i, paths + d[i].path_at, buf, ROOM, &f);
    Py_END_ALLOW_THREADS
    out = PyList_New(0);
    ends = PyList_New(0);
    for (size_t o = 0; out && ends && o < f.used;) {
        uint32_t parent;
        uint16_t kl, nl;
        memcpy(&parent, f.p + o, 4);
        memcpy(&kl, f.p + o + 4, 2);
        memcpy(&nl, f.p + o + 6, 2);
        int dir = (kl & LEAF) != 0;
        kl &= (uint16_t)~LEAF;
        PyObject *e = Py_BuildValue("(y#y#y#O)", (char *)f.p + o + 8, (Py_ssize_t)kl,
                                    (char *)d[parent].key, (Py_ssize_t)d[parent].keylen,
                                    (char *)f.p + o + 8 + kl, (Py_ssize_t)nl,
                                    dir ? Py_True : Py_False);
        if (!e || PyList_Append(out, e) < 0)
            Py_CLEAR(out);
        Py_XDECREF(e);
        o += 8 + (size_t)kl + nl;
    }
    for (Py_ssize_t i = 0; out && ends && i < n; i++) {
        PyObject *e = Py_BuildValue("(ii)", d[i].err, d[i].wd);
        if (!e || PyList_Append(ends, e) < 0)
            Py_CLEAR(ends);
        Py_XDECREF(e);
    }
done:
    free(buf);
    free(paths);
    free(d);
    free(f.p);
    if (out && ends)
        return Py_BuildValue("(NN)", out, ends);
    Py_XDECREF(out);
    Py_XDECREF(ends);
    return NULL;
}

typedef struct {
    size_t path_at, first; /* of its names */
    uint32_t names;
    uint8_t key[FW_KEY_MAX];
    uint8_t keylen;
    int err;
} asked;

/* So many names are looked for in a list of the directory, if that is not much longer: one list
 * costs less than the look-ups. */
enum { MANY = 8, LONGER = 4 };

static int list_names(int dir, const char **names, uint8_t *there, uint32_t n, char *buf,
                      size_t room)
{
    uint32_t cap = 16, slots[1024] = {0}, seen = 0;
    while (cap < n * 2)
        cap *= 2;
    if (cap > 1024)
        return -1; /* the caller asks in pieces */
    for (uint32_t k = 0; k < n; k++) {
        uint32_t i = fw_hash((const uint8_t *)names[k], strlen(names[k])) & (cap - 1);
        while (slots[i])
            i = (i + 1) & (cap - 1);
        slots[i] = k + 1;
    }
    int fd = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -1; /* it may not be read, or is gone */
    long got;
    while ((got = syscall(SYS_getdents64, fd, buf, room)) > 0)
        for (long o = 0; o < got;) {
            struct dent *e = (struct dent *)(buf + o);
            o += e->len;
            if (++seen > LONGER * n + 2) { /* and "." and ".." */
                close(fd);
                return -1;
            }
            uint32_t i = fw_hash((const uint8_t *)e->name, strlen(e->name)) & (cap - 1);
            for (; slots[i]; i = (i + 1) & (cap - 1))
                if (!strcmp(names[slots[i] - 1], e->name)) {
                    there[slots[i] - 1] = 1;
                    break;
                }
        }
    close(fd);
    return got < 0 ? -1 : 0;
}

/* A look that fails says nothing, and a name that may be there is better asked about. */
static int ask_one(asked *a, char *path, const char **names, uint8_t *there, int mount, char *buf,
                   size_t room, int *fid)
{
    union {
        struct file_handle h;
        char room[sizeof(struct file_handle) + 128];
    } u;
    int fd = open_long(path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), mine, err = 0;
    if (fd < 0)
        return errno;
    if (handle_of(fd, "", &u.h, &mine, fid))
        err = errno;
    else if (mine != mount || u.h.handle_bytes + 4 != a->keylen ||
             memcmp(&u.h.handle_type, a->key, 4) ||
             memcmp(u.h.f_handle, a->key + 4, u.h.handle_bytes))
        err = ESTALE; /* another one stands there now */
    for (uint32_t k = 0; !err && k < a->names;) {
        uint32_t n = a->names - k < 512 ? a->names - k : 512;
        if (n < MANY || list_names(fd, names + k, there + k, n, buf, room) < 0)
            for (uint32_t i = k; i < k + n; i++)
                there[i] = !faccessat(fd, names[i], F_OK, AT_SYMLINK_NOFOLLOW | AT_EACCESS) ||
                           (errno != ENOENT && errno != ENOTDIR && errno != ESTALE);
        k += n;
    }
    close(fd);
    return err;
}

static PyObject *present_in(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *items, *out = NULL;
    int mount, fid = 1;
    if (!PyArg_ParseTuple(args, "Oi:present_in", &items, &mount))
        return NULL;
    Py_ssize_t n = PySequence_Size(items);
    if (n < 0)
        return NULL;
    enum { ROOM = 1 << 16 };
    char *buf = malloc(ROOM), *text = NULL;
    size_t used = 0, have = 0, count = 0, cap = 0, *ats = NULL;
    const char **names = NULL;
    uint8_t *there = NULL;
    asked *a = calloc((size_t)n + 1, sizeof *a);
    if (!buf || !a) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(items, i), *some, *all = NULL;
        char *key, *path, *name;
        Py_ssize_t kl, pl, nl, many = -1;
        if (item && PyArg_ParseTuple(item, "y#y#O", &key, &kl, &path, &pl, &some)) {
            if (kl < 4 || kl > FW_KEY_MAX)
                PyErr_SetString(PyExc_ValueError, "not a handle key");
            else if ((all = PySequence_List(some)))
                many = PyList_Size(all);
        }
        for (Py_ssize_t j = -1; j < many; j++) {
            if (j < 0)
                name = path, nl = pl;
            else if (PyBytes_AsStringAndSize(PyList_GetItem(all, j), &name, &nl) < 0)
                many = -1;
            if (many < 0)
                break;
            if (used + (size_t)nl + 1 > have || count == cap) {
                have = used + (size_t)nl + 1 > have ? have * 2 + (size_t)nl + 4096 : have;
                cap = count == cap ? cap * 2 + 256 : cap;
                char *p = realloc(text, have);
                text = p ? p : text;
                size_t *q = realloc(ats, cap * sizeof *q);
                ats = q ? q : ats;
                if (!p || !q) {
                    PyErr_NoMemory();
                    many = -1;
                    break;
                }
            }
            if (j < 0)
                a[i].path_at = used;
            else
                ats[count++] = used;
            memcpy(text + used, name, (size_t)nl);
            text[used + (size_t)nl] = 0;
            used += (size_t)nl + 1;
        }
        if (many >= 0) {
            memcpy(a[i].key, key, (size_t)kl);
            a[i].keylen = (uint8_t)kl;
            a[i].first = count - (size_t)many;
            a[i].names = (uint32_t)many;
        }
        Py_XDECREF(all);
        Py_XDECREF(item);
        if (many < 0)
            goto done;
    }
    names = calloc(count + 1, sizeof *names);
    there = calloc(count + 1, 1);
    if (!names || !there) {
        PyErr_NoMemory();
        goto done;
    }
    for (size_t k = 0; k < count; k++)
        names[k] = text + ats[k];
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n; i++)
        a[i].err = ask_one(&a[i], text + a[i].path_at, names + a[i].first, there + a[i].first, mount,
                           buf, ROOM, &fid);
    Py_END_ALLOW_THREADS
    out = PyList_New(0);
    for (Py_ssize_t i = 0; out && i < n; i++) {
        PyObject *e = a[i].err ? PyLong_FromLong(a[i].err) : PyList_New(0);
        for (size_t k = a[i].first; e && !a[i].err && k < a[i].first + a[i].names; k++) {
            PyObject *name = there[k] ? PyBytes_FromString(names[k]) : NULL;
            if (there[k] && (!name || PyList_Append(e, name) < 0))
                Py_CLEAR(e);
            Py_XDECREF(name);
        }
        if (!e || PyList_Append(out, e) < 0)
            Py_CLEAR(out);
        Py_XDECREF(e);
    }
done:
    free(buf);
    free(text);
    free(ats);
    free(names);
    free(there);
    free(a);
    return out;
}

/* The mount that a path leads to, as /proc says of a descriptor; 0, or -1 with errno. */
static int mount_by_fdinfo(const char *path, uint64_t *mount)
{
    char text[64];
    int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    snprintf(text, sizeof text, "/proc/self/fdinfo/%d", fd);
    FILE *info = fopen(text, "re");
    int found = 0, err = info ? EIO : errno;
    while (info && !found && fgets(text, sizeof text, info))
        found = sscanf(text, "mnt_id: %" SCNu64, mount) == 1;
    if (info)
        fclose(info);
    close(fd);
    errno = err;
    return found ? 0 : -1;
}

static PyObject *mount_at(PyObject *self, PyObject *given)
{
    (void)self;
    PyObject *path, *out = NULL;
    if (!PyUnicode_FSConverter(given, &path))
        return NULL;
    const char *name = PyBytes_AsString(path);
    struct statx st = {0};
    uint64_t mount = 0;
    int failed;
    Py_BEGIN_ALLOW_THREADS /* a look-up may wait for a server */
    failed = statx(AT_FDCWD, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC,
                   STATX_MNT_ID, &st);
    mount = st.stx_mnt_id;
    /* Before v5.8, or with an old filter of system calls. EINVAL is the C library's, which then
     * does without. */
    if (failed ? errno == ENOSYS || errno == EPERM || errno == EINVAL
               : !(st.stx_mask & STATX_MNT_ID))
        failed = mount_by_fdinfo(name, &mount);
    Py_END_ALLOW_THREADS
    if (failed)
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, given);
    else
        out = PyLong_FromUnsignedLongLong(mount);
    Py_DECREF(path);
    return out;
}

static PyMethodDef scan_methods[] = {
    {"mount_at", mount_at, METH_O, "The id of the mount that a path leads to."},
    {"present_in", present_in, METH_VARARGS,
     "present_in([(key, path, names)], mount id) -> [errno, or the names that lead to anything]"},
    {"mark_dirs", mark_dirs, METH_VARARGS,
     "mark_dirs(group, inotify, mask, [(key, path)], all) -> "
     "([(key, parent key, name, is directory)], [(errno, watch)])"},
    {"scan_dirs", scan_dirs, METH_VARARGS,
     "scan_dirs(mount_fd, keys, names=0) -> ([(key, parent key, name, leaf)], [(key, errno)], "
     "[(key, names)])"},
    {NULL, NULL, 0, NULL},
};

int fw_add_scan(PyObject *m)
{
    return PyModule_AddFunctions(m, scan_methods);
}
