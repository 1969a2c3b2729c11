"""Static check of an extension's module, before any engine sees it.

Everything that can be decided without looking at instructions is decided here: the frame of the binary format
(WebAssembly core specification 2.0, chapter 5), sizes and counts, the absence of what ABI ``vmgraft/1`` does not have,
and the types of imports and exports. Instructions are validated by the engine in the sandboxed worker. A malformed
module is a `GraftFormatError` (offset within the module); an import that was not granted is a `CapabilityError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmgraft.errors import CapabilityError
from vmgraft.vmmhost.layer.abi import (
    EXPORTS,
    IMPORT_MODULE,
    IMPORTS,
    MARKER,
    MEMORY,
    PAGE_BYTES,
    POINTER_IMPORTS,
    Grant,
    Hook,
    Signature,
)
from vmgraft.vmmhost.layer.wasmreader import WasmReader

MAX_MODULE_BYTES: Final = 1 << 20
MAX_BODY_BYTES: Final = 64 << 10  #: one 364 KB function was measured at 143 s and 3.3 GiB of compilation
MAX_LOCALS: Final = 4096
MAX_TYPES: Final = 1024
MAX_ARITY: Final = 32
MAX_IMPORTS: Final = 64
MAX_FUNCTIONS: Final = 10_000
MAX_TABLES: Final = 4
MAX_TABLE_ENTRIES: Final = 10_000
MAX_GLOBALS: Final = 1024
MAX_EXPORTS: Final = 256
MAX_SEGMENTS: Final = 1024
MAX_CUSTOM: Final = 64
MAX_CONST_OPS: Final = 16

_MAGIC: Final = b"\0asm"
_VERSION: Final = b"\x01\0\0\0"
_LAYER_OF_COMPONENTS: Final = 1  #: bytes 6-7 of a component's preamble (component model, Binary.md)
#: Section ids in the order in which they must come (section 5.5.2); 0 is a custom section and may stand anywhere.
_ORDER: Final = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 9: 8, 12: 9, 10: 10, 11: 11}
_NAMES: Final = {1: "type", 2: "import", 3: "function", 4: "table", 5: "memory", 6: "global", 7: "export",
                 9: "element", 10: "code", 11: "data", 12: "data count"}  # fmt: skip
_NUMBER_TYPES: Final = frozenset({0x7F, 0x7E, 0x7D, 0x7C})
_REF_TYPES: Final = frozenset({0x70, 0x6F})
_START, _TAG = 8, 13
#: Limits flags of proposals that the ABI does not have: threads, memory64, custom-page-sizes.
_LIMIT_FLAGS: Final = {2: "shared memories", 4: "64-bit memories", 8: "custom page sizes"}
_FUNC, _TABLE, _MEMORY, _GLOBAL = range(4)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """What a module that passed the check looks like.

    Attributes:
        hooks: The optional exports it has.
        imports: Names of the ABI functions it imports.
        memory_pages: Initial size of its memory in 64 KiB pages, 0 without a memory.
        memory_max: Declared maximum in pages, or None.
    """

    hooks: Hook
    imports: frozenset[str]
    memory_pages: int
    memory_max: int | None


def check_bounds(module: bytes, *, file: str | None = None) -> None:
    """Check size and preamble only: what the privileged side does before it hands the bytes to a worker.

    Raises:
        GraftFormatError: the module is larger than 1 MiB, or not a core WebAssembly module of version 1.
    """
    reader = WasmReader(module, file=file)
    if len(module) > MAX_MODULE_BYTES:
        reader.fail(f"{len(module)} bytes are more than the {MAX_MODULE_BYTES} allowed", "size", offset=0)
    if module[:4] != _MAGIC:
        reader.fail("this is not a WebAssembly module", "magic", offset=0, hint="the first four bytes are 00 61 73 6d")
    if len(module) >= 8 and int.from_bytes(module[6:8], "little") == _LAYER_OF_COMPONENTS:
        reader.fail("components are not supported", "version", offset=4, hint="build a core module")
    if module[4:8] != _VERSION:
        reader.fail("only version 1 of the binary format is supported", "version", offset=4)


def check_module(module: bytes, grant: Grant, memory_mib: int, *, file: str | None = None) -> ModuleInfo:
    """Check a whole module against ABI ``vmgraft/1``.

    Args:
        module: The bytes of a core WebAssembly module.
        grant: Capabilities behind which imports stand.
        memory_mib: Most memory the module may start with, MiB.
        file: Name that errors carry.

    Raises:
        GraftFormatError: malformed, over a limit, or using what the ABI does not have.
        CapabilityError: an import stands behind a capability that was not granted.
    """
    check_bounds(module, file=file)
    return _Checker(module, grant, memory_mib * (1 << 20) // PAGE_BYTES, file).run()


class _Checker:
    def __init__(self, module: bytes, grant: Grant, max_pages: int, file: str | None) -> None:
        self.reader = WasmReader(module, 8, file=file)
        self.grant, self.max_pages, self.file = grant, max_pages, file
        self.types: list[Signature] = []
        self.functions: list[int] = []  # type index of each function, imports first
        self.defined = 0
        self.imports: set[str] = set()
        self.exports: set[str] = set()
        self.hooks = Hook(0)
        self.counts = {_TABLE: 0, _MEMORY: 0, _GLOBAL: 0}
        self.pages: tuple[int, int | None] = (0, None)
        self.memory_exported = False
        self.bodies = 0

    def run(self) -> ModuleInfo:
        last = custom = 0
        while self.reader.pos < self.reader.end:
            at = self.reader.pos
            section = self.reader.byte("section id")
            body = self.reader.sub(self.reader.u32("section size"), "section size")
            if section == 0:
                custom += 1
                if custom > MAX_CUSTOM:
                    self.reader.fail(f"more than {MAX_CUSTOM} custom sections", "custom section", offset=at)
                body.name("custom section")
                continue
            last = self._enter(section, last, at)
            _SECTIONS[section](self, body)
        self._finish()
        return ModuleInfo(self.hooks, frozenset(self.imports), *self.pages)

    def _enter(self, section: int, last: int, at: int) -> int:
        if section == _START:
            self.reader.fail("a start function is not allowed", "start", offset=at, hint="use the export on_start")
        if section == _TAG:
            self.reader.fail("exceptions are not supported", "tag", offset=at)
        rank = _ORDER.get(section)
        if rank is None:
            self.reader.fail(f"unknown section {section}", "section id", offset=at)
        if rank <= last:
            self.reader.fail("the section comes twice or too late", _NAMES[section], offset=at)
        return rank

    def _finish(self) -> None:
        if self.bodies != self.defined:
            self.reader.fail(f"{self.defined} functions have {self.bodies} bodies", "code")
        if MARKER not in self.exports:
            self.reader.fail(f"the export {MARKER} is missing", "export", hint="see docs/extensions.md")
        if self.imports & POINTER_IMPORTS and not self.memory_exported:
            self.reader.fail(f"the memory must be exported as {MEMORY!r}", "export")

    # --- sections, in the order of the file ---

    def type_section(self, r: WasmReader) -> None:
        for _ in range(r.count(MAX_TYPES, "types")):
            if r.byte("type") != 0x60:
                r.fail("only plain function types are supported", "type", offset=r.pos - 1)
            params, results = self._valtypes(r), self._valtypes(r)
            self.types.append(Signature(params, results))
        r.done("type section")

    def _valtypes(self, r: WasmReader) -> tuple[int, ...]:
        codes = tuple(r.byte("value type") for _ in range(r.count(MAX_ARITY, "value types")))
        for code in codes:
            self._valtype(r, code)
        return codes

    def _valtype(self, r: WasmReader, code: int) -> None:
        if code not in _NUMBER_TYPES | _REF_TYPES:
            r.fail(f"value type 0x{code:02x} is not supported", "value type", hint="build without SIMD and GC")

    def import_section(self, r: WasmReader) -> None:
        for _ in range(r.count(MAX_IMPORTS, "imports")):
            at = r.pos
            space, name = r.name("import module"), r.name("import name")
            if r.byte("import kind") != _FUNC:
                r.fail(f"import {space}.{name} is not a function", "import", offset=at)
            self._import(r, at, space, name, r.u32("import type"))
        r.done("import section")

    def _import(self, r: WasmReader, at: int, space: str, name: str, type_index: int) -> None:
        known = IMPORTS.get(name) if space == IMPORT_MODULE else None
        if known is None:
            known_names = ", ".join(IMPORTS)
            r.fail(f"unknown import {space}.{name}", "import", offset=at, hint=f"{IMPORT_MODULE} has {known_names}")
        signature, capability = known
        if self._type(r, type_index) != signature:
            r.fail(f"import {name} has the wrong type", "import", offset=at, hint=f"it is {signature}")
        if not self.grant.allows(capability):
            raise CapabilityError(
                f"import {name} needs the capability {capability}, which is not granted",
                file=self.file, offset=at, field="module: import",
                hint="declare it in the manifest and grant it in the policy",
            )  # fmt: skip
        self.imports.add(name)
        self.functions.append(type_index)

    def _type(self, r: WasmReader, index: int) -> Signature:
        if index >= len(self.types):
            r.fail(f"type {index} does not exist", "type index")
        return self.types[index]

    def function_section(self, r: WasmReader) -> None:
        self.defined = r.count(MAX_FUNCTIONS, "functions")
        for _ in range(self.defined):
            index = r.u32("type index")
            self._type(r, index)
            self.functions.append(index)
        r.done("function section")

    def table_section(self, r: WasmReader) -> None:
        self.counts[_TABLE] = r.count(MAX_TABLES, "tables")
        for _ in range(self.counts[_TABLE]):
            if r.byte("table type") not in _REF_TYPES:
                r.fail("only funcref and externref tables are supported", "table type", offset=r.pos - 1)
            low, _high = self._limits(r, "table")
            if low > MAX_TABLE_ENTRIES:
                r.fail(f"{low} entries are more than the {MAX_TABLE_ENTRIES} allowed", "table size")
        r.done("table section")

    def memory_section(self, r: WasmReader) -> None:
        self.counts[_MEMORY] = r.count(1, "memories")
        if self.counts[_MEMORY]:
            self.pages = self._limits(r, "memory")
            if self.pages[0] > self.max_pages:
                r.fail(f"{self.pages[0]} pages are more than the {self.max_pages} granted", "memory size",
                       hint="raise limits.memoryMiB in the manifest")  # fmt: skip
        r.done("memory section")

    def _limits(self, r: WasmReader, what: str) -> tuple[int, int | None]:
        flags = r.byte(f"{what} limits")
        for bit, meaning in _LIMIT_FLAGS.items():
            if flags & bit:
                r.fail(f"{meaning} are not supported", f"{what} limits", offset=r.pos - 1)
        if flags > 1:
            r.fail(f"{what} limits have flags 0x{flags:02x}", f"{what} limits", offset=r.pos - 1)
        low = r.u32(f"{what} minimum")
        high = r.u32(f"{what} maximum") if flags else None
        if high is not None and high < low:
            r.fail(f"the maximum {high} is below the minimum {low}", f"{what} limits")
        return low, high

    def global_section(self, r: WasmReader) -> None:
        self.counts[_GLOBAL] = r.count(MAX_GLOBALS, "globals")
        for _ in range(self.counts[_GLOBAL]):
            self._valtype(r, r.byte("global type"))
            if r.byte("global mutability") > 1:
                r.fail("mutability is neither 0 nor 1", "global", offset=r.pos - 1)
            _skip_constant(r)
        r.done("global section")

    def export_section(self, r: WasmReader) -> None:
        for _ in range(r.count(MAX_EXPORTS, "exports")):
            at = r.pos
            name, kind, index = r.name("export name"), r.byte("export kind"), r.u32("export index")
            if name in self.exports:
                r.fail(f"export {name!r} comes twice", "export", offset=at)
            limit = len(self.functions) if kind == _FUNC else self.counts.get(kind, 0)
            if index >= limit:
                r.fail(f"export {name!r} names nothing", "export", offset=at)
            self.exports.add(name)
            self._export(r, at, name, kind, index)
        r.done("export section")

    def _export(self, r: WasmReader, at: int, name: str, kind: int, index: int) -> None:
        if name == MEMORY:
            self.memory_exported = kind == _MEMORY
        known = EXPORTS.get(name)
        if known is None:
            if name.startswith(("on_", "vmgraft_")):
                hooks = ", ".join(EXPORTS)
                r.fail(f"export {name!r} is not part of the ABI", "export", offset=at, hint=f"it has {hooks}")
            return
        signature, hook = known
        if kind != _FUNC or self.types[self.functions[index]] != signature:
            r.fail(f"export {name} has the wrong type", "export", offset=at, hint=f"it is {signature}")
        if hook is not None:
            self.hooks |= hook

    def segments(self, r: WasmReader) -> None:
        r.count(MAX_SEGMENTS, "segments")

    def data_count_section(self, r: WasmReader) -> None:
        if r.u32("data count") > MAX_SEGMENTS:
            r.fail(f"more than the {MAX_SEGMENTS} segments allowed", "data count")
        r.done("data count section")

    def code_section(self, r: WasmReader) -> None:
        self.bodies = r.count(MAX_FUNCTIONS, "bodies")
        for number in range(self.bodies):
            at = r.pos
            size = r.u32("body size")
            if size > MAX_BODY_BYTES:
                r.fail(f"body {number}: {size} bytes are more than the {MAX_BODY_BYTES} allowed", "body size",
                       offset=at, hint="split the function, or build with -Os")  # fmt: skip
            self._locals(r.sub(size, "body size"), number)
        r.done("code section")

    def _locals(self, r: WasmReader, number: int) -> None:
        total = 0
        for _ in range(r.count(MAX_LOCALS, "locals")):
            total += r.u32("locals")
            self._valtype(r, r.byte("local type"))
            if total > MAX_LOCALS:
                r.fail(f"body {number} has more than {MAX_LOCALS} locals", "locals")


_SECTIONS: Final = {
    1: _Checker.type_section,
    2: _Checker.import_section,
    3: _Checker.function_section,
    4: _Checker.table_section,
    5: _Checker.memory_section,
    6: _Checker.global_section,
    7: _Checker.export_section,
    9: _Checker.segments,
    10: _Checker.code_section,
    11: _Checker.segments,
    12: _Checker.data_count_section,
}

#: Opcodes of constant expressions (section 5.4.9 and the extended constants) without operands.
_PLAIN_CONST: Final = frozenset({0x6A, 0x6B, 0x6C, 0x7C, 0x7D, 0x7E})


def _skip_constant(r: WasmReader) -> None:
    for _ in range(MAX_CONST_OPS):
        opcode = r.byte("constant expression")
        match opcode:
            case 0x0B:  # end
                return
            case 0x41:  # i32.const
                r.skip_signed(32, "constant")
            case 0x42:  # i64.const
                r.skip_signed(64, "constant")
            case 0x43:  # f32.const
                r.take(4, "constant")
            case 0x44:  # f64.const
                r.take(8, "constant")
            case 0x23 | 0xD2:  # global.get, ref.func
                r.u32("constant")
            case 0xD0:  # ref.null
                r.byte("constant")
            case _ if opcode not in _PLAIN_CONST:
                r.fail(f"opcode 0x{opcode:02x} is not constant", "constant expression", offset=r.pos - 1)
    r.fail(f"more than {MAX_CONST_OPS} instructions", "constant expression")
