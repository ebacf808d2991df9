// A fault layer for tools/stress/fault_test.py: LD_PRELOADed, it counts the system calls on paths below a folder and
// lets one of them, or some, or all from one on, fail. Linux, 64 bits, glibc.
//
//   FAULTS_FOLDER  only paths below it count; an absolute path without links
//   FAULTS_STATE   a file of sizeof(struct state) bytes, shared by all processes of a run
//   FAULTS_LOG     optional: gets a line "OP PATH" for each call
//   FAULTS_SPEC    OP K ACTION MASK P SEED JUMP: at the K-th call of OP (from 1) the action; after it, EIO, ENOSPC and
//                  the like go on for the ops of MASK. P > 0 in place of K: each call of MASK with that probability.
//                  ACTION: an errno, or one of enum action. JUMP: seconds that the clock is off from then on.
//
// Calls go straight to the kernel: no dlsym where it can be helped, and nothing to keep in step but the state file.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#if !defined __linux__ || !defined __LP64__
#    error "64-bit Linux only"
#endif

#define EXPORT __attribute__((visibility("default")))
#define ALIAS(name, of) __asm__(".globl " #name "\n.set " #name ", " #of) // the headers give some another type

enum op { OPEN, CREATE, READ, WRITE, SYNC, RENAME, TRUNCATE, MMAP, STAT, UNLINK, MKDIR, LIST, LOCK, CHMOD, SPACE, OPS };
static const char * const names[OPS] = { "open", "create", "read",  "write", "sync", "rename", "truncate", "mmap",
                                         "stat", "unlink", "mkdir", "list",  "lock", "chmod",  "space" };
enum action { NONE, SHORT = -1, KILL = -2, TORN = -3, BUS = -4, CLOCK = -5 };

struct state {
    uint64_t counts[OPS];
    uint64_t total, fired;
    int64_t jump;
    char what[16], path[1000];
};

static struct state * st;
static char folder[PATH_MAX];
static size_t folder_len;
static int log_fd = -1;
static struct {
    long op, k, action, mask;
    double p;
    unsigned long seed;
    long jump;
} spec;

/// Reads the environment; called when a process starts, and by a forked child that begins a run.
EXPORT void faults_arm(void) {
    const char *state = getenv("FAULTS_STATE"), *below = getenv("FAULTS_FOLDER"), *log = getenv("FAULTS_LOG");
    const char * text = getenv("FAULTS_SPEC");
    if (!state || !below) {
        return;
    }
    int fd = (int) syscall(SYS_openat, AT_FDCWD, state, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) {
        return;
    }
    void * at = (void *) syscall(SYS_mmap, NULL, sizeof *st, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0L);
    syscall(SYS_close, fd);
    if (at == MAP_FAILED) {
        return;
    }
    folder_len = strlen(below);
    memcpy(folder, below, folder_len + 1);
    memset(&spec, 0, sizeof spec);
    if (text) {
        sscanf(text, "%ld %ld %ld %ld %lf %lu %ld", &spec.op, &spec.k, &spec.action, &spec.mask, &spec.p, &spec.seed,
               &spec.jump);
    }
    if (log) {
        log_fd = (int) syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    }
    st = at;
}

__attribute__((constructor)) static void start(void) {
    faults_arm();
}

static bool below(const char * path) {
    return !strncmp(path, folder, folder_len) && (path[folder_len] == '/' || !path[folder_len]);
}

/// Absolute path of an open file: "pipe:[1]" and the like for what is none.
static bool path_of(int fd, char * out) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
    return n > 0;
}

static bool absolute(int dir, const char * path, char * out) {
    if (!path || *path == '/') {
        snprintf(out, PATH_MAX, "%s", path ? path : "");
        return path;
    }
    if (dir == AT_FDCWD ? syscall(SYS_getcwd, out, PATH_MAX) < 0 : !path_of(dir, out)) {
        return false;
    }
    size_t n = strlen(out);
    snprintf(out + n, PATH_MAX - n, "/%s", path);
    return true;
}

static bool lucky(uint64_t n) { // splitmix64 of seed and call
    uint64_t z = (n + spec.seed * 1000003) * 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (double) ((z ^ (z >> 31)) >> 11) * 0x1p-53 < spec.p;
}

