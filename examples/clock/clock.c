/* A paravirtual clock: the guest's virtual time by port and by hypercall.
 *
 * Port 0x510 (32 bits): low half of the nanoseconds since boot; reading it latches the whole value.
 * Port 0x514 (32 bits): high half of the latched value. Narrower reads give the bytes at that port.
 * Hypercall 16: nanoseconds since boot. Hypercall 17: seconds since 1970-01-01 UTC, counted from the
 * epoch at boot that the manifest's config gives ("epoch=SECONDS").
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "vmgraft.h"

VMGRAFT_ABI_1()

#define BASE 0x510u
#define NS_PER_S 1000000000ull
#define ALL_ONES 0xffffffffffffffffull

static uint64_t latched;
static uint64_t epoch;

static void read_config(uint32_t len) {
    static const char key[] = "epoch=";
    char text[32];
    uint32_t n = vmgraft_config_read(text, sizeof text, 0), i;
    if (len > sizeof text || n < sizeof key)
        return;
    for (i = 0; i < sizeof key - 1; i++)
        if (text[i] != key[i])
            return;
    for (; i < n && text[i] >= '0' && text[i] <= '9'; i++)
        epoch = epoch * 10 + (uint64_t)(text[i] - '0');
}

int32_t on_start(uint32_t config_len) {
    static const char ready[] = "clock ready";
    read_config(config_len);
    vmgraft_log(ready, sizeof ready - 1);
    return VMGRAFT_OK;
}

uint64_t on_pio_read(uint32_t port, uint32_t size) {
    uint32_t offset = port - BASE;
    (void)size; /* the host cuts the result down to the size of the access */
    if (offset == 0)
        latched = vmgraft_now();
    return latched >> (8 * offset);
}

uint64_t on_hypercall(uint32_t number, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
    (void)a0, (void)a1, (void)a2, (void)a3;
    if (number == 16)
        return vmgraft_now();
    if (number == 17)
        return epoch + vmgraft_now() / NS_PER_S;
    return ALL_ONES;
}
