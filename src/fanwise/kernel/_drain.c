/* The drain: a native thread, without the interpreter lock, that empties a fanotify group into a
 * byte ring, and never waits for the consumer: what does not fit is read, counted and discarded.
 *
 * REFS
 *   The Python object owns the ring, both eventfds and the thread; the thread holds no reference to
 *   the object and touches no Python state. The group's descriptor is borrowed: its owner stops the
 *   drain before closing it. Records are discarded unseen, so groups whose records carry
 *   descriptors (no FID, or PIDFD) must not be drained: they would leak.
 *
 * LOCKING
 *   d->use  one consumer: held by take() and while the ring is made or freed. take() only tries it.
 *   d->lock everything below "under lock" in struct fw_drain; never held over read(), poll() or a
 *           copy, so that waiting for it while holding the interpreter lock is short.
 *   Order: use, lock. The consumer owns the oldest published chunk between its two critical
 *   sections; the producer owns all unpublished space. A chunk's `drained` may be set late, until
 *   it is released: headers are read under the lock.
 *
 * LIFETIME
 *   NEW -> start() -> running -> ended (stop(), or read() failed) -> close(). The thread may end by
 *   itself; it is joined by exactly one stop(), close() or deallocation, the others wait for
 *   `ended`, after which the thread touches only the lock. Ring and eventfds go in close(), the
 *   mutexes with the object. In a forked child the thread does not exist and the locks may be held
 *   for ever: every entry looks at a page that a fork wipes, and forgets (fw_drain_forget). */
#include "_native.h"
#include "_tree.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef FAN_Q_OVERFLOW
#define FAN_Q_OVERFLOW 0x4000
#endif
#define FW_RENAME 0x10000000ull
#ifndef FAN_MARK_FILESYSTEM  /* headers before Linux 4.20 */
#define FAN_MARK_FILESYSTEM 0x100
#endif
#define FW_SEC 1000000000LL
#define FW_RING_MIN ((size_t)64 << 10)
#define FW_READ_MAX ((size_t)1 << 20)
#define FW_SCRATCH ((size_t)256 << 10)
/* Below this much contiguous space nothing is stored. read() fails with EINVAL when the next event
 * does not fit; the largest (two names, four handles) is under 4096 * 2 + 1024 bytes. */
#define FW_FLOOR_MAX ((size_t)64 << 10)
#define FW_KEEP ((size_t)1 << 20)  /* of an emptied ring, kept resident */
#define FW_GIVE ((size_t)4 << 20)  /* more than this used: give the rest back */
#define FW_HERE ((size_t)1)  /* rounded up to a page by the kernel */
#define FW_TOKENS 8
#define FW_BIG 256  /* records in one read that mean load */
#define FW_META 24  /* sizeof(struct fanotify_event_metadata) */
#define FW_STOP_RECORDS (65536LL * 16)
#define FW_STOP_NS (2 * FW_SEC)
#define FW_NOTED 2048  /* directories noted of one loss; of more, all are affected */
#define FW_NOTE_NAMES 1  /* its names, or what they lead to, changed */
#define FW_NOTE_SELF 2   /* it came, went or moved itself */

enum fw_stop { FW_RUN, FW_STOP_DRAIN, FW_STOP_NOW };
/* How the thread reads: as ever; for a stop, up to its bounds; without marks, all that is left;
 * only to count what is left as lost. */
enum fw_stopping { FW_READING, FW_BOUNDED, FW_FINITE, FW_DISCARDING };

struct fw_chunk {
    uint32_t len;
    uint32_t drained;
    int64_t time;
    uint64_t lost;
};
#define FW_HDR sizeof(struct fw_chunk)

/* The directories that discarded records named. */
struct fw_noted {
    struct fw_noted *next;  /* of a later loss */
    uint32_t count;
    int all;  /* more than are noted, or a record that does not say */
    uint16_t slots[FW_NOTED * 2];  /* index + 1 */
    uint8_t bits[FW_NOTED], lens[FW_NOTED];
    uint8_t keys[FW_NOTED][FW_KEY_MAX];
};

struct fw_drain {
    /* Constant. */
    int fd;
    size_t size, floor;
    int64_t pace, stop_records;

    /* Constant while the thread lives. */
    pthread_t thread;
    volatile char *here;  /* a page that a fork wipes: 1 where the thread exists */
    char *ring;  /* size bytes, then FW_SCRATCH for what is discarded */
    int evfd, ctl;

    pthread_mutex_t use, lock;
    pthread_cond_t cond;  /* ended, synced */