/// Counts a call; what shall become of it: 0, an errno, or an action.
static int decide(enum op op, const char * path) {
    if (!below(path)) {
        return NONE;
    }
    uint64_t k = __atomic_add_fetch(&st->counts[op], 1, __ATOMIC_RELAXED);
    uint64_t n = __atomic_add_fetch(&st->total, 1, __ATOMIC_RELAXED);
    if (log_fd >= 0) {
        char line[PATH_MAX + 20];
        int len = snprintf(line, sizeof line, "%s %s\n", names[op], path);
        syscall(SYS_write, log_fd, line, len);
    }
    bool in_mask = spec.mask >> op & 1;
    bool now = spec.p > 0 ? in_mask && lucky(n) : op == (enum op) spec.op && k == (uint64_t) spec.k;
    bool after = spec.p <= 0 && in_mask && __atomic_load_n(&st->fired, __ATOMIC_RELAXED);
    if (!spec.action || !(now || after)) {
        return NONE;
    }
    if (!__atomic_fetch_add(&st->fired, 1, __ATOMIC_RELAXED)) {
        snprintf(st->what, sizeof st->what, "%s", names[op]);
        snprintf(st->path, sizeof st->path, "%s", path);
    }
    if (spec.action == CLOCK) {
        st->jump = spec.jump;
        return NONE;
    }
    return (int) spec.action;
}

static int on_path(enum op op, int dir, const char * path) {
    char full[PATH_MAX];
    int keep = errno;
    int d = st && absolute(dir, path, full) ? decide(op, full) : NONE;
    errno = keep;
    return d;
}

static int on_file(enum op op, int fd) {
    char full[PATH_MAX];
    int keep = errno;
    int d = st && fd >= 0 && path_of(fd, full) ? decide(op, full) : NONE;
    errno = keep;
    return d;
}

static void die(void) {
    for (;;) {
        syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    }
}

/// True where the call must fail: errno is set. Dies by KILL; TORN is left to the caller, which dies after the call.
static bool fails(int d) {
    if (d == KILL) {
        die();
    }
    if (d > 0) {
        errno = d;
    }
    return d > 0;
}

static long after(int d, long result) {
    if (d == TORN) {
        die();
    }
    return result;
}

// ---- opening ----

static int open_at(int dir, const char * path, int flags, mode_t mode) {
    int d = on_path(flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)) ? CREATE : OPEN, dir, path);
    return fails(d) ? -1 : (int) after(d, syscall(SYS_openat, dir, path, flags, mode));
}

static mode_t mode_of(int flags, va_list args) {
    return flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)) ? va_arg(args, mode_t) : 0;
}

EXPORT int open(const char * path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = mode_of(flags, args);
    va_end(args);
    return open_at(AT_FDCWD, path, flags, mode);
}
ALIAS(open64, open);

EXPORT int openat(int dir, const char * path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    mode_t mode = mode_of(flags, args);
    va_end(args);
    return open_at(dir, path, flags, mode);
}
ALIAS(openat64, openat);

EXPORT int __open64_2(const char * path, int flags) {
    return open_at(AT_FDCWD, path, flags, 0);
}
ALIAS(__open_2, __open64_2);

static FILE * file_open(const char * path, const char * mode, const char * name) {
    int d = on_path(*mode == 'r' ? OPEN : CREATE, AT_FDCWD, path);
    if (fails(d)) {
        return NULL;
    }
    FILE * (*real)(const char *, const char *) = (FILE * (*)(const char *, const char *) ) dlsym(RTLD_NEXT, name);
    FILE * f = real(path, mode);
    after(d, 0);
    return f;
}

EXPORT FILE * fopen(const char * path, const char * mode) {
    return file_open(path, mode, "fopen");
}
EXPORT FILE * fopen64(const char * path, const char * mode) {
    return file_open(path, mode, "fopen64");
}

EXPORT DIR * opendir(const char * path) {
    if (fails(on_path(LIST, AT_FDCWD, path))) {
        return NULL;
    }
    DIR * (*real)(const char *) = (DIR * (*)(const char *) ) dlsym(RTLD_NEXT, "opendir");
    return real(path);
}

// ---- reading and writing ----

