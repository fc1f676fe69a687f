/* Our C and C++ in terms of an old C library: included before all else in what lntune compiles, so
 * that it loads where glibc is 2.28 or newer, whatever the machine has that compiled it.
 *
 * glibc gives functions a new version when they move or change: since 2.34 those of libdl and
 * libpthread are in libc under new versions, and what is linked there asks for these. The old
 * versions are there still, and everywhere: 2.2.5 is the first of x86-64, 2.17 that of 64-bit Arm.
 * A process that has Python and PyTorch has libdl and libpthread, where these are files of their
 * own. (lntune/system/elf.py reads what a file asks for.)
 */
#ifndef LNTUNE_PORTABLE_H
#define LNTUNE_PORTABLE_H
#ifdef __linux__
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <features.h>
#ifdef __GLIBC__
#if defined(__x86_64__)
#define LNTUNE_FIRST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define LNTUNE_FIRST "GLIBC_2.17"
#endif
#endif
#ifdef LNTUNE_FIRST
#define LNTUNE_OLD(name) __asm__(".symver " #name "," #name "@" LNTUNE_FIRST)
LNTUNE_OLD(dladdr);
LNTUNE_OLD(dlclose);
LNTUNE_OLD(dlerror);
LNTUNE_OLD(dlopen);
LNTUNE_OLD(dlsym);
LNTUNE_OLD(pthread_create);
LNTUNE_OLD(pthread_detach);
LNTUNE_OLD(pthread_getspecific);
LNTUNE_OLD(pthread_join);
LNTUNE_OLD(pthread_key_create);
LNTUNE_OLD(pthread_key_delete);
LNTUNE_OLD(pthread_mutex_trylock);
LNTUNE_OLD(pthread_once);
LNTUNE_OLD(pthread_rwlock_rdlock);
LNTUNE_OLD(pthread_rwlock_unlock);
LNTUNE_OLD(pthread_rwlock_wrlock);
LNTUNE_OLD(pthread_setspecific);
LNTUNE_OLD(pthread_sigmask);
#ifdef __cplusplus
/* Headers of libstdc++ ask it whether there are other threads (since glibc 2.32). Ours says that
 * there are, so that counters are atomic.
 */
extern "C" {
extern char __libc_single_threaded __attribute__((visibility("hidden")));
char __libc_single_threaded = 0;
}
#endif
#endif
#endif
#endif
