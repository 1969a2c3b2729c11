/* Another time of day for one image: the host's real-time clock, moved by a number of seconds.
 *
 * The manifest's config gives it: "seconds=-3600". The guest sees it wherever it looks at the clock: CMOS registers and
 * INT 1Ah. The number of looks is reported as a metric, and kept when a newer version takes over on a running guest.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "vmgraft.h"

VMGRAFT_ABI_1()

static int64_t shift;
static uint64_t looks;

int32_t on_start(uint32_t config_len) {
    static const char key[] = "seconds=";
    char text[32];
    uint32_t n = vmgraft_config_read(text, sizeof text, 0), i;
    int64_t value = 0;
    int negative = 0;
    if (config_len > sizeof text || n < sizeof key)
        return VMGRAFT_REFUSED;
    for (i = 0; i < sizeof key - 1; i++)
        if (text[i] != key[i])
            return VMGRAFT_REFUSED;
    if (text[i] == '-')
        negative = 1, i++;
    for (; i < n; i++) {
        if (text[i] < '0' || text[i] > '9' || value > 10000000000ll)
            return VMGRAFT_REFUSED;
        value = value * 10 + (text[i] - '0');
    }
    shift = negative ? -value : value;
    return VMGRAFT_OK;
}

int64_t on_service(uint32_t service, uint64_t a0, uint64_t a1) {
    static const char name[] = "looks";
    int64_t shown = (int64_t)a0 + shift;
    (void)a1;
    if (service != VMGRAFT_RTC || shown < 0 || shown >= 32503680000ll)
        return VMGRAFT_PASS; /* the clock goes from 1970 to 2999 */
    looks++;
    vmgraft_metric(name, sizeof name - 1, (int64_t)looks);
    return shown;
}

int32_t on_snapshot(void) {
    vmgraft_set_buffer(&looks, sizeof looks);
    return sizeof looks;
}

int32_t on_restore(uint32_t len) {
    return vmgraft_get_buffer(0, &looks, sizeof looks) == len ? VMGRAFT_OK : VMGRAFT_REFUSED;
}
