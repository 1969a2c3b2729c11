/* A virtio console (VIRTIO 1.2, 5.3), one port: lines that the guest writes go to the audit log.
 *
 * What the guest reads is first the manifest's config, then an answer to every line: "N bytes" and a newline. Queue 0 is
 * the guest's to receive from, queue 1 to transmit into.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "vmgraft.h"

VMGRAFT_ABI_1()

enum { RECEIVE = 0, TRANSMIT = 1 };

static uint8_t input[4096]; /* waits to be read by the guest: from first, count bytes, all around */
static uint32_t first, count;
static uint8_t line[1024];
static uint32_t line_len;
static uint8_t piece[1024];

static void put(uint8_t byte) {
    if (count < sizeof input)
        input[(first + count++) % sizeof input] = byte;
}

static void put_number(uint32_t number) {
    uint8_t digits[10];
    uint32_t n = 0;
    do
        digits[n++] = (uint8_t)('0' + number % 10);
    while (number /= 10);
    while (n)
        put(digits[--n]);
}

static void end_line(void) {
    static const char words[] = " bytes\n";
    uint32_t i;
    vmgraft_log(line, line_len);
    put_number(line_len);
    for (i = 0; i < sizeof words - 1; i++)
        put((uint8_t)words[i]);
    line_len = 0;
    vmgraft_virtio_kick(RECEIVE);
}

static int32_t transmit(uint32_t len) {
    uint32_t at = 0, n, i;
    while (at < len && (n = vmgraft_get_buffer(at, piece, sizeof piece)) != 0) {
        for (i = 0; i < n; i++) {
            if (piece[i] != '\n')
                line[line_len++] = piece[i];
            if (piece[i] == '\n' || line_len == sizeof line)
                end_line();
        }
        at += n;
    }
    return 0;
}

static int32_t receive(uint32_t room) {
    uint32_t n = count < room ? count : room, i;
    if (n > sizeof piece)
        n = sizeof piece;
    if (n == 0)
        return VMGRAFT_LATER; /* the buffer stays in the queue until there is something */
    for (i = 0; i < n; i++)
        piece[i] = input[(first + i) % sizeof input];
    first = (first + n) % sizeof input;
    count -= n;
    vmgraft_set_buffer(piece, n);
    return (int32_t)n;
}

int32_t on_virtio_queue(uint32_t queue, uint32_t out_len, uint32_t in_len) {
    return queue == RECEIVE ? receive(in_len) : transmit(out_len);
}

void on_virtio_status(uint32_t status, uint64_t features) {
    uint32_t n;
    (void)features;
    if (status == 0) {
        first = count = line_len = 0;
        return;
    }
    if (status & VMGRAFT_NEEDS_RESET)
        return;
    n = vmgraft_config_read(input, sizeof input, 0);
    first = 0;
    count = n;
}
