/* A device of one port: every 32-bit read of 0x518 gives the number of reads so far, a write sets it. */
#include "vmgraft.h"

VMGRAFT_ABI_1()

static uint32_t count;

int32_t on_start(uint32_t config_len) {
    static const char ready[] = "counter ready";
    (void)config_len;
    vmgraft_log(ready, sizeof ready - 1);
    return VMGRAFT_OK;
}

uint64_t on_pio_read(uint32_t port, uint32_t size) {
    (void)port, (void)size; /* the host cuts the result down to the size of the access */
    return ++count;
}

int32_t on_pio_write(uint32_t port, uint32_t size, uint32_t value) {
    (void)port, (void)size;
    count = value;
    return VMGRAFT_OK;
}
