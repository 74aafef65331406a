/* Records what a process writes below one directory, and what it asks to be on disk.
 *
 * Loaded with LD_PRELOAD. POWERLOSS_ROOT names the directory, POWERLOSS_LOG the file the records
 * go to, each whole and in the order the calls were made: a lock is held around call and record,
 * so that a sync covers exactly the writes recorded before it. What a file held before is not
 * recorded, so the directory has to be new. journal.py reads the log.
 *
 * With POWERLOSS_FAIL_HEADERS every write of that number that would be on disk when it returns fails
 * instead, with EIO, after it has reached the system: whether it reaches the disk nobody knows.
 *
 * Not recorded: stores to mapped files, which the database does not do to its data file.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, TRUNCATE = 3, RENAME = 4, SYNC_DIRECTORY = 5 };

struct record {
    uint32_t kind;
    uint32_t durable; /* written through a descriptor with O_DSYNC: on disk when it returned */
    uint64_t file; /* which one, also when its inode number was another's before */
    uint64_t offset;
    uint32_t path_bytes;
    uint32_t data_bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *root;
static int log_descriptor = -1;
static int fail_each, headers;

__attribute__((constructor)) static void begin(void) {
    const char *log = getenv("POWERLOSS_LOG");
    root = getenv("POWERLOSS_ROOT");
    if (getenv("POWERLOSS_FAIL_HEADERS") != NULL)
        fail_each = atoi(getenv("POWERLOSS_FAIL_HEADERS"));
    if (log != NULL && root != NULL)
        log_descriptor = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL)
        abort();
    return found;
}

static void put(const void *data, size_t count) {
    const char *at = data;
    while (count > 0) {
        long written = syscall(SYS_write, log_descriptor, at, count);
        if (written < 0)
            abort(); /* a log with a hole would prove nothing */
        at += written;
        count -= (size_t)written;
    }
}

static void note(struct record *record, const char *path, const char *data) {
    record->path_bytes = (uint32_t)strlen(path);
    put(record, sizeof *record);
    put(path, record->path_bytes);
    put(data, record->data_bytes);
}

/* Whether the file behind the descriptor lies below the root; if so, its path. */
static int watched(int descriptor, char path[PATH_MAX]) {
    char link[64];
    if (log_descriptor < 0 || descriptor == log_descriptor)
        return 0;
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    errno = kept;
    if (length < 0)
        return 0;
    path[length] = '\0';
    return strncmp(path, root, strlen(root)) == 0;
}

static struct record about(int descriptor, uint32_t kind) {
    struct record record = {.kind = kind};
    struct statx status;
    if (statx(descriptor, "", AT_EMPTY_PATH, STATX_INO | STATX_MODE | STATX_BTIME, &status) != 0)
        abort();
    record.file = status.stx_ino * 0x9E3779B97F4A7C15u ^
                  ((uint64_t)status.stx_btime.tv_sec << 30 | status.stx_btime.tv_nsec);
    if (kind == SYNC && S_ISDIR(status.stx_mode))
        record.kind = SYNC_DIRECTORY;
    int flags = fcntl(descriptor, F_GETFL);
    record.durable = flags >= 0 && (flags & O_DSYNC) != 0;
    return record;
}

static void note_write(int descriptor, const char *path, const char *data, ssize_t count,
                       off_t offset, int fails) {
    if (count <= 0)
        return;
    int kept = errno;
    struct record record = about(descriptor, WRITE);
    record.durable = record.durable && !fails;
    record.offset = (uint64_t)offset;
    record.data_bytes = (uint32_t)count;
    note(&record, path, data);
    errno = kept;
}

ssize_t write(int descriptor, const void *data, size_t count) {
    ssize_t (*real)(int, const void *, size_t) = next("write");
    char path[PATH_MAX];
    if (!watched(descriptor, path))
        return real(descriptor, data, count);
    pthread_mutex_lock(&lock);
    ssize_t written = real(descriptor, data, count);
    if (written > 0)
        note_write(descriptor, path, data, written,
                   lseek(descriptor, 0, SEEK_CUR) - (off_t)written, 0);
    pthread_mutex_unlock(&lock);
    return written;
}

