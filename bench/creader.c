/* The limit: what the kernel's stream costs when C reads it and names every event.
 *
 * One filesystem mark with the mask that fanwise uses, an unlimited queue, a path for every event from
 * a cache of directory handles. An event after a pause is read at once; under load reads are 5 ms
 * apart, because reading every event alone costs three times as much as reading them together.
 *
 *   creader PATH            prints READY; at SIGTERM or SIGINT drains, prints counts as one JSON line
 *   creader PATH --lines    also prints each event, with the CLOCK_MONOTONIC time at which it was read
 *
 * The path is the directory's path at the time of the look-up, so after a rename it may be newer than
 * the event. That is the price of resolving when reading, and `races` shows it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fanotify.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MASK (FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_MODIFY | FAN_CLOSE_WRITE | FAN_ATTRIB | \
              FAN_DELETE_SELF | FAN_ONDIR)
#define PACE_NS 5000000LL
#define BUFFER (1 << 20)
#define NUMBERS 10000000 /* storm names end in seven digits */

static const struct { uint64_t bit; const char *name; } kinds[] = {
    {FAN_CREATE, "created"},    {FAN_MODIFY, "modified"}, {FAN_CLOSE_WRITE, "written"},
    {FAN_ATTRIB, "attributes"}, {FAN_RENAME, "renamed"},  {FAN_DELETE, "deleted"},
};
#define KINDS (sizeof kinds / sizeof *kinds)

static uint64_t facts[KINDS], distinct[KINDS], records, reads, overflows, unknown, lookups;
static uint8_t *seen[KINDS]; /* a bit per number: what was reported is counted once */
static int mount_fd, fan_fd, lines;
static int64_t read_at;