    /* Under lock. [tail, head), or [tail, wrap) and [0, head) when wrapped. */
    size_t head, tail, wrap, used;
    size_t last;  /* the chunk published last */
    size_t high;  /* the furthest head since pages were given back */
    int wrapped, full, signalled;
    int owed;  /* records were told of, the empty queue after them was not yet */
    int edge;  /* an empty queue to tell without a chunk */
    uint64_t lost;  /* discarded since the last chunk */
    struct fw_noted *noting;  /* of those; NULL with lost: no memory, all are affected */
    struct fw_noted *noted, *noted_end;  /* of the losses published, one each, in order */
    int64_t read_time;  /* of the latest read */
    uint64_t sync_req, sync_done;
    enum fw_stop stop;
    int started, joining, ended, closed, gone, error;
    uint64_t n_records, n_bytes, n_reads, n_lost, n_peak, n_paced;

    /* Of the thread alone. */
    int pend;  /* a chunk was read and waits for what the next read says */
    size_t pend_at, pend_len;
    int64_t pend_time;
    uint64_t want;  /* sync_req before the latest read */
    enum fw_stopping stopping;
    int64_t stop_at, stop_left;
    int64_t begin;  /* of the first read of the latest wake-up */
    int64_t tokens, stamp;
};

typedef struct {
    PyObject_HEAD
    struct fw_drain d;
} FwDrain;

static int64_t fw_now(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return ts.tv_sec * FW_SEC + ts.tv_nsec;
}

static size_t fw_chunk_size(size_t len)
{
    return FW_HDR + ((len + 7) & ~(size_t)7);
}

static int64_t fw_count_records(const char *p, size_t n)
{
    int64_t count = 0;
    uint32_t len;

    while (n >= FW_META) {
        memcpy(&len, p, sizeof(len));
        if (len < FW_META || len > n)
            break;
        p += len;
        n -= len;
        count++;
    }
    return count + (n > 0);  /* a malformed rest is one: never no loss */
}

static void fw_note(struct fw_noted *t, const uint8_t *key, uint32_t len, int bits)
{
    uint32_t i = fw_hash(key, len) % (FW_NOTED * 2), k;

    for (; t->slots[i]; i = (i + 1) % (FW_NOTED * 2)) {
        k = t->slots[i] - 1u;
        if (t->lens[k] == len && !memcmp(t->keys[k], key, len)) {
            t->bits[k] |= (uint8_t)bits;
            return;
        }
    }
    if (t->count == FW_NOTED) {
        t->all = 1;
        return;
    }
    k = t->count++;
    t->slots[i] = (uint16_t)(k + 1);
    t->bits[k] = (uint8_t)bits;
    t->lens[k] = (uint8_t)len;
    memcpy(t->keys[k], key, len);
}

/* One discarded record: the directories of its names, and itself if it is one. 0 when it does not
 * say which. */
static int fw_note_record(struct fw_noted *t, const uint8_t *p, uint32_t n)
{
    const uint8_t *target = NULL, *last = NULL;
    uint64_t mask;
    uint32_t at, target_len = 0, last_len = 0, handle;
    uint16_t meta, span;
    int dirs = 0, named = 0;

    memcpy(&meta, p + 6, 2);
    memcpy(&mask, p + 8, 8);
    if (mask & FAN_Q_OVERFLOW || meta < FW_META || meta > n)
        return 0;
    for (at = meta; at < n; at += span) {
        if (n - at < 4)
            return 0;
        memcpy(&span, p + at + 2, 2);
        if (span < 4 || span > n - at)
            return 0;
        switch (p[at]) {
        case 1: case 2: case 3: case 10: case 12:
            break;
        default:
            continue;
        }
        if (span < 20)
            return 0;
        memcpy(&handle, p + at + 12, 4);
        if (handle > FW_KEY_MAX - 4 || 20 + handle > span)
            return 0;
        if (!handle)
            continue;
        if (p[at] == 1) {
            target = p + at + 16;
            target_len = handle + 4;
            continue;
        }
        dirs++;
        last = p + at + 16;
        last_len = handle + 4;
        fw_note(t, last, last_len, FW_NOTE_NAMES);
    }
    named = (mask & (FAN_CREATE | FAN_DELETE | FW_RENAME)) != 0;
    if (mask & FAN_ONDIR && named) {
        if (!target)
            return 0;
        fw_note(t, target, target_len, FW_NOTE_SELF);
    } else if (mask & FAN_DELETE_SELF && !target && last) {
        fw_note(t, last, last_len, FW_NOTE_SELF);  /* a rename put another in its place */
    }
    /* Of what has no name, only its link count or its last close is told. */
    return dirs > 0 || (target && !named);
}

/* What is discarded was seen to be whole records by fw_count_records, but for the rest. Under lock:
 * take() may have the loss and its notes at any time. */
static void fw_note_all(struct fw_drain *d, const char *p, size_t n)
{
    struct fw_noted *t = d->noting;
    uint32_t len;

    if (!t) {
        if (d->lost)
            return;  /* there was no memory */
        t = d->noting = calloc(1, sizeof(*t));
    }
    while (t && !t->all && n) {
        if (n < FW_META) {
            t->all = 1;
            break;
        }
        memcpy(&len, p, sizeof(len));
        if (len < FW_META || len > n || !fw_note_record(t, (const uint8_t *)p, len))
            t->all = 1;
        p += len;
        n -= len;
    }
}

