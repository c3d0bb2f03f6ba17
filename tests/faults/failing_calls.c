/* LD_PRELOAD: the n-th call of the system for a file below a folder fails, or all from the n-th on.

   Read from the environment at each call until it is there, so that a process may be armed after it has started:
     DISTLM_FAIL_BELOW   the folder, absolute; without it nothing happens
     DISTLM_FAIL_AT      n, from 1; 0: none fails, and each call is one line of the log
     DISTLM_FAIL_STAYS   not empty: the n-th and every call after it that writes fail alike (a disk stays full)
     DISTLM_FAIL_TURN    which error comes first, so that every error meets every kind of call
     DISTLM_FAIL_RANK    only in this rank of an mpirun
     DISTLM_FAIL_LOG     a file: a line "n KIND ERROR PATH" for each call that failed

   Calls that glibc makes within itself cannot be caught: those of stdio (faiss, numpy) fail at fopen, fwrite, fflush
   and fclose instead, as they would if the write below them had failed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHORT (-1) /* the call does half of it and says so */

struct kind {
    const char *name;
    int writes;
    int errors[6]; /* in turn, up to a 0 */
    atomic_int calls;
};

#define DISK ENOSPC, EIO, EDQUOT, EROFS
#define KIND(name, words, ...) static struct kind name = {words, __VA_ARGS__, 0}
KIND(WRITE, "write", 1, {DISK, SHORT});
KIND(PWRITE, "pwrite", 1, {DISK, SHORT});
KIND(WRITEV, "writev", 1, {DISK, SHORT});
KIND(FWRITE, "fwrite", 1, {DISK, SHORT});
KIND(FFLUSH, "fflush", 1, {DISK});
KIND(FCLOSE, "fclose", 1, {DISK});
KIND(FSYNC, "fsync", 1, {DISK});
KIND(RENAME, "rename", 1, {DISK});
KIND(CREATE, "open to write", 1, {DISK});
KIND(OPEN, "open to read", 0, {EIO, DISK});
KIND(LIST, "opendir", 0, {EIO});
KIND(READ, "read", 0, {EIO});
KIND(MAP, "mmap", 0, {ENOMEM, DISK});
KIND(TRUNCATE, "ftruncate", 1, {DISK});
KIND(MKDIR, "mkdir", 1, {DISK});
KIND(UNLINK, "unlink", 1, {EIO, EROFS});
KIND(LINK, "link", 1, {DISK});
KIND(CHMOD, "chmod", 1, {EIO, EROFS});
KIND(COPY, "sendfile", 1, {DISK});

static char below[PATH_MAX], logged[PATH_MAX];
static long at, stays, turn;
static size_t below_length;
static atomic_int armed; /* 0: not yet, 1: yes, -1: not this rank */
static atomic_long calls;
static atomic_int lasting; /* error of the n-th, where it stays */

static int is_armed(void) {
    int state = atomic_load(&armed);
    if (state)
        return state > 0;
    const char *folder = getenv("DISTLM_FAIL_BELOW");
    if (!folder || !*folder)
        return 0;
    const char *rank = getenv("DISTLM_FAIL_RANK"), *own = getenv("OMPI_COMM_WORLD_RANK");
    if (rank && *rank && (!own || strcmp(rank, own))) {
        atomic_store(&armed, -1);
        return 0;
    }
    const char *number = getenv("DISTLM_FAIL_AT"), *lasts = getenv("DISTLM_FAIL_STAYS"),
               *first = getenv("DISTLM_FAIL_TURN"), *log = getenv("DISTLM_FAIL_LOG");
    at = number ? atol(number) : 0;
    stays = lasts && *lasts;
    turn = first ? atol(first) : 0;
    snprintf(logged, sizeof logged, "%s", log ? log : "");
    snprintf(below, sizeof below, "%s", folder);
    below_length = strlen(below);
    atomic_store(&armed, 1);
    return 1;
}

static int is_below(const char *path) {
    return !strncmp(path, below, below_length) && (path[below_length] == '/' || !path[below_length]);
}

static int of_descriptor(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static void absolute(int folder, const char *name, char *path) {
    char place[PATH_MAX] = "";
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, place, sizeof place) < 0)
            place[0] = 0;
    } else
        of_descriptor(folder, place);
    if (snprintf(path, PATH_MAX, "%s/%s", place, name) >= PATH_MAX)
        path[0] = 0;
}

static void say(long number, const struct kind *kind, int error, const char *path) {
    char line[PATH_MAX + 128];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", number, kind->name,
                          error == SHORT ? "short" : error ? strerrorname_np(error) : "-", path);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, logged, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0)
        return;
    syscall(SYS_write, fd, line, (size_t)length);
    syscall(SYS_close, fd);
}

