/* Preloaded into a program (LD_PRELOAD), writes down in order what it does to the files under $WATCHED, and what it
   says on its standard output, in the file $WATCH_LOG, a record each:

       kind u8 · inode u64 · offset u64 · length u64 · `length` bytes

       c  a file came to be at a path          w  bytes were written at an offset      s  a file was synced
       m  a folder came to be at a path        t  a file was cut or grown to `offset`  d  the folder at a path was synced
       r  a path was renamed, "old\0new"       u  a path was removed                   a  bytes were said
       l  a path got another name, "old\0new"

   What goes through a memory map isn't seen (SQLite's -shm, which means nothing after a crash).  */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER; /* what is done and what is written down go together */
static const char *root;
static int record_fd = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    root = getenv("WATCHED");
    record_fd = REAL(open)(getenv("WATCH_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (!root || record_fd < 0) abort();
}

static int inside(const char *path) {
    size_t length = strlen(root);
    return path && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* The path of an open file; whether it is watched. */
static int path_of(int fd, char path[4096]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static void put(char kind, uint64_t inode, uint64_t offset, const void *data, uint64_t length) {
    char head[25] = {kind};
    memcpy(head + 1, &inode, 8);
    memcpy(head + 9, &offset, 8);
    memcpy(head + 17, &length, 8);
    struct iovec parts[2] = {{head, sizeof head}, {(void *)data, length}};
    if (REAL(writev)(record_fd, parts, 2) != (ssize_t)(sizeof head + length)) abort();
}

static void put_path(char kind, uint64_t inode, const char *path) { put(kind, inode, 0, path, strlen(path)); }

static void put_two(char kind, const char *old, const char *new) {
    char both[8192];
    size_t length = strlen(old) + 1;
    memcpy(both, old, length);
    strcpy(both + length, new);
    put(kind, 0, 0, both, length + strlen(new));
}

static uint64_t inode_of(int fd) {
    struct stat about;
    if (fstat(fd, &about)) abort();
    return about.st_ino;
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    struct stat about;
    char full[4096];
    pthread_mutex_lock(&order);
    int was_there = !fstatat(folder, path, &about, 0);
    int fd = REAL(openat)(folder, path, flags, mode);
    if (fd >= 0 && path_of(fd, full)) {
        if (!was_there && (flags & O_CREAT)) put_path('c', inode_of(fd), full);
        else if (flags & O_TRUNC) put('t', inode_of(fd), 0, "", 0);
    }
    pthread_mutex_unlock(&order);
    return fd;
}

#define MODE(last) ({ va_list rest; va_start(rest, last); mode_t m = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0; va_end(rest); m; })
int open(const char *path, int flags, ...) { return opened(AT_FDCWD, path, flags, MODE(flags)); }
int open64(const char *path, int flags, ...) { return opened(AT_FDCWD, path, flags, MODE(flags)); }
int openat(int folder, const char *path, int flags, ...) { return opened(folder, path, flags, MODE(flags)); }
int openat64(int folder, const char *path, int flags, ...) { return opened(folder, path, flags, MODE(flags)); }

/* From here on each does what it is called for and, where that went well, writes it down. */
#define WATCH(result, call, good, note)         \
    pthread_mutex_lock(&order);                 \
    result = (call);                            \
    if (good) { note; }                         \
    pthread_mutex_unlock(&order);               \
    return result

ssize_t write(int fd, const void *data, size_t length) {
    char path[4096];
    ssize_t done;
    WATCH(done, REAL(write)(fd, data, length), done > 0,
          if (fd == 1) put('a', 0, 0, data, done);
          else if (path_of(fd, path)) put('w', inode_of(fd), lseek(fd, 0, SEEK_CUR) - done, data, done));
}

static ssize_t written_at(int fd, const void *data, size_t length, off_t offset) {
    char path[4096];
    ssize_t done;
    WATCH(done, REAL(pwrite)(fd, data, length, offset), done > 0 && path_of(fd, path),
          put('w', inode_of(fd), offset, data, done));
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) { return written_at(fd, data, length, at); }
ssize_t pwrite64(int fd, const void *data, size_t length, off_t at) { return written_at(fd, data, length, at); }

static int cut(int fd, off_t length) {
    char path[4096];
    int failed;
    WATCH(failed, REAL(ftruncate)(fd, length), !failed && path_of(fd, path), put('t', inode_of(fd), length, "", 0));
}
int ftruncate(int fd, off_t length) { return cut(fd, length); }
int ftruncate64(int fd, off_t length) { return cut(fd, length); }

static void put_sync(int fd, const char *path) {
    struct stat about;
    if (!fstat(fd, &about) && S_ISDIR(about.st_mode)) put_path('d', 0, path);
    else put('s', inode_of(fd), 0, "", 0);
}
int fsync(int fd) {
    char path[4096];
    int failed;
    WATCH(failed, REAL(fsync)(fd), !failed && path_of(fd, path), put_sync(fd, path));
}
int fdatasync(int fd) {
    char path[4096];
    int failed;
    WATCH(failed, REAL(fdatasync)(fd), !failed && path_of(fd, path), put_sync(fd, path));
}

int rename(const char *old, const char *new) {
    int failed;
    WATCH(failed, REAL(rename)(old, new), !failed && inside(new), put_two('r', old, new));
}
int link(const char *old, const char *new) {
    int failed;
    WATCH(failed, REAL(link)(old, new), !failed && inside(new), put_two('l', old, new));
}
int unlink(const char *path) {
    int failed;
    WATCH(failed, REAL(unlink)(path), !failed && inside(path), put_path('u', 0, path));
}
int mkdir(const char *path, mode_t mode) {
    int failed;
    WATCH(failed, REAL(mkdir)(path, mode), !failed && inside(path), put_path('m', 0, path));
}