/* The loss up to here is published, or taken. Under lock. */
static void fw_note_end(struct fw_drain *d)
{
    struct fw_noted *t = d->noting;

    d->noting = NULL;
    if (!t) {
        t = calloc(1, offsetof(struct fw_noted, slots));
        if (!t)
            return;  /* gap() finds none, and says all */
        t->all = 1;
    }
    if (d->noted_end)
        d->noted_end->next = t;
    else
        d->noted = t;
    d->noted_end = t;
}

static void fw_note_free(struct fw_drain *d)
{
    struct fw_noted *t, *next;

    for (t = d->noted; t; t = next) {
        next = t->next;
        free(t);
    }
    free(d->noting);
    d->noted = d->noted_end = d->noting = NULL;
}

static void fw_post(int fd)
{
    uint64_t one = 1;

    /* Cannot fail: a non-blocking eventfd whose counter never comes near its end. */
    while (write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

static void fw_unpost(int fd)
{
    uint64_t any;

    while (read(fd, &any, sizeof(any)) < 0 && errno == EINTR)
        ;
}

/* The eventfd says exactly: take() would return something, or the drain has ended. Under lock. */
static void fw_drain_signal(struct fw_drain *d)
{
    int on = d->used || d->lost || d->edge || d->ended;

    if (on == d->signalled)
        return;
    d->signalled = on;
    if (on)
        fw_post(d->evfd);
    else
        fw_unpost(d->evfd);
}

/* ------------------------------------------------------------------ the thread */

/* Under lock. */
static void fw_drain_publish(struct fw_drain *d, int drained)
{
    struct fw_chunk *c = (struct fw_chunk *)(d->ring + d->pend_at);

    c->len = (uint32_t)d->pend_len;
    c->drained = drained;
    c->time = d->pend_time;
    c->lost = d->lost;
    if (!d->used) {
        d->tail = d->pend_at;
        d->wrapped = 0;
    } else if (d->pend_at < d->head) {
        d->wrap = d->head;
        d->wrapped = 1;
    }
    d->last = d->pend_at;
    d->head = d->pend_at + fw_chunk_size(d->pend_len);
    d->used += fw_chunk_size(d->pend_len);
    if (d->head > d->high)
        d->high = d->head;
    if (d->used > d->n_peak)
        d->n_peak = d->used;
    if (d->lost)
        fw_note_end(d);
    d->lost = 0;
    d->edge = 0;
    d->owed = !drained;
    d->pend = 0;
    fw_drain_signal(d);
}

/* An empty ring starts again at offset 0, so that a low load touches few pages. Under lock, nothing
 * pending. Returns how many bytes to give back with fw_drain_give() after unlocking. */
static size_t fw_drain_rewind(struct fw_drain *d)
{
    size_t give = 0;

    if (d->used)
        return 0;
    d->head = d->tail = 0;
    d->wrapped = d->full = 0;
    if (d->high > FW_GIVE)
        give = d->high;
    if (give)
        d->high = 0;
    return give;
}

/* Unlocked: the ring is empty, and only this thread could change that. */
static void fw_drain_give(struct fw_drain *d, size_t high)
{
    if (high)
        madvise(d->ring + FW_KEEP, high - FW_KEEP, MADV_DONTNEED);
}

static void fw_drain_bound(struct fw_drain *d, enum fw_stopping how)
{
    d->stopping = how;
    d->stop_at = fw_now(CLOCK_MONOTONIC) + FW_STOP_NS;
    d->stop_left = d->stop_records;
}

/* A bound of a stop was met, and the queue is not known to be empty. Without its marks nothing is
 * added to it, and all of it is read. Where they cannot be removed (no group, only a stand-in) what
 * is left is read and counted as lost, within the same bounds: what stays behind even then is more
 * of a loss that was told. 1: read no more. */
static int fw_drain_over(struct fw_drain *d)
{
    if (d->stopping == FW_DISCARDING)
        return 1;
    /* A flush looks at no path. */
    if (fanotify_mark(d->fd, FAN_MARK_FLUSH | FAN_MARK_FILESYSTEM, 0, AT_FDCWD, NULL) == 0)
        d->stopping = FW_FINITE;
    else
        fw_drain_bound(d, FW_DISCARDING);
    return 0;
}

/* Where the next read goes: *at in the ring, or the scratch buffer when the ring is full. NULL:
 * stop now. Publishes the pending chunk when nothing can follow it directly. */
static char *fw_drain_where(struct fw_drain *d, size_t *at, size_t *room)
{
    size_t end, need = FW_HDR + d->floor, give = 0;
    char *buf = NULL;

    *room = 0;
    pthread_mutex_lock(&d->lock);
    if (d->stop == FW_STOP_NOW)
        goto out;
    if (d->stop == FW_STOP_DRAIN && d->stopping == FW_READING)
        fw_drain_bound(d, FW_BOUNDED);
    d->want = d->sync_req;
    if (d->pend) {
        *at = d->pend_at + fw_chunk_size(d->pend_len);
        end = d->wrapped || d->pend_at < d->head ? d->tail : d->size;
        if (end >= *at + need && d->stopping != FW_DISCARDING)
            *room = end - *at - FW_HDR;
        else
            fw_drain_publish(d, 0);
    }
    if (!d->pend) {
        give = fw_drain_rewind(d);
        /* Once full, wait for a quarter: one marker for a loss, not thousands. */
        if (d->used <= d->size - d->size / 4)
            d->full = 0;
        end = d->wrapped ? d->tail : d->size;
        if (d->full || d->stopping == FW_DISCARDING) {
            ;
        } else if (end >= d->head + need) {
            *at = d->head;
            *room = end - d->head - FW_HDR;
        } else if (!d->wrapped && d->tail >= need) {
            *at = 0;
            *room = d->tail - FW_HDR;
        }
    }
    buf = d->ring + (*room ? *at + FW_HDR : d->size);
out:
    pthread_mutex_unlock(&d->lock);
    fw_drain_give(d, give);
    if (*room > FW_READ_MAX)
        *room = FW_READ_MAX;
    return buf;
}

/* The end of a series of reads, at an empty queue or before. */
static void fw_drain_settle(struct fw_drain *d, int drained)
{
    pthread_mutex_lock(&d->lock);
    if (d->pend) {
        fw_drain_publish(d, drained);
    } else if (drained && d->owed) {
        d->owed = 0;
        if (d->used && !d->lost)
            ((struct fw_chunk *)(d->ring + d->last))->drained = 1;
        else
            d->edge = 1;
        fw_drain_signal(d);
    }
    if (drained && d->sync_done != d->want) {
        d->sync_done = d->want;
        pthread_cond_broadcast(&d->cond);
    }
    pthread_mutex_unlock(&d->lock);
}

/* Reads until the queue is empty. -1: the descriptor is at its end or failed. */
static int fw_drain_empty(struct fw_drain *d)
{
    int64_t count, now;
    size_t at = 0, room;
    ssize_t n;
    char *buf;
    int err;

    d->begin = fw_now(CLOCK_MONOTONIC);
    for (;;) {
        buf = fw_drain_where(d, &at, &room);
        if (!buf) {
            fw_drain_settle(d, 0);
            return 0;
        }
        n = read(d->fd, buf, room ? room : FW_SCRATCH);
        err = n < 0 ? errno : 0;
        if (err == EINTR)
            continue;
        if (n <= 0) {
            fw_drain_settle(d, err == EAGAIN);
            if (err == EAGAIN)
                return 0;
            pthread_mutex_lock(&d->lock);
            d->error = err;
            pthread_mutex_unlock(&d->lock);
            return -1;
        }
        now = fw_now(CLOCK_REALTIME);
        count = fw_count_records(buf, n);
        pthread_mutex_lock(&d->lock);
        d->n_reads++;
        d->n_records += count;
        d->n_bytes += n;
        d->read_time = now;
        if (room) {
            if (d->pend)
                fw_drain_publish(d, 0);
            d->pend = 1;
            d->pend_at = at;
            d->pend_len = n;
            d->pend_time = now;
        } else {
            d->full = d->owed = 1;
            d->edge = 0;
            fw_note_all(d, buf, n);
            d->lost += count;
            d->n_lost += count;
            fw_drain_signal(d);
        }
        pthread_mutex_unlock(&d->lock);
        if (count >= FW_BIG) {
            d->tokens = 0;
            d->stamp = d->begin;
        }
        if (d->stopping == FW_BOUNDED || d->stopping == FW_DISCARDING) {
            d->stop_left -= count;
            if ((d->stop_left <= 0 || fw_now(CLOCK_MONOTONIC) >= d->stop_at) && fw_drain_over(d)) {
                fw_drain_settle(d, 0);
                return 0;
            }
        }
    }
}

static void fw_drain_refill(struct fw_drain *d, int64_t now)
{
    int64_t back = (now - d->stamp) / d->pace;

    d->tokens += back;
    d->stamp += back * d->pace;
    if (d->tokens >= FW_TOKENS) {
        d->tokens = FW_TOKENS;
        d->stamp = now;
    }
}

/* A stop or a sync is asked for. */
static int fw_drain_asked(struct fw_drain *d)
{
    int ret;

    pthread_mutex_lock(&d->lock);
    ret = d->stop != FW_RUN || d->sync_req != d->sync_done;
    pthread_mutex_unlock(&d->lock);
    return ret;
}

/* Under load, lets the queue fill for the rest of pace_ns: many records a read, and merged ones. */
static void fw_drain_pace(struct fw_drain *d)
{
    int64_t now = fw_now(CLOCK_MONOTONIC), until = d->begin + d->pace;
    struct pollfd p = {.fd = d->ctl, .events = POLLIN};
    struct timespec ts;

    if (!d->pace)
        return;
    fw_drain_refill(d, now);
    if (!d->tokens && now < until) {
        pthread_mutex_lock(&d->lock);
        d->n_paced++;
        pthread_mutex_unlock(&d->lock);
        do {
            ts.tv_sec = (until - now) / FW_SEC;
            ts.tv_nsec = (until - now) % FW_SEC;
            if (ppoll(&p, 1, &ts, NULL) > 0) {
                fw_unpost(d->ctl);
                if (fw_drain_asked(d))
                    break;
            }
            now = fw_now(CLOCK_MONOTONIC);
        } while (now < until);
        fw_drain_refill(d, now);
    }
    if (d->tokens)
        d->tokens--;
}

static void *fw_drain_main(void *arg)
{
    struct fw_drain *d = arg;
    struct pollfd p[2] = {{.fd = d->fd, .events = POLLIN}, {.fd = d->ctl, .events = POLLIN}};
    enum fw_stop stop = FW_RUN;
    size_t give;
    int ret = 0;

    pthread_setname_np(pthread_self(), "fw-drain");
    d->tokens = FW_TOKENS;
    d->stamp = fw_now(CLOCK_MONOTONIC);
    do {
        p[0].revents = p[1].revents = 0;
        if (ppoll(p, 2, NULL, NULL) < 0)
            continue;
        if (p[1].revents)
            fw_unpost(d->ctl);
        if (!fw_drain_asked(d)) {
            if (!p[0].revents) {  /* the consumer emptied a ring that had been large */
                pthread_mutex_lock(&d->lock);
                give = fw_drain_rewind(d);
                pthread_mutex_unlock(&d->lock);
                fw_drain_give(d, give);
                continue;
            }
            fw_drain_pace(d);
        }
        /* What fw_drain_empty() saw of a stop decides, not a stop that came after it. */
        ret = fw_drain_empty(d);
        pthread_mutex_lock(&d->lock);
        stop = d->stop;
        pthread_mutex_unlock(&d->lock);
    } while (!ret && stop != FW_STOP_NOW && !d->stopping);

    pthread_mutex_lock(&d->lock);
    d->ended = 1;
    fw_drain_signal(d);
    pthread_cond_broadcast(&d->cond);
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

/* ------------------------------------------------------------------ the object */

/* Of a NEW drain. */
static void fw_drain_init(struct fw_drain *d)
{
    pthread_condattr_t attr;

    pthread_mutex_init(&d->use, NULL);
    pthread_mutex_init(&d->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&d->cond, &attr);
    pthread_condattr_destroy(&attr);
    d->evfd = d->ctl = -1;
}

/* Ring and eventfds. Under both locks, or alone. */
static void fw_drain_free(struct fw_drain *d)
{
    if (d->ring)
        munmap(d->ring, d->size + FW_SCRATCH);
    d->ring = NULL;
    if (d->evfd >= 0)
        close(d->evfd);
    if (d->ctl >= 0)
        close(d->ctl);
    d->evfd = d->ctl = -1;
    d->used = d->lost = d->edge = 0;
    fw_note_free(d);
}

/* In a forked child. Takes no lock: whoever held it is not here. The eventfds are this process's
 * own copies, and stay until close(). */
static void fw_drain_forget(struct fw_drain *d)
{
    if (d->ring)
        munmap(d->ring, d->size + FW_SCRATCH);
    d->ring = NULL;
    d->used = d->lost = d->edge = 0;
    d->gone = d->ended = 1;
}

/* Every entry begins with this: 0 means that the drain is another process's. */
static int fw_drain_ours(struct fw_drain *d)
{
    if (!d->gone && d->here && !*d->here)
        fw_drain_forget(d);
    return !d->gone;
}

/* Ends and joins the thread, if there is one. Without the interpreter lock. */
static void fw_drain_end(struct fw_drain *d, enum fw_stop how)
{
    int mine = 0;

    pthread_mutex_lock(&d->lock);
    if (d->started) {
        if (how > d->stop)
            d->stop = how;
        if (!d->ended)
            fw_post(d->ctl);
        mine = !d->joining;
        d->joining = 1;
        while (!mine && !d->ended)
            pthread_cond_wait(&d->cond, &d->lock);
    }
    pthread_mutex_unlock(&d->lock);
    if (mine)
        pthread_join(d->thread, NULL);
}

static void fw_drain_close(struct fw_drain *d)
{
    if (!fw_drain_ours(d)) {
        fw_drain_free(d);
        d->closed = 1;
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    fw_drain_end(d, FW_STOP_NOW);
    pthread_mutex_lock(&d->use);
    pthread_mutex_lock(&d->lock);
    fw_drain_free(d);
    d->closed = d->ended = 1;
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_unlock(&d->use);
    Py_END_ALLOW_THREADS
}

static void *fw_map(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return p == MAP_FAILED ? NULL : p;
}

/* 0, or an errno with nothing left behind. */
static int fw_drain_launch(struct fw_drain *d)
{
    sigset_t all, old;
    int ret;

    d->here = fw_map(FW_HERE);
    if (!d->here)
        return errno;
    if (madvise((void *)d->here, FW_HERE, MADV_WIPEONFORK) < 0)
        goto failed;
    *d->here = 1;
    d->ring = fw_map(d->size + FW_SCRATCH);
    if (!d->ring)
        goto failed;
    d->evfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d->ctl = d->evfd < 0 ? -1 : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->ctl < 0)
        goto failed;
    /* Signals are the interpreter's; the thread inherits the mask. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ret = pthread_create(&d->thread, NULL, fw_drain_main, d);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!ret)
        return 0;
    errno = ret;
failed:
    ret = errno;
    fw_drain_free(d);
    munmap((void *)d->here, FW_HERE);
    d->here = NULL;
    return ret;
}

static PyObject *fw_py_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    static char *names[] = {"fd", "ring_bytes", "pace_ns", "stop_records", NULL};
    long long pace = 5000000, stop_records = FW_STOP_RECORDS;
    size_t page = sysconf(_SC_PAGESIZE);
    Py_ssize_t size;
    allocfunc alloc;
    FwDrain *self;
    int fd, flags;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "in|LL:Drain", names, &fd, &size, &pace,
                                     &stop_records))
        return NULL;
    if (size < (Py_ssize_t)FW_RING_MIN || size > PY_SSIZE_T_MAX / 2)
        return PyErr_Format(PyExc_ValueError, "ring_bytes must be at least 65536");
    if (pace < 0 || pace > 10 * FW_SEC)
        return PyErr_Format(PyExc_ValueError, "pace_ns must be from 0 to 10 s");
    if (stop_records < 1)
        return PyErr_Format(PyExc_ValueError, "stop_records must be at least 1");
    flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (!(flags & O_NONBLOCK))
        return PyErr_Format(PyExc_ValueError, "the descriptor must be non-blocking");
    alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    self = (FwDrain *)alloc(type, 0);
    if (!self)
        return NULL;
    fw_drain_init(&self->d);
    self->d.fd = fd;
    self->d.size = ((size_t)size + page - 1) / page * page;
    self->d.floor = self->d.size / 4 < FW_FLOOR_MAX ? self->d.size / 4 - FW_HDR : FW_FLOOR_MAX;
    self->d.pace = pace;
    self->d.stop_records = stop_records;
    return (PyObject *)self;
}

static void fw_py_dealloc(PyObject *op)
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    PyTypeObject *type = Py_TYPE(op);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    fw_drain_close(d);
    if (!d->gone) {  /* a forked child's may be held or waited for by nobody */
        pthread_cond_destroy(&d->cond);
        pthread_mutex_destroy(&d->lock);
        pthread_mutex_destroy(&d->use);
    }
    if (d->here)
        munmap((void *)d->here, FW_HERE);
    release(op);
    Py_DECREF(type);
}

static PyObject *fw_py_closed(void)
{
    return PyErr_Format(PyExc_ValueError, "the drain is closed");
}

static PyObject *fw_py_start(PyObject *op, PyObject *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    int ret = 0, closed, again;

    if (!fw_drain_ours(d))
        return fw_py_closed();
    pthread_mutex_lock(&d->use);
    pthread_mutex_lock(&d->lock);
    closed = d->closed;
    again = d->started;
    if (!closed && !again) {
        /* The thread's first act is to wait for this lock or for an event. */
        ret = fw_drain_launch(d);
        d->started = !ret;
    }
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_unlock(&d->use);
    if (closed)
        return fw_py_closed();
    if (again)
        return PyErr_Format(PyExc_RuntimeError, "the drain was started already");
    if (ret) {
        errno = ret;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *fw_py_fileno(PyObject *op, PyObject *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    int fd = -1;

    if (fw_drain_ours(d)) {
        pthread_mutex_lock(&d->lock);
        fd = d->evfd;
        pthread_mutex_unlock(&d->lock);
    }
    if (fd < 0)
        return PyErr_Format(PyExc_ValueError, "the drain is not started, or closed");
    return PyLong_FromLong(fd);
}

/* Holds d->use. */
static PyObject *fw_py_take_one(struct fw_drain *d, struct fw_chunk *out)
{
    PyObject *data = NULL;
    struct fw_chunk *c;

    pthread_mutex_lock(&d->lock);
    if (d->used) {
        c = (struct fw_chunk *)(d->ring + d->tail);
        pthread_mutex_unlock(&d->lock);
        data = PyBytes_FromStringAndSize((char *)(c + 1), c->len);
        if (!data)
            return NULL;  /* the chunk stays */
        pthread_mutex_lock(&d->lock);
        *out = *c;
        d->tail += fw_chunk_size(c->len);
        d->used -= fw_chunk_size(c->len);
        if (d->wrapped && d->tail == d->wrap) {
            d->tail = 0;
            d->wrapped = 0;
        }
        if (!d->used && d->high > FW_GIVE && !d->ended)
            fw_post(d->ctl);  /* the thread gives the pages back */
    } else if (d->lost || d->edge) {
        data = PyBytes_FromStringAndSize(NULL, 0);
        if (data) {
            out->time = d->read_time;
            out->drained = d->edge;
            out->lost = d->lost;
            if (d->lost)
                fw_note_end(d);
            d->edge = 0;
            d->lost = 0;
        }
    } else {
        Py_INCREF(Py_None);
        data = Py_None;
    }
    if (d->started)
        fw_drain_signal(d);
    pthread_mutex_unlock(&d->lock);
    return data;
}

static PyObject *fw_py_take(PyObject *op, PyObject *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    struct fw_chunk c = {0};
    PyObject *data;

    if (!fw_drain_ours(d))
        return fw_py_closed();
    /* Contended only without an interpreter lock. */
    if (pthread_mutex_trylock(&d->use))
        return PyErr_Format(PyExc_RuntimeError, "a drain has one consumer");
    data = d->closed ? fw_py_closed() : fw_py_take_one(d, &c);
    pthread_mutex_unlock(&d->use);
    /* The tuple comes last: making it may run the collector, and with it any code. */
    if (!data || data == Py_None)
        return data;
    return Py_BuildValue("(NLOK)", data, (long long)c.time, c.drained ? Py_True : Py_False,
                 (unsigned long long)c.lost);
}

/* The notes are taken in the order of the losses: one for each that take() gave. */
static PyObject *fw_py_gap(PyObject *op, PyObject *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    struct fw_noted *t = NULL;
    PyObject *out = NULL, *e;
    uint32_t i;
    int ret = 0;

    if (fw_drain_ours(d)) {
        pthread_mutex_lock(&d->lock);
        t = d->noted;
        if (t) {
            d->noted = t->next;
            if (!t->next)
                d->noted_end = NULL;
        }
        pthread_mutex_unlock(&d->lock);
    }
    if (!t || t->all) {
        free(t);
        Py_RETURN_NONE;
    }
    out = PyDict_New();
    for (i = 0; out && i < t->count; i++) {
        PyObject *key = PyBytes_FromStringAndSize((char *)t->keys[i], t->lens[i]);

        e = PyLong_FromLong(t->bits[i]);
        ret = key && e ? PyDict_SetItem(out, key, e) : -1;
        Py_XDECREF(key);
        Py_XDECREF(e);
        if (ret < 0)
            Py_CLEAR(out);
    }
    free(t);
    return out;
}

static PyObject *fw_py_sync(PyObject *op, PyObject *args, PyObject *kw)
{
    static char *names[] = {"timeout", NULL};
    struct fw_drain *d = &((FwDrain *)op)->d;
    double timeout;
    int64_t until, now, slice;
    struct timespec ts;
    uint64_t want;
    int done, over;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "d:sync", names, &timeout))
        return NULL;
    if (!fw_drain_ours(d))
        Py_RETURN_FALSE;
    if (!(timeout > 0))
        timeout = 0;
    if (timeout > 1e9)
        timeout = 1e9;
    until = fw_now(CLOCK_MONOTONIC) + (int64_t)(timeout * FW_SEC);
    pthread_mutex_lock(&d->lock);
    over = !d->started || d->ended;
    if (!over) {
        d->sync_req++;
        fw_post(d->ctl);
    }
    want = d->sync_req;
    pthread_mutex_unlock(&d->lock);
    for (done = 0; !over && !done;) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&d->lock);
        for (;;) {
            done = d->sync_done >= want;
            now = fw_now(CLOCK_MONOTONIC);
            over = d->ended || now >= until;
            if (done || over)
                break;
            /* In slices, so that a signal's Python handler runs. */
            slice = now + FW_SEC / 10 < until ? now + FW_SEC / 10 : until;
            ts.tv_sec = slice / FW_SEC;
            ts.tv_nsec = slice % FW_SEC;
            if (pthread_cond_timedwait(&d->cond, &d->lock, &ts) == ETIMEDOUT)
                break;
        }
        pthread_mutex_unlock(&d->lock);
        Py_END_ALLOW_THREADS
        if (!done && PyErr_CheckSignals() < 0)
            return NULL;
    }
    return PyBool_FromLong(done);
}

