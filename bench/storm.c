/* The writer. It does one thing as told and prints what it did as one JSON line.
 *
 *   storm burst ROOT FILES DIRS WRITERS   each file created, written, closed, renamed in its directory,
 *                                         nine in ten unlinked; ROOT/d000.. must exist
 *   storm split ROOT FILES DIRS WRITERS   the same, one file in a hundred below ROOT/in, the rest below
 *                                         ROOT/out
 *   storm rate ROOT PER_SECOND SECONDS WRITERS   renames at a constant rate
 *   storm chains ROOT N                   mkdir c/b/c/d and a file in the last, N times
 *   storm pairs ROOT N                    rename directory p -> q, create q/f at once, N times
 *   storm moves ROOT N                    the same with one directory, renamed N times: m0 -> m1 -> ..
 *   storm cases ROOT GAP_MS               five renames a pause apart, each followed at once by what
 *                                         shows whether it was understood; the tree must exist
 *   storm unlink ROOT N                   unlinks x0000000.., which must exist
 *   storm touch ROOT N GAP_MS             creates N files a pause apart and prints when each was made
 *   storm tree ROOT N                     N directories, sixteen in each
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WRITERS 64
static struct done { /* shared with the writers: what each one did, not what it was told to do */
    uint64_t created, modified, written, renamed, deleted;
} *done;

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

static void pause_ns(int64_t ns)
{
    struct timespec t = {ns / 1000000000LL, ns % 1000000000LL};
    nanosleep(&t, NULL);
}

static void make(int dir, const char *name)
{
    int fd = openat(dir, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0)
        die(name);
    close(fd);
}

/* ---- burst -------------------------------------------------------------------------------------- */

static void burst(long from, long to, int dirs, int split, struct done *d)
{
    static const char text[] = "sixty-four bytes are enough to make one page of a file in memory";
    char a[64], b[64];
    for (long i = from; i < to; i++) {
        /* Ten in each thousand are inside, so that nine in ten of those are unlinked too. */
        const char *side = !split ? "" : i / 10 % 100 ? "out/" : "in/";
        int dir = (i / 1000 + i) % dirs;
        snprintf(a, sizeof a, "%sd%03d/f%07ld", side, dir, i);
        snprintf(b, sizeof b, "%sd%03d/g%07ld", side, dir, i);
        int fd = open(a, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
        if (fd < 0)
            die(a);
        d->created++;
        if (write(fd, text, 64) != 64)
            die("write");
        d->modified++;
        close(fd);
        d->written++;
        if (rename(a, b))
            die(b);
        d->renamed++;
        if (i % 10) {
            if (unlink(b))
                die(b);
            d->deleted++;
        }
    }
}

/* A rename to a name never used before is one record of one fact, which nothing merges with: what was
 * delivered plus what was lost must give exactly what was done, in whatever unit it is counted. */
static void rate(int writer, double per_second, double seconds, struct done *d)
{
    char old[64], new[64];
    int64_t start = now_ns(), length = (int64_t)(seconds * 1e9), elapsed;
    snprintf(old, sizeof old, "w%02d-%09d", writer, 0);
    make(AT_FDCWD, old);
    d->created++, d->written++;
    do {
        elapsed = now_ns() - start;
        if (elapsed > length)
            elapsed = length;
        uint64_t due = (uint64_t)(per_second * (elapsed / 1e9));
        for (; d->renamed < due; d->renamed++) {
            snprintf(new, sizeof new, "w%02d-%09llu", writer, (unsigned long long)d->renamed + 1);
            if (rename(old, new))
                die(new);
            memcpy(old, new, sizeof old);
        }
        pause_ns(1000000);
    } while (elapsed < length);
}

/* ---- trees -------------------------------------------------------------------------------------- */

static void tree(int parent, long node, long count)
{
    char name[32];
    for (long child = node * 16 + 1; child <= node * 16 + 16 && child <= count; child++) {
        snprintf(name, sizeof name, "d%06ld", child);
        if (mkdirat(parent, name, 0700))
            die(name);
        done->created++;
        if (child * 16 + 1 > count)
            continue;
        int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0)
            die(name);
        tree(fd, child, count);
        close(fd);
    }
}

static void chains(long count)
{
    char path[64];
    static const char *const parts[] = {"", "/b", "/b/c", "/b/c/d"};
    for (long i = 0; i < count; i++) {
        for (int k = 0; k < 4; k++) {
            snprintf(path, sizeof path, "c%07ld%s", i, parts[k]);
            if (mkdir(path, 0700))
                die(path);
            done->created++;
        }
        strcat(path, "/f");
        make(AT_FDCWD, path);
        done->created++, done->written++;
    }
}

static void pairs(long count)
{
    char old[64], new[64];
    for (long i = 0; i < count; i++) {
        snprintf(old, sizeof old, "p%07ld", i);
        snprintf(new, sizeof new, "q%07ld", i);
        if (rename(old, new))
            die(old);
        done->renamed++;
        strcat(new, "/f");
        make(AT_FDCWD, new);
        done->created++, done->written++;
    }
}

/* Whoever looks the path up when reading finds the last name for every file. */
static void moves(long count)
{
    char old[64], new[64];
    for (long i = 0; i < count; i++) {
        snprintf(old, sizeof old, "m%07ld", i);
        snprintf(new, sizeof new, "m%07ld", i + 1);
        if (rename(old, new))
            die(old);
        done->renamed++;
        snprintf(new + 8, sizeof new - 8, "/f%07ld", i);
        make(AT_FDCWD, new);
        done->created++, done->written++;
    }
}