ssize_t pwrite(int descriptor, const void *data, size_t count, off_t offset) {
    ssize_t (*real)(int, const void *, size_t, off_t) = next("pwrite");
    char path[PATH_MAX];
    if (!watched(descriptor, path))
        return real(descriptor, data, count, offset);
    pthread_mutex_lock(&lock);
    ssize_t written = real(descriptor, data, count, offset);
    int fails = fail_each > 0 && (fcntl(descriptor, F_GETFL) & O_DSYNC) && ++headers % fail_each == 0;
    note_write(descriptor, path, data, written, offset, fails);
    pthread_mutex_unlock(&lock);
    if (!fails)
        return written;
    errno = EIO;
    return -1;
}

ssize_t pwrite64(int descriptor, const void *data, size_t count, off64_t offset) {
    return pwrite(descriptor, data, count, (off_t)offset);
}

/* One write per part: which of them reach the disk is up to chance. */
static void note_parts(int descriptor, const char *path, const struct iovec *parts, int count,
                       ssize_t written, off_t offset) {
    for (int part = 0; part < count && written > 0; part++) {
        ssize_t length = (ssize_t)parts[part].iov_len;
        if (length > written)
            length = written;
        note_write(descriptor, path, parts[part].iov_base, length, offset, 0);
        offset += length;
        written -= length;
    }
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    ssize_t (*real)(int, const struct iovec *, int) = next("writev");
    char path[PATH_MAX];
    if (!watched(descriptor, path))
        return real(descriptor, parts, count);
    pthread_mutex_lock(&lock);
    ssize_t written = real(descriptor, parts, count);
    if (written > 0)
        note_parts(descriptor, path, parts, count, written,
                   lseek(descriptor, 0, SEEK_CUR) - (off_t)written);
    pthread_mutex_unlock(&lock);
    return written;
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t offset) {
    ssize_t (*real)(int, const struct iovec *, int, off_t) = next("pwritev");
    char path[PATH_MAX];
    if (!watched(descriptor, path))
        return real(descriptor, parts, count, offset);
    pthread_mutex_lock(&lock);
    ssize_t written = real(descriptor, parts, count, offset);
    note_parts(descriptor, path, parts, count, written, offset);
    pthread_mutex_unlock(&lock);
    return written;
}

int ftruncate(int descriptor, off_t length) {
    int (*real)(int, off_t) = next("ftruncate");
    char path[PATH_MAX];
    if (!watched(descriptor, path))
        return real(descriptor, length);
    pthread_mutex_lock(&lock);
    int result = real(descriptor, length);
    if (result == 0) {
        struct record record = about(descriptor, TRUNCATE);
        record.offset = (uint64_t)length;
        note(&record, path, "");
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static int synced(const char *name, int descriptor) {
    int (*real)(int) = next(name);
    char path[PATH_MAX];
    if (!watched(descriptor, path))
        return real(descriptor);
    pthread_mutex_lock(&lock);
    int result = real(descriptor);
    if (result == 0) {
        struct record record = about(descriptor, SYNC);
        note(&record, path, "");
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int fsync(int descriptor) { return synced("fsync", descriptor); }

int fdatasync(int descriptor) { return synced("fdatasync", descriptor); }

static void note_rename(const char *from, const char *to) {
    struct record record = {.kind = RENAME, .data_bytes = (uint32_t)strlen(to)};
    note(&record, from, to);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = next("rename");
    if (log_descriptor < 0 || strncmp(to, root, strlen(root)) != 0)
        return real(from, to);
    pthread_mutex_lock(&lock);
    int result = real(from, to);
    if (result == 0)
        note_rename(from, to);
    pthread_mutex_unlock(&lock);
    return result;
}

/* Names below a directory that is open, as the program uses them: relative, and both below it. */
int renameat(int old_directory, const char *from, int new_directory, const char *to) {
    int (*real)(int, const char *, int, const char *) = next("renameat");
    char old_path[PATH_MAX], new_path[PATH_MAX], old_name[2 * PATH_MAX], new_name[2 * PATH_MAX];
    if (log_descriptor < 0 || !watched(old_directory, old_path) ||
        !watched(new_directory, new_path))
        return real(old_directory, from, new_directory, to);
    pthread_mutex_lock(&lock);
    int result = real(old_directory, from, new_directory, to);
    if (result == 0) {
        snprintf(old_name, sizeof old_name, "%s/%s", old_path, from);
        snprintf(new_name, sizeof new_name, "%s/%s", new_path, to);
        note_rename(old_name, new_name);
    }
    pthread_mutex_unlock(&lock);
    return result;
}
