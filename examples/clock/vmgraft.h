/* vmgraft.h - extension ABI vmgraft/1 for C. Reference: docs/extensions.md.
 *
 * Build with clang --target=wasm32 (see the Makefile beside this file); no libc is needed.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef VMGRAFT_H
#define VMGRAFT_H

#include <stdint.h>

#define VMGRAFT_EXPORT(name) __attribute__((export_name(#name)))
#define VMGRAFT_IMPORT(name) __attribute__((import_module("vmgraft"), import_name(#name)))

/* Place once in one source file: marks the module as written for ABI 1. */
#define VMGRAFT_ABI_1() \
    VMGRAFT_EXPORT(vmgraft_abi_1) void vmgraft_abi_1(void) {}

/* Events of on_event(). */
enum { VMGRAFT_BOOT = 0, VMGRAFT_RESET = 1, VMGRAFT_SHUTDOWN = 2 };

/* What on_start() and the write hooks return. */
enum { VMGRAFT_OK = 0, VMGRAFT_REFUSED = 1 };

/* Imports. Import only what you call: each needs the capability named beside it. */

/* Copies at most len bytes of the manifest's config, from offset on; returns how many. No capability. */
VMGRAFT_IMPORT(config_read) uint32_t vmgraft_config_read(void *buffer, uint32_t len, uint32_t offset);
/* One line of UTF-8 text into the audit log. Capability: log. */
VMGRAFT_IMPORT(log) void vmgraft_log(const void *text, uint32_t len);
/* Nanoseconds of the guest's virtual time since boot, constant during one call. Capability: now. */
VMGRAFT_IMPORT(now) uint64_t vmgraft_now(void);
/* Fills the buffer with unpredictable bytes. Capability: random. */
VMGRAFT_IMPORT(random) void vmgraft_random(void *buffer, uint32_t len);
/* Asks for on_tick() about every ns nanoseconds of virtual time; 0 turns it off. Capability: tick. */
VMGRAFT_IMPORT(set_tick) void vmgraft_set_tick(uint64_t ns);
/* Asks the host to stop the guest once this call has returned. Capability: stop. */
VMGRAFT_IMPORT(stop) void vmgraft_stop(void);
/* Copy between guest RAM and the module, inside a granted window; 0 on success.
 * Capability: guest:ADDRESS+SIZE:r, or :rw for writing. */
VMGRAFT_IMPORT(guest_read) int32_t vmgraft_guest_read(uint64_t gpa, void *buffer, uint32_t len);
VMGRAFT_IMPORT(guest_write) int32_t vmgraft_guest_write(uint64_t gpa, const void *buffer, uint32_t len);

/* Exports; each is optional. Ports and addresses are absolute; size is 1, 2 or 4 (8 for MMIO too). */
VMGRAFT_EXPORT(on_start) int32_t on_start(uint32_t config_len);
VMGRAFT_EXPORT(on_pio_read) uint64_t on_pio_read(uint32_t port, uint32_t size);
VMGRAFT_EXPORT(on_pio_write) int32_t on_pio_write(uint32_t port, uint32_t size, uint32_t value);
VMGRAFT_EXPORT(on_mmio_read) uint64_t on_mmio_read(uint64_t gpa, uint32_t size);
VMGRAFT_EXPORT(on_mmio_write) int32_t on_mmio_write(uint64_t gpa, uint32_t size, uint64_t value);
VMGRAFT_EXPORT(on_hypercall) uint64_t on_hypercall(uint32_t number, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3);
VMGRAFT_EXPORT(on_tick) void on_tick(uint64_t now_ns);
VMGRAFT_EXPORT(on_event) void on_event(uint32_t event);

#endif
