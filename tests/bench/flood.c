/* Sends prebuilt Ethernet frames as fast as it can, or at a pace. Built and started by flood.py.
 *
 *   flood --dev eth0 --frames FILE [--cpu N] [--seconds S] [--count N] [--pps N] [--batch N] [--stamp OFFSET]
 *
 * FILE ("-": stdin) holds frames, each behind its length (2 bytes, big-endian); after the last one the first
 * follows again. It ends after so many seconds or frames, whichever comes first, or at SIGTERM, and prints
 * {"packets": N, "seconds": S}: frames that the device took, and the time from the first to the last.
 *
 * --pps 0 (the default) is as fast as possible. With a pace, frames that are due go out at once, up to --batch
 * in one call; what a late wake-up has left behind is caught up. --stamp writes CLOCK_REALTIME in nanoseconds
 * (8 bytes, big-endian) at that offset of each frame just before the call that sends it; no checksum is mended.
 * The queueing discipline is passed by, so that nothing waits between this program and the device.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "frames.h"

#define LARGEST_BATCH 1024

static volatile sig_atomic_t ended;

static void end(int number) { (void)number, ended = 1; }

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static uint64_t wall_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    return at.tv_sec * 1000000000ull + at.tv_nsec;
}

/* How many frames may go now: all of a batch, or at a pace what is due; waits where nothing is. */
static unsigned due(double pps, double began, uint64_t sent, unsigned batch) {
    if (pps <= 0)
        return batch;
    double behind = (now() - began) * pps - sent;
    if (behind < 1) {
        double wait = (1 - behind) / pps;
        struct timespec pause = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
        nanosleep(&pause, NULL);
        return 0;
    }
    return behind < batch ? (unsigned)behind : batch;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"dev", 1, 0, 'd'}, {"frames", 1, 0, 'f'}, {"cpu", 1, 0, 'c'},   {"seconds", 1, 0, 's'}, {"count", 1, 0, 'n'},
        {"pps", 1, 0, 'p'}, {"batch", 1, 0, 'b'},  {"stamp", 1, 0, 't'}, {0, 0, 0, 0}};
    const char *device = NULL, *path = NULL;
    double seconds = 1e12, pps = 0;
    uint64_t count = UINT64_MAX, sent = 0;
    unsigned batch = 64;
    long stamp = -1;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (option) {
        case 'd': device = optarg; break;
        case 'f': path = optarg; break;
        case 'c': pin(atoi(optarg)); break;
        case 's': seconds = atof(optarg); break;
        case 'n': count = strtoull(optarg, NULL, 10); break;
        case 'p': pps = atof(optarg); break;
        case 'b': batch = atoi(optarg); break;
        case 't': stamp = atol(optarg); break;
        default: return 2;
        }
    if (!device || !path || batch < 1 || batch > LARGEST_BATCH) {
        fprintf(stderr, "flood: --dev and --frames are needed, and --batch of 1 to %d\n", LARGEST_BATCH);
        return 2;
    }
    size_t size;
    char *data = read_all(path, &size);
    struct frames frames = split(data, size);
    for (size_t place = 0; stamp >= 0 && place < frames.count; place++)
        if (stamp + 8 > frames.length[place]) {
            fprintf(stderr, "flood: a frame is too short for the stamp\n");
            return 1;
        }
    int out = open_device(device);
    signal(SIGTERM, end);
    signal(SIGINT, end);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    prctl(PR_SET_TIMERSLACK, 1L); /* a pace of some microseconds */

    static struct mmsghdr messages[LARGEST_BATCH];
    static struct iovec parts[LARGEST_BATCH];
    for (unsigned place = 0; place < LARGEST_BATCH; place++)
        messages[place].msg_hdr.msg_iov = &parts[place], messages[place].msg_hdr.msg_iovlen = 1;
    double began = now(), last = began;
    for (size_t next = 0; !ended && sent < count && last - began < seconds; last = now()) {
        unsigned many = due(pps, began, sent, batch);
        if (many > count - sent)
            many = count - sent;
        uint64_t at = htobe64(stamp >= 0 && many ? wall_ns() : 0);
        for (unsigned place = 0; place < many; place++) {
            size_t which = (next + place) % frames.count;
            if (stamp >= 0)
                memcpy(frames.start[which] + stamp, &at, sizeof at);
            parts[place] = (struct iovec){frames.start[which], frames.length[which]};
        }
        int took = many ? sendmmsg(out, messages, many, 0) : 0;
        if (took < 0) {
            if (errno != ENOBUFS && errno != EAGAIN && errno != EINTR) /* the device is full: again */
                fail("sendmmsg");
            continue;
        }
        sent += took;
        next = (next + took) % frames.count;
    }
    printf("{\"packets\": %llu, \"seconds\": %.6f}\n", (unsigned long long)sent, last - began);
    return 0;
}
