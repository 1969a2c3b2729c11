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

/* Services of on_service(), and what it returns to leave the answer to whoever is next. */
enum {
    VMGRAFT_RTC = 1,
    VMGRAFT_CONSOLE = 2,
    VMGRAFT_ENTROPY = 3,
    VMGRAFT_TIME = 4,
    VMGRAFT_DISK = 5,
    VMGRAFT_CPUID = 6,
    VMGRAFT_HYPERCALL = 7
};
#define VMGRAFT_PASS ((int64_t)-1)
/* In the second argument of VMGRAFT_DISK: the access is a write; the rest is the count, and the drive from bit 40 on. */
#define VMGRAFT_DISK_WRITE (1ull << 32)

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
/* The data of the call that runs: copies at most len bytes from offset on, returns how many. No capability. */
VMGRAFT_IMPORT(get_buffer) uint32_t vmgraft_get_buffer(uint32_t offset, void *buffer, uint32_t len);
/* What the call that runs answers with, in on_service() and on_snapshot(). No capability. */
VMGRAFT_IMPORT(set_buffer) void vmgraft_set_buffer(const void *buffer, uint32_t len);
/* Raises (level 1) or lowers (0) an interrupt line of the guest. Capability: irq:LINE. */
VMGRAFT_IMPORT(irq) void vmgraft_irq(uint32_t line, uint32_t level);
/* Values kept by the host for this run, also when the module is started anew. Keys of 1 to 64 bytes, values of at most
 * 4000. kv_get copies at most len bytes and returns the value's length, or -1; kv_put returns 0, or -1 where there is no
 * room, and forgets the key when len is 0. Capability: kv. */
VMGRAFT_IMPORT(kv_get) int32_t vmgraft_kv_get(const void *key, uint32_t key_len, void *buffer, uint32_t len);
VMGRAFT_IMPORT(kv_put) int32_t vmgraft_kv_put(const void *key, uint32_t key_len, const void *value, uint32_t len);
/* Reports a number under a name of 1 to 64 bytes; the last one is shown with the run. Capability: metric. */
VMGRAFT_IMPORT(metric) void vmgraft_metric(const void *name, uint32_t len, int64_t value);
/* Looks at a queue of the virtio device again when the call is over: there is something for a request left for later.
 * Needs the manifest's virtio table. */
VMGRAFT_IMPORT(virtio_kick) void vmgraft_virtio_kick(uint32_t queue);

/* Exports; each is optional. Ports and addresses are absolute; size is 1, 2 or 4 (8 for MMIO too). */
VMGRAFT_EXPORT(on_start) int32_t on_start(uint32_t config_len);
VMGRAFT_EXPORT(on_pio_read) uint64_t on_pio_read(uint32_t port, uint32_t size);
VMGRAFT_EXPORT(on_pio_write) int32_t on_pio_write(uint32_t port, uint32_t size, uint32_t value);
VMGRAFT_EXPORT(on_mmio_read) uint64_t on_mmio_read(uint64_t gpa, uint32_t size);
VMGRAFT_EXPORT(on_mmio_write) int32_t on_mmio_write(uint64_t gpa, uint32_t size, uint64_t value);
VMGRAFT_EXPORT(on_hypercall) uint64_t on_hypercall(uint32_t number, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3);
VMGRAFT_EXPORT(on_tick) void on_tick(uint64_t now_ns);
VMGRAFT_EXPORT(on_event) void on_event(uint32_t event);
VMGRAFT_EXPORT(on_service) int64_t on_service(uint32_t service, uint64_t a0, uint64_t a1);
VMGRAFT_EXPORT(on_snapshot) int32_t on_snapshot(void);
VMGRAFT_EXPORT(on_restore) int32_t on_restore(uint32_t len);

/* A virtio device: the manifest's virtio table, docs/virtio.md. on_virtio_queue() serves one request: out_len bytes from
 * the driver, by get_buffer(); at most in_len bytes to it, by set_buffer(); it returns how many, or VMGRAFT_LATER to leave
 * the request in its queue. on_virtio_status() learns of a reset (0), of a driver that is ready with the features it
 * accepted, and of one that broke a rule. */
#define VMGRAFT_LATER (-1)
enum { VMGRAFT_DRIVER_OK = 4, VMGRAFT_NEEDS_RESET = 64 };
VMGRAFT_EXPORT(on_virtio_queue) int32_t on_virtio_queue(uint32_t queue, uint32_t out_len, uint32_t in_len);
VMGRAFT_EXPORT(on_virtio_config_read) uint64_t on_virtio_config_read(uint32_t offset, uint32_t size);
VMGRAFT_EXPORT(on_virtio_config_write) void on_virtio_config_write(uint32_t offset, uint32_t size, uint64_t value);
VMGRAFT_EXPORT(on_virtio_status) void on_virtio_status(uint32_t status, uint64_t features);

#endif
