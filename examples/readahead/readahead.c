/* Reading ahead for one image: the order in which its boot reads the disk, recorded once, told to the host in advance.
 *
 * The manifest's config is that order: "FIRST+COUNT" pairs in blocks of 64 KiB, hexadecimal, with spaces between. While the
 * guest reads the drive that it booted from, the host is asked to fetch what comes next, up to AHEAD blocks further on.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "vmgraft.h"

VMGRAFT_ABI_1()

#define BLOCK_SHIFT 7 /* sectors of 512 bytes in a block of 64 KiB, as a power of two */
#define AHEAD 64u     /* blocks; the host's cache has room for 256 */
#define RANGES 512u
#define HINTS 8u

static struct {
    uint32_t first, count;
} order[RANGES];
static uint32_t ranges;
static uint32_t here; /* the range that the guest was last seen in */
static uint32_t told, told_blocks; /* how far the host was told: whole ranges, and blocks of the one after */
static uint64_t hints[HINTS][2];
static uint64_t asked;

static char text[4096];

static uint32_t number(uint32_t *at, uint32_t end) {
    uint32_t value = 0;
    for (; *at < end; (*at)++) {
        char c = text[*at];
        if (c >= '0' && c <= '9')
            value = value << 4 | (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            value = value << 4 | (uint32_t)(c - 'a' + 10);
        else
            break;
    }
    return value;
}

int32_t on_start(uint32_t config_len) {
    uint32_t at = 0, end = vmgraft_config_read(text, sizeof text, 0);
    (void)config_len;
    while (at < end && ranges < RANGES) {
        uint32_t before = at;
        order[ranges].first = number(&at, end);
        if (at == before || at >= end || text[at++] != '+')
            return VMGRAFT_REFUSED;
        before = at;
        order[ranges].count = number(&at, end);
        if (at == before || order[ranges++].count == 0)
            return VMGRAFT_REFUSED;
        while (at < end && (text[at] == ' ' || text[at] == '\n'))
            at++;
    }
    return ranges && at >= end ? VMGRAFT_OK : VMGRAFT_REFUSED;
}

/* Finds the block from where the guest was last seen, so that a block that is read twice is met in its order. */
static int find(uint32_t block) {
    uint32_t i, n;
    for (i = 0, n = here; i < ranges; i++, n = n + 1 < ranges ? n + 1 : 0)
        if (block >= order[n].first && block - order[n].first < order[n].count) {
            here = n;
            return 1;
        }
    return 0;
}

/* Blocks from the one that is read to the end of what the host was told. */
static uint32_t ahead(uint32_t block) {
    uint32_t sum = 0, n;
    if (told < here || (told == here && told_blocks <= block - order[here].first)) {
        told = here; /* the guest is further on: the block itself is being read */
        told_blocks = block - order[here].first + 1;
    }
    for (n = here; n < told; n++)
        sum += order[n].count;
    return sum + told_blocks - (block - order[here].first);
}

int64_t on_service(uint32_t service, uint64_t a0, uint64_t a1) {
    static const char name[] = "asked";
    uint32_t block = (uint32_t)(a0 >> BLOCK_SHIFT), n = 0, left;
    if (service != VMGRAFT_DISK || (a1 & VMGRAFT_DISK_WRITE) || a1 >> 40 || a0 >> 39 || !find(block))
        return VMGRAFT_PASS;
    left = ahead(block);
    if (left > AHEAD / 2)
        return VMGRAFT_PASS; /* enough for now: few large hints, not many small ones */
    for (left = AHEAD - left; left && n < HINTS && told < ranges;) {
        uint32_t count = order[told].count - told_blocks;
        if (count > left)
            count = left;
        if (count) {
            hints[n][0] = (uint64_t)(order[told].first + told_blocks) << BLOCK_SHIFT;
            hints[n++][1] = (uint64_t)count << BLOCK_SHIFT;
            asked += count;
        }
        left -= count;
        told_blocks += count;
        if (told_blocks == order[told].count)
            told++, told_blocks = 0;
    }
    if (!n)
        return VMGRAFT_PASS;
    vmgraft_metric(name, sizeof name - 1, (int64_t)asked);
    vmgraft_set_buffer(hints, n * sizeof hints[0]);
    return 0;
}
