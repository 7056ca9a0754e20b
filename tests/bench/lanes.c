/* Sends frames down several lanes in turns, and tells how fast each was. Built and started by lanes.py.
 *
 *   lanes --rounds N --slice SECONDS [--cpu N] NETNS:DEVICE:FILE …
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

struct lane {
    int out;
    struct frames frames;
    size_t next;
};

static struct lane open_lane(char *name) {
    char *device = strchr(name, ':'), *file = device ? strchr(device + 1, ':') : NULL, path[256];
    if (!file) {
        fprintf(stderr, "lanes: %s is no NETNS:DEVICE:FILE\n", name);
        exit(2);
    }
    *device++ = *file++ = 0;
    size_t size;
    char *data = read_all(file, &size);
    struct lane lane = {-1, split(data, size), 0};
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int there = open(path, O_RDONLY | O_CLOEXEC);
    if (there < 0 || setns(there, CLONE_NEWNET))
        fail(path);
    close(there);
    lane.out = open_device(device);
    return lane;
}

/* Sends for so many seconds, each frame in its turn; gives how many went out, and the seconds that it took. */
static uint64_t send_for(struct lane *lane, double seconds, double *took) {
    static struct mmsghdr messages[BATCH];
    static struct iovec parts[BATCH];
    uint64_t sent = 0;
    double began = cpu_seconds(), now = began;
    for (; now - began < seconds; now = cpu_seconds()) {
        for (unsigned place = 0; place < BATCH; place++) {
            size_t which = (lane->next + place) % lane->frames.count;
            parts[place] = (struct iovec){lane->frames.start[which], lane->frames.length[which]};
            messages[place].msg_hdr.msg_iov = &parts[place], messages[place].msg_hdr.msg_iovlen = 1;
        }
        int went = sendmmsg(lane->out, messages, BATCH, 0);
        if (went < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EINTR)
            fail("sendmmsg");
        if (went > 0)
            sent += went, lane->next = (lane->next + went) % lane->frames.count;
    }
    *took = now - began;
    return sent;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"rounds", 1, 0, 'r'}, {"slice", 1, 0, 's'}, {"cpu", 1, 0, 'c'}, {0, 0, 0, 0}};
    int rounds = 1;
    double slice = 0.01;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (option) {
        case 'r': rounds = atoi(optarg); break;
        case 's': slice = atof(optarg); break;
        case 'c': pin(atoi(optarg)); break;
        default: return 2;
        }
    int many = argc - optind;
    if (many < 1 || many > MOST) {
        fprintf(stderr, "lanes: 1 to %d lanes are needed\n", MOST);
        return 2;
    }
    struct lane lanes[MOST];
    for (int place = 0; place < many; place++)
        lanes[place] = open_lane(argv[optind + place]);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    /* Nobody else's turn falls into a slice; ksoftirqd, which would do our work on its own time, does not either. */
    struct sched_param first = {.sched_priority = PRIORITY};
    if (sched_setscheduler(0, SCHED_FIFO, &first))
        fail("SCHED_FIFO");
    for (int round = 0; round < rounds; round++)
        for (int turn = 0; turn < many; turn++) {
            int place = round % 2 ? many - 1 - turn : turn;
            double took;
            send_for(&lanes[place], slice / 5, &took); /* its caches are warm again */
            uint64_t sent = send_for(&lanes[place], slice, &took);
            printf("{\"lane\": %d, \"packets\": %llu, \"seconds\": %.9f}\n", place, (unsigned long long)sent, took);
        }
    return 0;
}