static int may_be(const struct kind *kind, int error) {
    for (int i = 0; i < 6; i++)
        if (error && kind->errors[i] == error)
            return 1;
    return 0;
}

/* The error with which this call for a path shall fail, SHORT, or 0. Sets errno. */
static int fault(struct kind *kind, const char *path) {
    if (!is_below(path))
        return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    long of_kind = atomic_fetch_add(&kind->calls, 1);
    int error = 0;
    if (at && number == at) {
        int count = 0;
        while (count < 6 && kind->errors[count])
            count++;
        error = kind->errors[(of_kind + turn) % count];
        if (stays && error != SHORT)
            atomic_store(&lasting, error);
    } else if (at && number > at && kind->writes && may_be(kind, atomic_load(&lasting)))
        error = atomic_load(&lasting);
    if (logged[0] && (!at || number == at))
        say(number, kind, error, path);
    if (error && error != SHORT)
        errno = error;
    return error;
}

static int fault_at(struct kind *kind, int folder, const char *name) {
    char path[PATH_MAX];
    if (!is_armed() || !name)
        return 0;
    absolute(folder, name, path);
    return fault(kind, path);
}

static int fault_of(struct kind *kind, int fd) {
    char path[PATH_MAX];
    return fd >= 0 && is_armed() && of_descriptor(fd, path) ? fault(kind, path) : 0;
}

#define REAL(type, name, parameters) \
    static type(*real) parameters; \
    if (!real) \
        real = (type(*) parameters)dlsym(RTLD_NEXT, name)

static struct kind *to_open(int flags) {
    return (flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT) ? &OPEN : &CREATE;
}

#define MODE_OF(flags, mode) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, (const char *, int, ...)); \
        MODE_OF(flags, mode) \
        return fault_at(to_open(flags), AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
#define OPENS_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, #name, (int, const char *, int, ...)); \
        MODE_OF(flags, mode) \
        return fault_at(to_open(flags), folder, path) ? -1 : real(folder, path, flags, mode); \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

#define STREAMS(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, #name, (const char *, const char *)); \
        return fault_at(mode[0] == 'r' && !strchr(mode, '+') ? &OPEN : &CREATE, AT_FDCWD, path) ? NULL \
                                                                                                : real(path, mode); \
    }
STREAMS(fopen)
STREAMS(fopen64)

DIR *opendir(const char *path) {
    REAL(DIR *, "opendir", (const char *));
    return fault_at(&LIST, AT_FDCWD, path) ? NULL : real(path);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", (int, const void *, size_t));
    int error = size ? fault_of(&WRITE, fd) : 0;
    return error == SHORT ? real(fd, data, (size + 1) / 2) : error ? -1 : real(fd, data, size);
}

#define PWRITES(name, offset_type) \
    ssize_t name(int fd, const void *data, size_t size, offset_type offset) { \
        REAL(ssize_t, #name, (int, const void *, size_t, offset_type)); \
        int error = size ? fault_of(&PWRITE, fd) : 0; \
        return error == SHORT ? real(fd, data, (size + 1) / 2, offset) : error ? -1 : real(fd, data, size, offset); \
    }
PWRITES(pwrite, off_t)
PWRITES(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", (int, const struct iovec *, int));
    int error = fault_of(&WRITEV, fd);
    return error == SHORT ? real(fd, parts, (count + 1) / 2) : error ? -1 : real(fd, parts, count);
}

ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, "read", (int, void *, size_t));
    return fault_of(&READ, fd) ? -1 : real(fd, data, size);
}