/// How many of n bytes a call may take.
static size_t part(int d, size_t n) {
    return (d == SHORT || d == TORN) && n > 1 ? n / 2 : n;
}

/// The same for vectors: the first half of the first that holds anything.
static int first_half(int d, const struct iovec * v, int n, struct iovec * one) {
    if (d != SHORT && d != TORN) {
        return 0;
    }
    for (int i = 0; i < n; i++) {
        if (v[i].iov_len) {
            *one = (struct iovec){ v[i].iov_base, part(d, v[i].iov_len) };
            return 1;
        }
    }
    return 0;
}

#define PLAIN(OP, CALL)                                                                                                \
    int d = on_file(OP, fd);                                                                                           \
    return fails(d) ? -1 : after(d, CALL)
#define VECTOR(OP, CALL, ...)                                                                                          \
    int d = on_file(OP, fd);                                                                                           \
    if (fails(d)) {                                                                                                    \
        return -1;                                                                                                     \
    }                                                                                                                  \
    struct iovec one;                                                                                                  \
    if (first_half(d, v, n, &one)) {                                                                                   \
        v = &one, n = 1;                                                                                               \
    }                                                                                                                  \
    return after(d, syscall(CALL, fd, v, n __VA_ARGS__))

EXPORT ssize_t read(int fd, void * to, size_t n) {
    PLAIN(READ, syscall(SYS_read, fd, to, part(d, n)));
}
EXPORT ssize_t write(int fd, const void * from, size_t n) {
    PLAIN(WRITE, syscall(SYS_write, fd, from, part(d, n)));
}
EXPORT ssize_t pread(int fd, void * to, size_t n, off_t at) {
    PLAIN(READ, syscall(SYS_pread64, fd, to, part(d, n), at));
}
ALIAS(pread64, pread);
EXPORT ssize_t pwrite(int fd, const void * from, size_t n, off_t at) {
    PLAIN(WRITE, syscall(SYS_pwrite64, fd, from, part(d, n), at));
}
ALIAS(pwrite64, pwrite);
EXPORT ssize_t readv(int fd, const struct iovec * v, int n) {
    VECTOR(READ, SYS_readv);
}
EXPORT ssize_t writev(int fd, const struct iovec * v, int n) {
    VECTOR(WRITE, SYS_writev);
}
EXPORT ssize_t preadv(int fd, const struct iovec * v, int n, off_t at) {
    VECTOR(READ, SYS_preadv, , at, 0L);
}
ALIAS(preadv64, preadv);
EXPORT ssize_t pwritev(int fd, const struct iovec * v, int n, off_t at) {
    VECTOR(WRITE, SYS_pwritev, , at, 0L);
}
ALIAS(pwritev64, pwritev);
EXPORT ssize_t preadv2(int fd, const struct iovec * v, int n, off_t at, int flags) {
    VECTOR(READ, SYS_preadv2, , at, 0L, flags);
}
ALIAS(preadv64v2, preadv2);
EXPORT ssize_t pwritev2(int fd, const struct iovec * v, int n, off_t at, int flags) {
    VECTOR(WRITE, SYS_pwritev2, , at, 0L, flags);
}
ALIAS(pwritev64v2, pwritev2);

EXPORT int fsync(int fd) {
    PLAIN(SYNC, (int) syscall(SYS_fsync, fd));
}
EXPORT int fdatasync(int fd) {
    PLAIN(SYNC, (int) syscall(SYS_fdatasync, fd));
}
EXPORT int ftruncate(int fd, off_t n) {
    PLAIN(TRUNCATE, (int) syscall(SYS_ftruncate, fd, n));
}
ALIAS(ftruncate64, ftruncate);
EXPORT int flock(int fd, int how) {
    PLAIN(LOCK, (int) syscall(SYS_flock, fd, how));
}