static void move(const char *from, const char *to, unsigned flags)
{
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, flags))
        die(from);
    done->renamed++;
}

static void cases(long gap_ms)
{
    move("file/a", "file/b", 0);
    pause_ns(gap_ms * 1000000);
    move("over/a", "over/b", 0);
    pause_ns(gap_ms * 1000000);
    move("directory/old", "directory/new", 0);
    make(AT_FDCWD, "directory/new/f-directory");
    pause_ns(gap_ms * 1000000);
    move("ancestor/old", "ancestor/new", 0);
    make(AT_FDCWD, "ancestor/new/below/f-ancestor");
    pause_ns(gap_ms * 1000000);
    move("exchange/one", "exchange/two", RENAME_EXCHANGE);
    make(AT_FDCWD, "exchange/one/f-exchange");
}

static void unlink_all(long count)
{
    char name[32];
    for (long i = 0; i < count; i++) {
        snprintf(name, sizeof name, "x%07ld", i);
        if (unlink(name))
            die(name);
        done->deleted++;
    }
}

static void touch(long count, long gap_ms)
{
    char name[32];
    for (long i = 0; i < count; i++) {
        snprintf(name, sizeof name, "t%07ld", i);
        if (i)
            pause_ns(gap_ms * 1000000);
        int64_t at = now_ns();
        make(AT_FDCWD, name);
        done->created++, done->written++;
        printf("{\"name\":\"%s\",\"ns\":%lld}\n", name, (long long)at);
    }
}

// Each file by a process of its own, another program, which ends at once.
static void spawn(const char *self, const char *root, long from, long to)
{
    char program[4096], number[32];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(program, sizeof program, "%s", self);
    char *slash = strrchr(program, '/');
    snprintf(slash ? slash + 1 : program, 16, "fw-writer");
    for (long i = from; i < to; i++) {
        int status;
        pid_t pid = vfork();
        if (pid < 0)
            die("vfork");
        if (!pid) {
            snprintf(number, sizeof number, "%ld", i);
            execl(program, program, "one", root, number, (char *)NULL);
            _exit(127);
        }
        if (waitpid(pid, &status, 0) != pid || status)
            _exit(4);
    }
    _exit(0);
}

static void one(long i)
{
    char name[32];
    snprintf(name, sizeof name, "f%ld", i);
    int fd = open(name, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, "x", 1) != 1 || close(fd))
        die(name);
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: storm MODE ROOT N [MORE]\n");
        return 2;
    }
    const char *mode = argv[1];
    double n = atof(argv[3]), second = argc > 4 ? atof(argv[4]) : 0;
    int writers = argc > 5 ? atoi(argv[5]) : 1;
    if (writers < 1 || writers > WRITERS || chdir(argv[2]))
        die(argv[2]);
    done = mmap(NULL, sizeof *done * WRITERS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                -1, 0);
    if (done == MAP_FAILED)
        die("mmap");

    int64_t start = now_ns();
    int split = !strcmp(mode, "split"), is_rate = !strcmp(mode, "rate"), status = 0;
    if (split || is_rate || !strcmp(mode, "burst")) {
        for (int w = 0; w < writers; w++) {
            pid_t pid = fork();
            if (pid < 0)
                die("fork");
            if (pid)
                continue;
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (is_rate)
                rate(w, n / writers, second, &done[w]);
            else
                burst((long)n * w / writers, (long)n * (w + 1) / writers, (int)second, split,
                      &done[w]);
            _exit(0);
        }
        for (int w = 0, s; w < writers; w++) {
            wait(&s);
            status |= s;
        }
    } else if (!strcmp(mode, "spawn")) {
        for (int w = 0; w < writers; w++) {
            pid_t pid = fork();
            if (pid < 0)
                die("fork");
            if (!pid)
                spawn(argv[0], argv[2], (long)n * w / writers, (long)n * (w + 1) / writers);
        }
        for (int w = 0, s; w < writers; w++) {
            wait(&s);
            status |= s;
        }
        done[0].created = done[0].modified = done[0].written = (unsigned long)n;
    } else if (!strcmp(mode, "one")) {
        one((long)n);
    } else if (!strcmp(mode, "tree")) {
        tree(AT_FDCWD, 0, (long)n);
    } else if (!strcmp(mode, "chains")) {
        chains((long)n);
    } else if (!strcmp(mode, "pairs")) {
        pairs((long)n);
    } else if (!strcmp(mode, "moves")) {
        moves((long)n);
    } else if (!strcmp(mode, "cases")) {
        cases((long)n);
    } else if (!strcmp(mode, "unlink")) {
        unlink_all((long)n);
    } else if (!strcmp(mode, "touch")) {
        touch((long)n, (long)second);
    } else {
        fprintf(stderr, "no such mode: %s\n", mode);
        return 2;
    }
    if (status)
        return 4;
    struct done all = {0};
    for (int w = 0; w < writers; w++) {
        all.created += done[w].created, all.modified += done[w].modified;
        all.written += done[w].written, all.renamed += done[w].renamed;
        all.deleted += done[w].deleted;
    }
    printf("{\"created\":%llu,\"modified\":%llu,\"written\":%llu,\"renamed\":%llu,\"deleted\":%llu,"
           "\"seconds\":%.6f}\n",
           (unsigned long long)all.created, (unsigned long long)all.modified,
           (unsigned long long)all.written, (unsigned long long)all.renamed,
           (unsigned long long)all.deleted, (now_ns() - start) / 1e9);
    return 0;
}
