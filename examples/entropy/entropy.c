/* A paravirtual entropy source: one page of registers at guest-physical 0xd0000.
 *
 * 0x00  ID      reads 0x4e454756 ("VGEN")
 * 0x04  STATUS  bit 0: ready
 * 0x08  COUNT   random bytes handed out so far (64 bits)
 * 0x10  DATA    every read gives fresh random bytes of the size of the access
 * Everything else reads zero; writes are refused.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "vmgraft.h"

VMGRAFT_ABI_1()

#define BASE 0xd0000u
#define ID 0x4e454756u
#define READY 1u

static uint64_t handed_out;

static uint64_t data(uint32_t size) {
    uint64_t word = 0;
    vmgraft_random(&word, size <= sizeof word ? size : sizeof word);
    handed_out += size;
    return word;
}

uint64_t on_mmio_read(uint64_t gpa, uint32_t size) {
    switch ((uint32_t)gpa - BASE) {
    case 0x00: return ID;
    case 0x04: return READY;
    case 0x08: return handed_out;
    case 0x0c: return handed_out >> 32;
    case 0x10: return data(size);
    default: return 0;
    }
}

int32_t on_mmio_write(uint64_t gpa, uint32_t size, uint64_t value) {
    (void)gpa, (void)size, (void)value;
    return VMGRAFT_REFUSED;
}
