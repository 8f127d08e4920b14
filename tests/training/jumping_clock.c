/* Preloaded, it sets the clock of the day back and forth by CLOCK_JUMP seconds, four times each CLOCK_PERIOD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        struct timespec since_boot;
        real(CLOCK_MONOTONIC, &since_boot);
        double seconds = since_boot.tv_sec + since_boot.tv_nsec * 1e-9;
        long quarter = (long)(4 * seconds / atof(getenv("CLOCK_PERIOD")));
        now->tv_sec += (long[]){0, 1, 0, -1}[quarter % 4] * atol(getenv("CLOCK_JUMP"));
    }
    return status;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec found;
    int status = clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return status;
}

time_t time(time_t *now)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}
