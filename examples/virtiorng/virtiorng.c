/* A virtio entropy device (VIRTIO 1.2, 5.4): every buffer that the driver offers is filled with random bytes.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "vmgraft.h"

VMGRAFT_ABI_1()

static uint8_t bytes[4096];

int32_t on_virtio_queue(uint32_t queue, uint32_t out_len, uint32_t in_len) {
    uint32_t len = in_len < sizeof bytes ? in_len : sizeof bytes;
    (void)queue, (void)out_len;
    vmgraft_random(bytes, len);
    vmgraft_set_buffer(bytes, len);
    return (int32_t)len;
}
