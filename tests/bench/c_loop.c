/* The least that a reader of a queue can do: accepts each packet, with a mark. What portward's worker is measured
 * against, so it is as libnetfilter_queue's own example: one recv and one verdict for each packet.
 *
 *   c_loop QUEUE LENGTH       prints "ready" when the queue is bound; runs until it is killed
 */
#include <arpa/inet.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#define COPY 512         /* bytes of each packet, as the worker asks for */
#define RECEIVE (8 << 20) /* bytes of messages that may wait, as with the worker */
#define UNKNOWN 5        /* our class of an unknown source, epoch 0 */

static int answer(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *packet, void *nothing) {
    (void)message, (void)nothing;
    uint32_t id = ntohl(nfq_get_msg_packet_hdr(packet)->packet_id);
    uint32_t mark = (nfq_get_nfmark(packet) & 0xffff0000) | UNKNOWN;
    return nfq_set_verdict2(queue, id, NF_ACCEPT, mark, 0, NULL);
}

int main(int argc, char **argv) {
    char buffer[65536] __attribute__((aligned));
    if (argc != 3)
        return 2;
    struct nfq_handle *handle = nfq_open();
    struct nfq_q_handle *queue = handle ? nfq_create_queue(handle, atoi(argv[1]), answer, NULL) : NULL;
    int size = RECEIVE;
    if (!queue || nfq_set_queue_maxlen(queue, atoi(argv[2])) || nfq_set_mode(queue, NFQNL_COPY_PACKET, COPY) < 0 ||
        setsockopt(nfq_fd(handle), SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size)) {
        perror("c_loop");
        return 1;
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        int got = recv(nfq_fd(handle), buffer, sizeof buffer, 0);
        if (got > 0) /* ENOBUFS: the kernel has dropped some, and goes on */
            nfq_handle_packet(handle, buffer, got);
    }
}
