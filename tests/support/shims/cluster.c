/* Other machines and file systems than this one, for the processes of a test (LD_PRELOAD):
     SHIM_NO_FLOCK=1   a file system without locks: flock and fcntl locks fail, as on Lustre mounted with noflock
     SHIM_CLOCK=S      a clock that is S seconds ahead
     SHIM_NODE=NAME    both only on that node
   Python only: launchers, Slurm and shells have the environment, too. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int here(void) {
    static int known = -1;
    if (known < 0) {
        char node[256] = "";
        const char *only = getenv("SHIM_NODE");
        gethostname(node, sizeof node - 1);
        known = strncmp(program_invocation_short_name, "python", 6) == 0 && (!only || strcmp(only, node) == 0);
    }
    return known;
}

static int no_locks(void) { return here() && getenv("SHIM_NO_FLOCK") != NULL; }

static long ahead(void) {
    const char *text = getenv("SHIM_CLOCK");
    return here() && text ? atol(text) : 0;
}

int flock(int file, int operation) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    if (!no_locks()) return real(file, operation);
    errno = ENOSYS;
    return -1;
}

static int lock_of(const char *name, int file, int command, void *argument) {
    int (*real)(int, int, ...) = dlsym(RTLD_NEXT, name);
    if (no_locks() && (command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW)) {
        errno = ENOLCK;
        return -1;
    }
    return real(file, command, argument);
}

#define FCNTL(name)                                              \
    int name(int file, int command, ...) {                       \
        va_list rest;                                            \
        va_start(rest, command);                                 \
        void *argument = va_arg(rest, void *);                   \
        va_end(rest);                                            \
        return lock_of(#name, file, command, argument);          \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

time_t time(time_t *place) {
    static time_t (*real)(time_t *);
    if (!real) real = dlsym(RTLD_NEXT, "time");
    time_t now = real(NULL) + ahead();
    if (place) *place = now;
    return now;
}

int gettimeofday(struct timeval *now, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int code = real(now, zone);
    if (code == 0) now->tv_sec += ahead();
    return code;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return code;
}
