/* Frames from a file, and the device that they go out of: what the generators of this folder share. */
#include <linux/if_packet.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct frames {
    char **start;
    uint16_t *length;
    size_t count;
};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static char *read_all(const char *path, size_t *size) {
    FILE *file = strcmp(path, "-") ? fopen(path, "r") : stdin;
    if (!file)
        fail(path);
    size_t room = 1 << 20, used = 0, got;
    char *data = malloc(room);
    while (data && (got = fread(data + used, 1, room - used, file)) > 0)
        if ((used += got) == room)
            data = realloc(data, room *= 2);
    if (!data || ferror(file))
        fail(path);
    *size = used;
    return data;
}

static struct frames split(char *data, size_t size) {
    struct frames found = {malloc((size / 2 + 1) * sizeof(char *)), malloc(size + 2), 0};
    if (!found.start || !found.length)
        fail("memory");
    for (size_t at = 0; at + 2 <= size;) {
        uint16_t length = (uint8_t)data[at] << 8 | (uint8_t)data[at + 1];
        if (!length || at + 2 + length > size) {
            fprintf(stderr, "a frame of %u bytes at %zu is cut off or empty\n", length, at);
            exit(1);
        }
        found.start[found.count] = data + at + 2;
        found.length[found.count++] = length;
        at += 2 + length;
    }
    if (!found.count) {
        fprintf(stderr, "no frames\n");
        exit(1);
    }
    return found;
}

static int open_device(const char *name) {
    int out = socket(AF_PACKET, SOCK_RAW, 0), yes = 1;
    struct sockaddr_ll place = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(name)};
    if (out < 0 || !place.sll_ifindex || bind(out, (struct sockaddr *)&place, sizeof place))
        fail(name);
    if (setsockopt(out, SOL_PACKET, PACKET_QDISC_BYPASS, &yes, sizeof yes))
        fail("PACKET_QDISC_BYPASS");
    return out;
}

static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("--cpu");
}