/// BUS: the second half of the mapping lies behind the end of an empty file, so that touching it is SIGBUS, as where
/// the disk cannot give a page, or somebody has cut the file.
EXPORT void * mmap(void * at, size_t n, int protection, int flags, int fd, off_t offset) {
    int d = flags & MAP_ANONYMOUS ? NONE : on_file(MMAP, fd);
    if (fails(d)) {
        return MAP_FAILED;
    }
    void * made = (void *) syscall(SYS_mmap, at, n, protection, flags, fd, offset);
    if (d == BUS && made != MAP_FAILED) {
        size_t half = n / 2 & ~(size_t) 4095;
        int empty = (int) syscall(SYS_memfd_create, "faults", 1);
        syscall(SYS_mmap, (char *) made + half, n - half, PROT_READ, MAP_SHARED | MAP_FIXED, empty, 0L);
        syscall(SYS_close, empty);
    }
    after(d, 0);
    return made;
}
ALIAS(mmap64, mmap);

// ---- names ----

#define NAMED(OP, DIR, PATH, CALL)                                                                                     \
    int d = on_path(OP, DIR, PATH);                                                                                    \
    return fails(d) ? -1 : (int) after(d, CALL)

EXPORT int rename(const char * a, const char * b) {
    NAMED(RENAME, AT_FDCWD, a, syscall(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, 0));
}
EXPORT int renameat(int da, const char * a, int db, const char * b) {
    NAMED(RENAME, da, a, syscall(SYS_renameat2, da, a, db, b, 0));
}
EXPORT int unlink(const char * path) {
    NAMED(UNLINK, AT_FDCWD, path, syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}
EXPORT int unlinkat(int dir, const char * path, int flags) {
    NAMED(UNLINK, dir, path, syscall(SYS_unlinkat, dir, path, flags));
}
EXPORT int rmdir(const char * path) {
    NAMED(UNLINK, AT_FDCWD, path, syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
}
EXPORT int mkdir(const char * path, mode_t mode) {
    NAMED(MKDIR, AT_FDCWD, path, syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}
EXPORT int chmod(const char * path, mode_t mode) {
    NAMED(CHMOD, AT_FDCWD, path, syscall(SYS_fchmodat, AT_FDCWD, path, mode));
}
EXPORT int fchmod(int fd, mode_t mode) {
    PLAIN(CHMOD, (int) syscall(SYS_fchmod, fd, mode));
}

EXPORT int stat(const char * restrict path, struct stat * restrict s) {
    NAMED(STAT, AT_FDCWD, path, syscall(SYS_newfstatat, AT_FDCWD, path, s, 0));
}
ALIAS(stat64, stat);
EXPORT int lstat(const char * restrict path, struct stat * restrict s) {
    NAMED(STAT, AT_FDCWD, path, syscall(SYS_newfstatat, AT_FDCWD, path, s, AT_SYMLINK_NOFOLLOW));
}
ALIAS(lstat64, lstat);
EXPORT int fstat(int fd, struct stat * s) {
    PLAIN(STAT, (int) syscall(SYS_fstat, fd, s));
}
ALIAS(fstat64, fstat);
EXPORT int fstatat(int dir, const char * restrict path, struct stat * restrict s, int flags) {
    NAMED(STAT, dir, path, syscall(SYS_newfstatat, dir, path, s, flags));
}
ALIAS(fstatat64, fstatat);

EXPORT int statvfs(const char * restrict path, struct statvfs * restrict s) {
    int d = on_path(SPACE, AT_FDCWD, path);
    if (fails(d)) {
        return -1;
    }
    int (*real)(const char *, struct statvfs *) = (int (*)(const char *, struct statvfs *)) dlsym(RTLD_NEXT, "statvfs");
    return real(path, s);
}
ALIAS(statvfs64, statvfs);

// ---- clocks ----

EXPORT int clock_gettime(clockid_t id, struct timespec * t) {
    int r = (int) syscall(SYS_clock_gettime, id, t);
    if (!r && st && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        t->tv_sec += st->jump;
    }
    return r;
}

EXPORT time_t time(time_t * out) {
    struct timespec t = { 0 };
    clock_gettime(CLOCK_REALTIME, &t);
    if (out) {
        *out = t.tv_sec;
    }
    return t.tv_sec;
}

EXPORT int gettimeofday(struct timeval * restrict out, void * restrict zone) {
    struct timespec t = { 0 };
    (void) zone;
    clock_gettime(CLOCK_REALTIME, &t);
    *out = (struct timeval){ t.tv_sec, t.tv_nsec / 1000 };
    return 0;
}