static PyObject *fw_py_stop(PyObject *op, PyObject *args, PyObject *kw)
{
    static char *names[] = {"drain", NULL};
    struct fw_drain *d = &((FwDrain *)op)->d;
    int drain = 1;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "|p:stop", names, &drain))
        return NULL;
    if (fw_drain_ours(d)) {
        Py_BEGIN_ALLOW_THREADS
        fw_drain_end(d, drain ? FW_STOP_DRAIN : FW_STOP_NOW);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static PyObject *fw_py_forget(PyObject *op, PyObject *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;

    /* Where the thread does exist it would be left writing to unmapped memory. */
    if (fw_drain_ours(d) && d->started && !d->closed)
        return PyErr_Format(PyExc_RuntimeError, "forget() is for a forked child");
    Py_RETURN_NONE;
}

static PyObject *fw_py_close(PyObject *op, PyObject *Py_UNUSED(arg))
{
    fw_drain_close(&((FwDrain *)op)->d);
    Py_RETURN_NONE;
}

static PyObject *fw_py_stats(PyObject *op, PyObject *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    int ours = fw_drain_ours(d);
    unsigned long long v[7];

    if (ours)
        pthread_mutex_lock(&d->lock);
    v[0] = d->n_records;
    v[1] = d->n_bytes;
    v[2] = d->n_reads;
    v[3] = d->n_lost;
    v[4] = d->used;
    v[5] = d->n_peak;
    v[6] = d->n_paced;
    if (ours)
        pthread_mutex_unlock(&d->lock);
    return Py_BuildValue("{sKsKsKsKsKsKsKsK}", "records", v[0], "bytes", v[1], "reads", v[2],
                 "lost", v[3], "backlog_bytes", v[4], "peak_bytes", v[5], "ring_bytes",
                 (unsigned long long)d->size, "paced", v[6]);
}

static PyObject *fw_py_ended(PyObject *op, void *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    int ended = 1;

    if (fw_drain_ours(d)) {
        pthread_mutex_lock(&d->lock);
        ended = d->ended;
        pthread_mutex_unlock(&d->lock);
    }
    return PyBool_FromLong(ended);
}

static PyObject *fw_py_error(PyObject *op, void *Py_UNUSED(arg))
{
    struct fw_drain *d = &((FwDrain *)op)->d;
    int error = 0;

    if (fw_drain_ours(d)) {
        pthread_mutex_lock(&d->lock);
        error = d->error;
        pthread_mutex_unlock(&d->lock);
    }
    return PyLong_FromLong(error);
}

static PyMethodDef fw_py_methods[] = {
    {"start", fw_py_start, METH_NOARGS, "Start the thread; once."},
    {"fileno", fw_py_fileno, METH_NOARGS, "The eventfd: readable while take() has something."},
    {"gap", fw_py_gap, METH_NOARGS,
     "What the loss that take() gave last hit: {directory key: 1 names | 2 itself}, None: all."},
    {"take", fw_py_take, METH_NOARGS, "(data, time_ns, drained, lost), or None."},
    {"sync", (PyCFunction)(void (*)(void))fw_py_sync, METH_VARARGS | METH_KEYWORDS,
     "Wait until all that was raised before this call is in the ring."},
    {"stop", (PyCFunction)(void (*)(void))fw_py_stop, METH_VARARGS | METH_KEYWORDS,
     "End the thread, by default after reading what is queued."},
    {"forget", fw_py_forget, METH_NOARGS, "In a forked child: free the memory, touch no thread."},
    {"stats", fw_py_stats, METH_NOARGS, "Counters by name."},
    {"close", fw_py_close, METH_NOARGS, "Stop at once and free everything but the group."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef fw_py_getset[] = {
    {"ended", fw_py_ended, NULL, "The thread is gone: stopped, or read() failed.", NULL},
    {"error", fw_py_error, NULL, "The errno that ended the drain, or 0.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot fw_py_slots[] = {
    {Py_tp_doc, "Drain(fd, ring_bytes, pace_ns=5000000, stop_records=1048576)\n--\n\n"
            "Empties a non-blocking fanotify group into a byte ring, in a native thread."},
    {Py_tp_new, (void *)fw_py_new},
    {Py_tp_dealloc, (void *)fw_py_dealloc},
    {Py_tp_methods, fw_py_methods},
    {Py_tp_getset, fw_py_getset},
    {0, NULL},
};

static PyType_Spec fw_py_spec = {
    .name = "fanwise.kernel._native.Drain",
    .basicsize = sizeof(FwDrain),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = fw_py_slots,
};

int fw_add_drain(PyObject *m)
{
    PyObject *type = PyType_FromModuleAndSpec(m, &fw_py_spec, NULL);
    int ret;

    if (!type)
        return -1;
    ret = PyModule_AddType(m, (PyTypeObject *)type);
    Py_DECREF(type);
    return ret;
}
