"""The interrupt controllers and the timer of the software CPU: what KVM keeps in the kernel.

Two cascaded 8259A (Intel 231468, fixed priorities; lines triggered by level where the ELCR of Intel's 82371SB says so,
else by edge) and an 8254 (Intel 231164) driven by virtual time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

#: Input clock of a PC's timer in Hz: 14.31818 MHz / 12.
PIT_HZ: Final = 1_193_182
TIMER_LINE: Final = 0
CASCADE_LINE: Final = 2


class _Pic:
    """One 8259A."""

    def __init__(self, vector_base: int) -> None:
        self.base = vector_base
        self.mask = 0xFF
        self.requested = 0
        self.in_service = 0
        self.level_triggered = 0
        self._lines = 0
        self._init_step = 0
        self._read_isr = False
        self._auto_eoi = self._need_icw4 = False

    def line(self, line: int, level: bool) -> None:
        bit = 1 << line
        if level and not self._lines & bit:
            self.requested |= bit
        self._lines = self._lines | bit if level else self._lines & ~bit
        if self.level_triggered & bit:
            self._follow()

    def _follow(self) -> None:
        """Request what level-triggered lines ask for, as long as they do."""
        self.requested = self.requested & ~self.level_triggered | self._lines & self.level_triggered

    def trigger_by_level(self, lines: int) -> None:
        self.level_triggered = lines
        self._follow()

    def ready(self) -> int | None:
        """Return the highest-priority line that may interrupt now."""
        waiting = self.requested & ~self.mask
        for line in range(8):
            if self.in_service >> line & 1:
                return None
            if waiting >> line & 1:
                return line
        return None

    def acknowledge(self, line: int) -> int:
        self.requested &= ~(1 << line) | self.level_triggered
        if not self._auto_eoi:
            self.in_service |= 1 << line
        return self.base + line

    def read(self, offset: int) -> int:
        if offset == 1:
            return self.mask
        return self.in_service if self._read_isr else self.requested

    def write(self, offset: int, value: int) -> None:
        if offset == 0:
            self._command(value)
        elif self._init_step:
            self._initialise(value)
        else:
            self.mask = value

    def _command(self, value: int) -> None:
        if value & 0x10:  # ICW1
            self._init_step, self._need_icw4 = 2, bool(value & 1)
            self.mask = self.requested = self.in_service = 0
            self._read_isr = False
            self._follow()
        elif value & 0x08:  # OCW3
            if value & 2:
                self._read_isr = bool(value & 1)
        elif value & 0x60 == 0x60:  # OCW2, specific end of interrupt
            self.in_service &= ~(1 << (value & 7))
        elif value & 0x20:  # OCW2, end of the interrupt with the highest priority
            self.in_service &= self.in_service - 1

    def _initialise(self, value: int) -> None:
        if self._init_step == 2:
            self.base = value & 0xF8
            self._init_step = 3
        elif self._init_step == 3 and self._need_icw4:
            self._init_step = 4
        else:
            if self._init_step == 4:
                self._auto_eoi = bool(value & 2)
            self._init_step = 0


class PicPair:
    """The master at ports 0x20-0x21 and the slave at 0xA0-0xA1."""

    def __init__(self) -> None:
        self.master = _Pic(0x08)
        self.slave = _Pic(0x70)

    def set_line(self, line: int, level: bool) -> None:
        """Drive an ISA line (0-15)."""
        if line < 8:
            self.master.line(line, level)
        else:
            self.slave.line(line - 8, level)
        self._cascade()

    def _cascade(self) -> None:
        self.master.line(CASCADE_LINE, False)
        if self.slave.ready() is not None:
            self.master.line(CASCADE_LINE, True)
        else:
            self.master.requested &= ~(1 << CASCADE_LINE)  # what the slave asked for is gone

    def pending(self) -> bool:
        """Whether an interrupt waits for the CPU."""
        return self.master.ready() is not None

    def lets_through(self, line: int) -> bool:
        """Whether one of the master's lines would interrupt as soon as it is raised."""
        return not self.master.mask >> line & 1 and not self.master.in_service & ((2 << line) - 1)

    def acknowledge(self) -> int | None:
        """Take the interrupt that waits and return its vector."""
        line = self.master.ready()
        if line is None:
            return None
        vector = self.master.acknowledge(line)
        if line == CASCADE_LINE:
            inner = self.slave.ready()
            vector = self.slave.base + 7 if inner is None else self.slave.acknowledge(inner)
            self._cascade()
        return vector


