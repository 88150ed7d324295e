#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "pidfd.h"
#include "reaper.h"
#include "sigchld.h"
#include "pids.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

/* Returns the place of `pid`, or where it would have to be. */
static int place_of(const ap_pids *pids, int pid)
{
    int low = 0, high = pids->count;

    while (low < high) {
        int middle = low + (high - low) / 2;
        if (pids->keys[middle] >> 1 < pid)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int is_at(const ap_pids *pids, int place, int pid)
{
    return place < pids->count && pids->keys[place] >> 1 == pid;
}

static void remove_at(ap_pids *pids, int place)
{
    pids->count--;
    memmove(pids->keys + place, pids->keys + place + 1, (size_t)(pids->count - place) * sizeof *pids->keys);
}

int ap_pids_add(ap_pids *pids, int pid, int peek)
{
    int place = place_of(pids, pid);

    if (!is_at(pids, place, pid)) {
        if (pids->count == pids->capacity) {
            int capacity = pids->capacity > 0 ? 2 * pids->capacity : 64;
            int *keys = realloc(pids->keys, (size_t)capacity * sizeof *keys);
            if (keys == NULL)
                return -ENOMEM;
            pids->keys = keys;
            pids->capacity = capacity;
        }
        if (pids->count == 0)
            pids->names_seen = ap_sigchld_count_names(); /* signals of before are not about these children */
        memmove(pids->keys + place + 1, pids->keys + place, (size_t)(pids->count - place) * sizeof *pids->keys);
        pids->count++;
    }
    pids->keys[place] = pid << 1 | (peek != 0);
    return 0;
}

int ap_pids_remove(ap_pids *pids, int pid)
{
    int place = place_of(pids, pid);

    if (!is_at(pids, place, pid))
        return 0;
    remove_at(pids, place);
    return 1;
}

void ap_pids_clear(ap_pids *pids)
{
    free(pids->keys);
    *pids = (ap_pids){0};
}

/* Asks for the child at `place`; returns whether it has ended, and then is in the batch and no longer in `pids`. */
static int reap_at(ap_pids *pids, int place, ap_batch *batch)
{
    int pid = pids->keys[place] >> 1, peek = pids->keys[place] & 1;
    ap_exit *ended = &batch->exits[batch->count];
    int found = ap_waitid(P_PID, pid, WEXITED | WNOHANG | (peek ? WNOWAIT : 0), ended);

    if (found == 0)
        return 0;
    if (found < 0) { /* -ECHILD: other code has reaped it */
        ended->status = 0;
        ended->source = AP_SOURCE_LOST;
    }
    ended->pid = pid;
    ended->pidfd = -1;
    batch->count++;
    remove_at(pids, place);
    return 1;
}

int ap_pids_reap_named(ap_pids *pids, ap_batch *batch)
{
    int name;

    while (batch->count < AP_BATCH && ap_sigchld_next_name(&pids->names_seen, &name)) {
        int place = place_of(pids, name);
        int is_reaped = is_at(pids, place, name) && reap_at(pids, place, batch);

        if (name == AP_NAME_UNKNOWN || (is_reaped && batch->exits[batch->count - 1].source == AP_SOURCE_LOST))
            pids->doubt |= AP_DOUBT_NOW | AP_DOUBT_ALL;
        else
            pids->doubt |= is_reaped ? AP_DOUBT_NOW : AP_DOUBT_LATER;
    }
    return batch->count;
}

int ap_pids_reap_first(ap_pids *pids, ap_batch *batch)
{
    while (batch->count < AP_BATCH && pids->count > 0) {
        ap_exit seen;
        int place;

        if (ap_waitid(P_ALL, 0, WEXITED | WNOHANG | WNOWAIT, &seen) <= 0)
            break;
        place = place_of(pids, seen.pid);
        if (!is_at(pids, place, seen.pid) || !reap_at(pids, place, batch)) {
            pids->doubt |= AP_DOUBT_ALL;
            break;
        }
    }
    return batch->count;
}

int ap_pids_reap_all(ap_pids *pids, ap_batch *batch)
{
    int place = 0;

    while (batch->count < AP_BATCH && place < pids->count)
        if (!reap_at(pids, place, batch))
            place++;
    return batch->count;
}
