/* Sends the same frames down several lanes in turns, and tells how fast each was. Built and started by lanes.py.
 *
 *   lanes --frames FILE --rounds N --slice SECONDS [--cpu N] NETNS:DEVICE …
 *
 * In each round each lane has its slice, in the one order and then in the other, so that whatever slows the machine
 * down for a while slows all of them. The time is that of this thread on its processor, and in it is the whole way of
 * a packet: what a veth pair hands over is received, filtered and forwarded on the sender's processor, before the call
 * that sent it returns. So what else runs on the machine costs caches, and no time of ours. A line for each slice:
 * {"lane": N, "packets": N, "seconds": S}.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sys/prctl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "frames.h"

#define BATCH 64
#define MOST 32
#define PRIORITY 10

static double cpu_seconds(void) {
    struct timespec at;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static int open_lane(char *name) {
    char *device = strchr(name, ':'), path[256];
    if (!device) {
        fprintf(stderr, "lanes: %s is no NETNS:DEVICE\n", name);
        exit(2);
    }
    *device++ = 0;
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int there = open(path, O_RDONLY | O_CLOEXEC);
    if (there < 0 || setns(there, CLONE_NEWNET))
        fail(path);
    close(there);
    return open_device(device);
}

/* Sends for so many seconds from frame `next` on; gives how many went out, and the seconds that it took. */
static uint64_t send_for(int out, const struct frames *frames, size_t *next, double seconds, double *took) {
    static struct mmsghdr messages[BATCH];
    static struct iovec parts[BATCH];
    uint64_t sent = 0;
    double began = cpu_seconds(), now = began;
    for (; now - began < seconds; now = cpu_seconds()) {
        for (unsigned place = 0; place < BATCH; place++) {
            size_t which = (*next + place) % frames->count;
            parts[place] = (struct iovec){frames->start[which], frames->length[which]};
            messages[place].msg_hdr.msg_iov = &parts[place], messages[place].msg_hdr.msg_iovlen = 1;
        }
        int went = sendmmsg(out, messages, BATCH, 0);
        if (went < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EINTR)
            fail("sendmmsg");
        if (went > 0)
            sent += went, *next = (*next + went) % frames->count;
    }
    *took = now - began;
    return sent;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"frames", 1, 0, 'f'}, {"rounds", 1, 0, 'r'}, {"slice", 1, 0, 's'}, {"cpu", 1, 0, 'c'}, {0, 0, 0, 0}};
    const char *path = NULL;
    int rounds = 1, outs[MOST];
    double slice = 0.01;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (option) {
        case 'f': path = optarg; break;
        case 'r': rounds = atoi(optarg); break;
        case 's': slice = atof(optarg); break;
        case 'c': pin(atoi(optarg)); break;
        default: return 2;
        }
    int lanes = argc - optind;
    if (!path || lanes < 1 || lanes > MOST) {
        fprintf(stderr, "lanes: --frames and 1 to %d lanes are needed\n", MOST);
        return 2;
    }
    size_t size, next[MOST] = {0};
    char *data = read_all(path, &size);
    struct frames frames = split(data, size);
    for (int lane = 0; lane < lanes; lane++)
        outs[lane] = open_lane(argv[optind + lane]);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    /* Nobody else's turn falls into a slice; ksoftirqd, which would do our work on its own time, does not either. */
    struct sched_param first = {.sched_priority = PRIORITY};
    if (sched_setscheduler(0, SCHED_FIFO, &first))
        fail("SCHED_FIFO");
    for (int round = 0; round < rounds; round++)
        for (int turn = 0; turn < lanes; turn++) {
            int lane = round % 2 ? lanes - 1 - turn : turn;
            double took;
            send_for(outs[lane], &frames, &next[lane], slice / 5, &took); /* its caches are warm again */
            uint64_t sent = send_for(outs[lane], &frames, &next[lane], slice, &took);
            printf("{\"lane\": %d, \"packets\": %llu, \"seconds\": %.9f}\n", lane, (unsigned long long)sent, took);
        }
    return 0;
}