class PicPorts:
    """One chip of the pair as a port device."""

    def __init__(self, pair: PicPair, *, slave: bool) -> None:
        self._pair, self._chip = pair, pair.slave if slave else pair.master

    def pio_read(self, offset: int, size: int) -> int:
        """Read a register."""
        return self._chip.read(offset)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write a command or a mask."""
        self._chip.write(offset, value & 0xFF)
        self._pair._cascade()


class LevelControl:
    """Ports 0x4D0-0x4D1: which lines are triggered by level; timer, cascade, keyboard and clock never are."""

    def __init__(self, pair: PicPair) -> None:
        self._pair = pair

    def pio_read(self, offset: int, size: int) -> int:
        """Read the lines of one chip, or of both."""
        return (self._pair.master.level_triggered | self._pair.slave.level_triggered << 8) >> (8 * offset)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Set the lines of one chip, or of both."""
        if offset == 0:
            self._pair.master.trigger_by_level(value & 0xF8)
        if offset == 1 or size == 2:
            self._pair.slave.trigger_by_level((value >> (8 if offset == 0 else 0)) & 0xDE)
        self._pair._cascade()


class _Counter:
    """One counter of the 8254; time in nanoseconds."""

    def __init__(self) -> None:
        self.mode, self.access, self.reload = 3, 3, 0x10000
        self.start = 0
        self.armed = False
        self._low: int | None = None
        self._latched: list[int] = []
        self._read_high = False

    def ticks(self, now: int) -> int:
        return max(0, now - self.start) * PIT_HZ // 1_000_000_000

    def value(self, now: int) -> int:
        gone = self.ticks(now)
        if self.mode in (2, 3):
            step = 2 if self.mode == 3 else 1
            return (self.reload - gone * step % self.reload) & 0xFFFF
        return (self.reload - gone) & 0xFFFF

    def output(self, now: int) -> bool:
        """The OUT pin, as port 0x61 shows it for counter 2."""
        if self.mode == 3:
            return self.ticks(now) % self.reload < self.reload // 2
        return self.mode == 2 or self.ticks(now) >= self.reload

    def latch(self, now: int) -> None:
        if not self._latched:
            value = self.value(now)
            self._latched = {1: [value & 255], 2: [value >> 8]}.get(self.access, [value & 255, value >> 8])

    def read(self, now: int) -> int:
        if self._latched:
            return self._latched.pop(0)
        value = self.value(now)
        if self.access != 3:
            return value & 255 if self.access == 1 else value >> 8
        self._read_high = not self._read_high
        return value & 255 if self._read_high else value >> 8

    def control(self, access: int, mode: int) -> None:
        self.access, self.mode = access, {6: 2, 7: 3}.get(mode, mode)
        self.armed = self._read_high = False
        self._low, self._latched = None, []

    def write(self, value: int, now: int) -> None:
        if self.access == 3 and self._low is None:
            self._low = value
            return
        low, high = {1: (value, 0), 2: (0, value)}.get(self.access, (self._low or 0, value))
        self._low = None
        self.reload = (low | high << 8) or 0x10000
        self.start, self.armed = now, True


class Pit:
    """The 8254 at ports 0x40-0x43; counter 0 drives IRQ 0."""

    def __init__(self, pics: PicPair, clock: Callable[[], int]) -> None:
        self._pics, self._clock = pics, clock
        self.counters = [_Counter(), _Counter(), _Counter()]
        self.due: int | None = None

    def pio_read(self, offset: int, size: int) -> int:
        """Read a counter."""
        return 0xFF if offset == 3 else self.counters[offset].read(self._clock())

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write a counter or a control word."""
        value &= 0xFF
        now = self._clock()
        if offset < 3:
            self.counters[offset].write(value, now)
        elif value >> 6 == 3:  # read-back command: latch counts; status is not kept
            for index, counter in enumerate(self.counters):
                if value >> (index + 1) & 1 and not value & 0x20:
                    counter.latch(now)
        elif value & 0x30 == 0:
            self.counters[value >> 6].latch(now)
        else:
            self.counters[value >> 6].control(value >> 4 & 3, value >> 1 & 7)
        if offset in (0, 3):
            self._plan()

    def _period(self) -> int:
        return self.counters[0].reload * 1_000_000_000 // PIT_HZ

    def _plan(self) -> None:
        timer = self.counters[0]
        self.due = timer.start + self._period() if timer.armed else None

    def advance(self, now: int) -> None:
        """Raise IRQ 0 if counter 0 came to its end; ends missed in between are dropped."""
        if self.due is None or now < self.due:
            return
        self._pics.set_line(TIMER_LINE, True)
        self._pics.set_line(TIMER_LINE, False)
        if self.counters[0].mode in (2, 3):
            period = self._period()
            self.due += period * ((now - self.due) // period + 1)
        else:
            self.due = None