static void die(const char *what)
{
    perror(what);
    exit(4);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* ---- directory handle -> path ------------------------------------------------------------------- */

struct handle { /* struct file_handle, which glibc declares with a flexible array */
    uint32_t bytes;
    int32_t type;
    uint8_t data[];
};
struct entry {
    struct handle *handle; /* NULL: free slot */
    char *path;            /* NULL: the kernel does not know this handle any more */
};
static struct entry *table;
static size_t slots, used;

static size_t hash(const struct handle *h)
{
    uint64_t x = 1469598103934665603ULL ^ h->bytes;
    for (uint32_t i = 0; i < h->bytes; i++)
        x = (x ^ h->data[i]) * 1099511628211ULL;
    return x ^ (x >> 29);
}

static struct entry *find(const struct handle *h)
{
    size_t i = hash(h) & (slots - 1);
    while (table[i].handle && (table[i].handle->bytes != h->bytes ||
                               table[i].handle->type != h->type ||
                               memcmp(table[i].handle->data, h->data, h->bytes)))
        i = (i + 1) & (slots - 1);
    return &table[i];
}

static void grow(void)
{
    struct entry *old = table;
    size_t n = slots;
    slots = n ? n * 2 : 1024;
    table = calloc(slots, sizeof *table);
    if (!table)
        die("calloc");
    for (size_t i = 0; i < n; i++)
        if (old[i].handle)
            *find(old[i].handle) = old[i];
    free(old);
}

static void forget_all(void)
{
    if (!used)
        return;
    for (size_t i = 0; i < slots; i++) {
        free(table[i].handle);
        free(table[i].path);
    }
    memset(table, 0, slots * sizeof *table);
    used = 0;
}

static char *resolve(const struct handle *h)
{
    char link[64], path[4096];
    lookups++;
    /* Through the raw call: our struct is the kernel's, glibc's is the same with another name. */
    int fd = syscall(SYS_open_by_handle_at, mount_fd, h, O_PATH | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    close(fd);
    if (n < 0)
        return NULL;
    path[n] = 0;
    if (n > 10 && !strcmp(path + n - 10, " (deleted)"))
        return NULL;
    return strdup(path);
}

static const char *directory(const struct handle *h)
{
    struct entry *e = find(h);
    if (!e->handle) {
        if (used * 2 >= slots) {
            grow();
            e = find(h);
        }
        e->handle = malloc(sizeof *h + h->bytes);
        if (!e->handle)
            die("malloc");
        memcpy(e->handle, h, sizeof *h + h->bytes);
        e->path = resolve(h);
        used++;
    }
    return e->path;
}

/* ---- one event ---------------------------------------------------------------------------------- */

static size_t join(char *out, const struct handle *h, const char *name)
{
    const char *dir = directory(h);
    if (!dir) {
        unknown++;
        return 0;
    }
    size_t d = strlen(dir), n = strlen(name);
    memcpy(out, dir, d);
    if (d > 1)
        out[d++] = '/';
    memcpy(out + d, name, n + 1);
    return d + n;
}

static long number(const char *name)
{
    long n = 0;
    if (strlen(name) != 8)
        return -1;
    for (int i = 1; i < 8; i++) {
        if (name[i] < '0' || name[i] > '9')
            return -1;
        n = n * 10 + name[i] - '0';
    }
    return n;
}

static void event(const struct fanotify_event_metadata *m)
{
    static char path[8192], old_path[8192];
    const struct handle *dir = NULL, *old_dir = NULL;
    const char *name = NULL, *old_name = NULL;

    records++;
    if (m->mask & FAN_Q_OVERFLOW) {
        overflows++;
        return;
    }
    const char *p = (const char *)(m + 1), *end = (const char *)m + m->event_len;
    while (p + sizeof(struct fanotify_event_info_header) <= end) {
        const struct fanotify_event_info_fid *info = (const void *)p;
        const struct handle *h = (const void *)info->handle;
        const char *n = (const char *)h->data + h->bytes;
        switch (info->hdr.info_type) {
        case FAN_EVENT_INFO_TYPE_DFID_NAME:
        case FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
            dir = h, name = n;
            break;
        case FAN_EVENT_INFO_TYPE_OLD_DFID_NAME:
            old_dir = h, old_name = n;
            break;
        }
        p += info->hdr.len;
    }
    path[0] = old_path[0] = 0;
    if (old_dir)
        join(old_path, old_dir, old_name);
    if (dir)
        join(path, dir, name);
    long num = name ? number(name) : -1;
    for (size_t i = 0; i < KINDS; i++) {
        if (!(m->mask & kinds[i].bit))
            continue;
        facts[i]++;
        if (num >= 0 && path[0]) {
            uint8_t bit = 1 << (num & 7), *byte = &seen[i][num >> 3];
            distinct[i] += !(*byte & bit);
            *byte |= bit;
        }
    }
    /* A directory that moved takes every path below it along; one that went is only dead weight. */
    if ((m->mask & FAN_ONDIR) && (m->mask & (FAN_RENAME | FAN_DELETE)))
        forget_all();
    if (lines && name) {
        const char *comma = "";
        fputs("{\"type\":\"change\",\"kinds\":[", stdout);
        for (size_t i = 0; i < KINDS; i++)
            if (m->mask & kinds[i].bit) {
                printf("%s\"%s\"", comma, kinds[i].name);
                comma = ",";
            }
        printf("],\"path\":\"%s\",\"old_path\":\"%s\",\"dir\":%s,\"ns\":%lld}\n", path, old_path,
               m->mask & FAN_ONDIR ? "true" : "false", (long long)read_at);
    }
}

static void drain(void)
{
    static char buffer[BUFFER] __attribute__((aligned(8)));
    for (;;) {
        ssize_t n = read(fan_fd, buffer, sizeof buffer);
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0)
            die("read");
        reads++;
        read_at = lines ? now_ns() : 0;
        struct fanotify_event_metadata *m = (void *)buffer;
        for (; FAN_EVENT_OK(m, n); m = FAN_EVENT_NEXT(m, n)) {
            if (m->vers != FANOTIFY_METADATA_VERSION) {
                fprintf(stderr, "metadata version %d\n", m->vers);
                exit(4);
            }
            event(m);
        }
    }
    if (lines)
        fflush(stdout);
}

static void table_of(const char *title, const uint64_t *values)
{
    printf("\"%s\":{", title);
    for (size_t i = 0; i < KINDS; i++)
        printf("%s\"%s\":%llu", i ? "," : "", kinds[i].name, (unsigned long long)values[i]);
    printf("},");
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: creader PATH [--lines]\n");
        return 2;
    }
    lines = argc > 2 && !strcmp(argv[2], "--lines");
    for (size_t i = 0; i < KINDS; i++)
        if (!(seen[i] = calloc(NUMBERS / 8 + 1, 1))) /* untouched pages cost nothing */
            die("calloc");
    grow();

    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    sigprocmask(SIG_BLOCK, &stop, NULL);
    int signals = signalfd(-1, &stop, SFD_CLOEXEC);

    /* Not O_PATH: open_by_handle_at() refuses such a descriptor (EBADF on 6.18). */
    mount_fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (mount_fd < 0)
        die(argv[1]);
    fan_fd = syscall(SYS_fanotify_init,
                     FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE |
                         FAN_REPORT_DFID_NAME_TARGET,
                     O_RDONLY | O_CLOEXEC);
    if (fan_fd < 0)
        die("fanotify_init");
    if (syscall(SYS_fanotify_mark, fan_fd, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, (uint64_t)MASK,
                AT_FDCWD, argv[1]))
        die("fanotify_mark");
    puts("READY");
    fflush(stdout);

    int64_t last = 0;
    struct pollfd fds[2] = {{fan_fd, POLLIN, 0}, {signals, POLLIN, 0}};
    for (;;) {
        if (poll(fds, 2, -1) < 0)
            die("poll");
        if (fds[1].revents)
            break;
        int64_t wait = PACE_NS - (now_ns() - last);
        if (wait > 0) {
            struct timespec t = {0, wait};
            nanosleep(&t, NULL);
        }
        drain();
        last = now_ns();
    }
    drain();

    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    printf("{\"type\":\"stopped\",");
    table_of("facts", facts);
    table_of("distinct", distinct);
    printf("\"records\":%llu,\"reads\":%llu,\"lookups\":%llu,\"unknown\":%llu,\"overflows\":%llu,"
           "\"user_s\":%.6f,\"sys_s\":%.6f,\"rss_kib\":%ld}\n",
           (unsigned long long)records, (unsigned long long)reads, (unsigned long long)lookups,
           (unsigned long long)unknown, (unsigned long long)overflows,
           use.ru_utime.tv_sec + use.ru_utime.tv_usec / 1e6,
           use.ru_stime.tv_sec + use.ru_stime.tv_usec / 1e6, use.ru_maxrss);
    return 0;
}