#define PREADS(name, offset_type) \
    ssize_t name(int fd, void *data, size_t size, offset_type offset) { \
        REAL(ssize_t, #name, (int, void *, size_t, offset_type)); \
        return fault_of(&READ, fd) ? -1 : real(fd, data, size, offset); \
    }
PREADS(pread, off_t)
PREADS(pread64, off64_t)

#define PREADVS(name, offset_type) \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset) { \
        REAL(ssize_t, #name, (int, const struct iovec *, int, offset_type)); \
        return fault_of(&READ, fd) ? -1 : real(fd, parts, count, offset); \
    }
PREADVS(preadv, off_t)
PREADVS(preadv64, off64_t)

/* What is in the stream's buffer is lost, as when the write of it fails. */
static int drop(FILE *stream, int error) {
    __fpurge(stream);
    errno = error;
    return EOF;
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL(size_t, "fwrite", (const void *, size_t, size_t, FILE *));
    int error = size && count ? fault_of(&FWRITE, fileno(stream)) : 0;
    if (!error)
        return real(data, size, count, stream);
    size_t done = error == SHORT ? real(data, size, count / 2, stream) : 0;
    /* A stream writes again what a short write has left; fewer than asked for means that the disk is full. */
    if (error != SHORT)
        drop(stream, error);
    errno = error == SHORT ? ENOSPC : error;
    return done;
}

size_t fread(void *data, size_t size, size_t count, FILE *stream) {
    REAL(size_t, "fread", (void *, size_t, size_t, FILE *));
    return fault_of(&READ, fileno(stream)) ? 0 : real(data, size, count, stream);
}

static int written_to(FILE *stream) { return __fpending(stream) != 0; }

int fflush(FILE *stream) {
    REAL(int, "fflush", (FILE *));
    int error = stream && written_to(stream) ? fault_of(&FFLUSH, fileno(stream)) : 0;
    return error ? drop(stream, error) : real(stream);
}

int fclose(FILE *stream) {
    REAL(int, "fclose", (FILE *));
    int error = written_to(stream) ? fault_of(&FCLOSE, fileno(stream)) : 0;
    if (!error)
        return real(stream);
    drop(stream, error);
    real(stream);
    errno = error;
    return EOF;
}

#define OF_DESCRIPTOR(name, kind, parameters, fd, ...) \
    int name parameters { \
        REAL(int, #name, parameters); \
        return fault_of(&kind, fd) ? -1 : real(__VA_ARGS__); \
    }
OF_DESCRIPTOR(fsync, FSYNC, (int fd), fd, fd)
OF_DESCRIPTOR(fdatasync, FSYNC, (int fd), fd, fd)
OF_DESCRIPTOR(ftruncate, TRUNCATE, (int fd, off_t size), fd, fd, size)
OF_DESCRIPTOR(ftruncate64, TRUNCATE, (int fd, off64_t size), fd, fd, size)
OF_DESCRIPTOR(fallocate, TRUNCATE, (int fd, int mode, off_t first, off_t size), fd, fd, mode, first, size)
OF_DESCRIPTOR(fallocate64, TRUNCATE, (int fd, int mode, off64_t first, off64_t size), fd, fd, mode, first, size)
OF_DESCRIPTOR(fchmod, CHMOD, (int fd, mode_t mode), fd, fd, mode)

#define OF_PATH(name, kind, parameters, folder, path, ...) \
    int name parameters { \
        REAL(int, #name, parameters); \
        return fault_at(&kind, folder, path) ? -1 : real(__VA_ARGS__); \
    }
OF_PATH(rename, RENAME, (const char *from, const char *to), AT_FDCWD, to, from, to)
OF_PATH(renameat, RENAME, (int there, const char *from, int here, const char *to), here, to, there, from, here, to)
OF_PATH(renameat2, RENAME, (int there, const char *from, int here, const char *to, unsigned flags), here, to, there,
        from, here, to, flags)
OF_PATH(link, LINK, (const char *from, const char *to), AT_FDCWD, to, from, to)
OF_PATH(linkat, LINK, (int there, const char *from, int here, const char *to, int flags), here, to, there, from, here,
        to, flags)
OF_PATH(symlink, LINK, (const char *from, const char *to), AT_FDCWD, to, from, to)
OF_PATH(truncate, TRUNCATE, (const char *path, off_t size), AT_FDCWD, path, path, size)
OF_PATH(mkdir, MKDIR, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
OF_PATH(mkdirat, MKDIR, (int folder, const char *path, mode_t mode), folder, path, folder, path, mode)
OF_PATH(unlink, UNLINK, (const char *path), AT_FDCWD, path, path)
OF_PATH(unlinkat, UNLINK, (int folder, const char *path, int flags), folder, path, folder, path, flags)
OF_PATH(rmdir, UNLINK, (const char *path), AT_FDCWD, path, path)
OF_PATH(chmod, CHMOD, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
OF_PATH(fchmodat, CHMOD, (int folder, const char *path, mode_t mode, int flags), folder, path, folder, path, mode,
        flags)

#define MAPS(name, offset_type) \
    void *name(void *place, size_t size, int protection, int flags, int fd, offset_type offset) { \
        REAL(void *, #name, (void *, size_t, int, int, int, offset_type)); \
        return fault_of(&MAP, flags & MAP_ANONYMOUS ? -1 : fd) ? MAP_FAILED \
                                                               : real(place, size, protection, flags, fd, offset); \
    }
MAPS(mmap, off_t)
MAPS(mmap64, off64_t)

#define COPIES(name, offset_type) \
    ssize_t name(int to, int from, offset_type *offset, size_t size) { \
        REAL(ssize_t, #name, (int, int, offset_type *, size_t)); \
        return fault_of(&COPY, to) ? -1 : real(to, from, offset, size); \
    }
COPIES(sendfile, off_t)
COPIES(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *first, int to, off64_t *second, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", (int, off64_t *, int, off64_t *, size_t, unsigned));
    return fault_of(&COPY, to) ? -1 : real(from, first, to, second, size, flags);
}
