"""The WebAssembly engine as a worker uses it: configuration, binding of functions, fuel, and the fast way to call.

The public call of wasmtime's binding costs 24-35 µs in either direction, nearly all of it in building values; the raw
one, with prebuilt buffers, about 1 µs into the module and 5 µs out of it. It leans on the ``unchecked`` functions of
the C API through names that the binding does not promise, so `fast_calls_work` compares both ways on a known module
first, and the public way is always there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final, NoReturn

import wasmtime
from wasmtime import _bindings as raw

from vmgraft.vmmhost.layer.abi import I32, I64, MASK32, MASK64, Signature

MIB: Final = 1 << 20
_GUARD_BYTES: Final = 65536
_STACK_BYTES: Final = 512 << 10
_TABLE_ENTRIES: Final = 10_000
#: Proposals that the ABI does not have; a setting that the installed binding lacks is off by default there.
_OFF: Final = (
    "wasm_threads", "shared_memory", "wasm_memory64", "wasm_multi_memory", "wasm_relaxed_simd", "wasm_simd",
    "wasm_component_model", "wasm_exceptions", "wasm_gc", "wasm_function_references", "wasm_tail_call",
    "wasm_custom_page_sizes", "wasm_stack_switching", "wasm_wide_arithmetic", "parallel_compilation", "debug_info",
)  # fmt: skip

#: 64-bit words in one raw value, which has room for a vector.
_STRIDE: Final = ctypes.sizeof(raw.wasmtime_val_raw) // 8
#: wasmtime_func_unchecked_callback_t: environment, caller, values, count → trap or 0.
_CALLBACK: Final = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

Invoke = Callable[..., int]


class ModuleTrapError(Exception):
    """The module trapped, or asked for something that ends it."""


class FuelError(Exception):
    """The module used up the fuel of one call."""


class EngineError(Exception):
    """The engine refuses the module."""


class Machine:
    """One engine, one store, and the limits of one extension.

    Args:
        memory_mib: Most linear memory, MiB; it is reserved as address space at once, so that growing never copies.
        fuel: Fuel units of each call.
        fast: Use the raw call.
    """

    def __init__(self, memory_mib: int, fuel: int, *, fast: bool) -> None:
        config = wasmtime.Config()
        for name in _OFF:
            if hasattr(wasmtime.Config, name):
                setattr(config, name, False)
        config.consume_fuel = True
        config.max_wasm_stack = _STACK_BYTES
        config.memory_reservation = memory_mib * MIB
        config.memory_reservation_for_growth = 0
        config.memory_guard_size = _GUARD_BYTES
        config.memory_init_cow = False  # would need a memfd, which the sandbox has no room for
        self.engine = wasmtime.Engine(config)
        self.store = wasmtime.Store(self.engine)
        self.store.set_limits(
            memory_size=memory_mib * MIB, table_elements=_TABLE_ENTRIES, instances=1, tables=4, memories=1
        )
        self.fuel, self.fast = fuel, fast
        #: What an import raised: the engine turns it into a trap, and `bind` raises it again.
        self.pending: list[BaseException] = []
        self._callbacks: list[Any] = []  # the engine holds bare pointers to them
        self._context = ctypes.cast(self.store._context(), ctypes.c_void_p) if fast else ctypes.c_void_p()
        self._fuel_left = ctypes.c_uint64()
        self._fuel_address = ctypes.c_void_p(ctypes.addressof(self._fuel_left))

    def instantiate(self, module: bytes, imports: dict[tuple[str, str], tuple[Signature, Invoke]]) -> Any:
        """Compile and instantiate a checked module and return its exports.

        Raises:
            EngineError: the engine finds the module invalid, too large or short of an import.
        """
        try:
            self.store.set_fuel(self.fuel)
            compiled = wasmtime.Module(self.engine, module)
            linker = wasmtime.Linker(self.engine)
            for (space, name), (signature, function) in imports.items():
                kind = wasmtime.FuncType(_types(signature.params), _types(signature.results))
                if self.fast:
                    self._define_raw(linker, (space.encode(), name.encode()), kind, signature, function)
                else:
                    linker.define_func(space, name, kind, self._guarded(signature, function))
            return linker.instantiate(self.store, compiled).exports(self.store)
        except (wasmtime.WasmtimeError, wasmtime.Trap) as error:
            raise EngineError(first_line(str(error))) from error

    def _guarded(self, signature: Signature, function: Invoke) -> Invoke:
        masks = _masks(signature.params)

        def call(*args: int) -> int:
            try:
                return function(*[arg & mask for arg, mask in zip(args, masks, strict=True)])
            except BaseException as error:
                self.pending.append(error)
                raise

        return call

    def _define_raw(
        self, linker: Any, names: tuple[bytes, bytes], kind: Any, signature: Signature, function: Invoke
    ) -> None:
        masks, result = _masks(signature.params), bool(signature.results)
        places = [(index * _STRIDE, mask) for index, mask in enumerate(masks)]
        words_type = ctypes.c_uint64 * (max(len(masks), 1) * _STRIDE)

        def callback(_env: int, _caller: int, values: int | None, _count: int) -> int:
            try:
                words = words_type.from_address(values or 0)  # not touched where there are no values
                answer = function(*[words[at] & mask for at, mask in places])
                if result:
                    words[0] = answer
            except BaseException as error:  # noqa: BLE001 - nothing may unwind into the engine; `bind` raises it again
                self.pending.append(error)
                return _RAW.trap_new(b"import", 6) or 0
            return 0

        self._callbacks.append(_CALLBACK(callback))
        (space, name), pointer = names, linker.ptr()
        if _RAW.define(pointer, space, len(space), name, len(name), kind.ptr(), self._callbacks[-1], None, None):
            raise EngineError(f"the engine refuses the import {name.decode()}")

    def bind(self, function: Any, signature: Signature) -> Invoke:
        """Return a callable that refuels the store, calls the function and gives its result as an unsigned integer.

        The callable raises FuelError, ModuleTrapError, or whatever an import raised.
        """
        return self._bind_raw(function, signature) if self.fast else self._bind_public(function, signature)

    def fuel_used(self) -> int:
        """Return the fuel that the last call used, in units of the engine: about one an instruction."""
        if not self.fast:
            left: int = self.store.get_fuel()
            return self.fuel - left
        self._fuel_left.value = self.fuel
        _RAW.get_fuel(self._context, self._fuel_address)
        left = self._fuel_left.value
        return self.fuel - left

    def _bind_public(self, function: Any, signature: Signature) -> Invoke:
        store, mask = self.store, _mask(signature)

        def invoke(*args: int) -> int:
            self.pending.clear()  # this way an import's error comes out by itself
            store.set_fuel(self.fuel)
            try:
                result = function(store, *args)
            except wasmtime.Trap as trap:
                self._fail(trap)
            except wasmtime.WasmtimeError as error:
                raise ModuleTrapError(first_line(str(error))) from error
            return (result or 0) & mask

        return invoke

    def _bind_raw(self, function: Any, signature: Signature) -> Invoke:
        slots = max(len(signature.params), len(signature.results), 1)
        area = (raw.wasmtime_val_raw * slots)()
        words = (ctypes.c_uint64 * (slots * _STRIDE)).from_buffer(area)
        trap = ctypes.c_void_p()
        # Arguments that are C values already need no conversion at each call.
        context, fuel, count = self._context, ctypes.c_uint64(self.fuel), ctypes.c_size_t(slots)
        target, address, trap_address = (
            ctypes.c_void_p(ctypes.addressof(each)) for each in (function._func, area, trap)
        )  # fmt: skip
        call, set_fuel, mask = _RAW.call, _RAW.set_fuel, _mask(signature)
        keep = function  # the C struct that `target` points to lives in it

        def invoke(*args: int) -> int:
            set_fuel(context, fuel)
            at = 0
            for arg in args:
                words[at] = arg
                at += _STRIDE
            error = call(context, target, address, count, trap_address)
            if error or trap.value:
                self._fail_raw(error, trap, keep)
            return words[0] & mask

        return invoke

    def _fail_raw(self, error: int | None, trap: ctypes.c_void_p, _keep: object) -> NoReturn:
        if error:  # what an import raised comes back as an error, not as a trap
            pointer = ctypes.cast(error, ctypes.POINTER(raw.wasmtime_error_t))
            text = str(wasmtime.WasmtimeError._from_ptr(pointer))
            if self.pending:
                raise self.pending.pop()
            raise ModuleTrapError(first_line(text))
        owned = wasmtime.Trap._from_ptr(ctypes.cast(trap, ctypes.POINTER(raw.wasm_trap_t)))
        trap.value = None
        self._fail(owned)

    def _fail(self, trap: Any) -> NoReturn:
        if self.pending:
            raise self.pending.pop()
        code = trap.trap_code
        if code is not None and code.name == "OUT_OF_FUEL":
            raise FuelError
        name = code.name.lower().replace("_", " ") if code is not None else first_line(trap.message)
        raise ModuleTrapError(name)


class _Raw:
    """The C functions of the fast way, with types that cost nothing to convert."""

    def __init__(self) -> None:
        # Calls that keep the interpreter's lock, which nobody else in a worker wants, take half the time.
        library = ctypes.PyDLL(raw.dll._name)
        self.call = library.wasmtime_func_call_unchecked
        self.call.restype = ctypes.c_void_p
        self.call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self.set_fuel = library.wasmtime_context_set_fuel
        self.set_fuel.restype = ctypes.c_void_p
        self.set_fuel.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.get_fuel = library.wasmtime_context_get_fuel
        self.get_fuel.restype = ctypes.c_void_p
        self.get_fuel.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.define = library.wasmtime_linker_define_func_unchecked
        self.define.restype = ctypes.c_void_p
        self.define.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p,
            _CALLBACK, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self.trap_new = library.wasmtime_trap_new
        self.trap_new.restype = ctypes.c_void_p
        self.trap_new.argtypes = [ctypes.c_char_p, ctypes.c_size_t]


_RAW: Final = _Raw()


def _types(codes: tuple[int, ...]) -> list[Any]:
    make = {I32: wasmtime.ValType.i32, I64: wasmtime.ValType.i64}
    return [make[code]() for code in codes]


def _masks(codes: tuple[int, ...]) -> list[int]:
    return [MASK32 if code == I32 else MASK64 for code in codes]


def _mask(signature: Signature) -> int:
    return (_masks(signature.results) or [0])[0]


def first_line(text: str) -> str:
    """Return the last part of an engine's message chain on one line of at most 300 characters."""
    return " ".join(text.split())[:300]


#: mix(a: i64, b: i32) = a * 3 + b, or a trap for b = 13 and no end for b = 14; twice(x: i32) = x + x;
#: ask(a: i64, b: i32) = what the import answers.
_SELF_TEST: Final = """(module
  (import "test" "ask" (func $ask (param i64 i32) (result i64)))
  (func (export "mix") (param i64 i32) (result i64)
    (if (i32.eq (local.get 1) (i32.const 13)) (then unreachable))
    (if (i32.eq (local.get 1) (i32.const 14)) (then (loop br 0)))
    (i64.add (i64.mul (local.get 0) (i64.const 3)) (i64.extend_i32_u (local.get 1))))
  (func (export "twice") (param i32) (result i32) (i32.add (local.get 0) (local.get 0)))
  (func (export "ask") (param i64 i32) (result i64) (call $ask (local.get 0) (local.get 1))))"""
_BINARY: Final = Signature((I64, I32), (I64,))


def fast_calls_work() -> bool:
    """Say whether the raw way gives the very results, traps and errors that the public one gives.

    It also warms the engine up: a zygote's children find everything loaded.
    """
    try:
        module = bytes(wasmtime.wat2wasm(_SELF_TEST))
        outcomes = [_outcomes(module, fast=fast) for fast in (True, False)]
    except (AttributeError, TypeError, ValueError, EngineError, ctypes.ArgumentError):
        return False
    big = 2**62 + 7
    expected = [
        (3 * big + 5) & MASK64, 6, "ModuleTrapError", "FuelError", 7, (big << 1 & MASK64) + MASK32, "KeyError", 9,
    ]  # fmt: skip
    results, fuel = [each[:-1] for each in outcomes], [each[-1] for each in outcomes]
    return results == [expected, expected] and fuel[0] == fuel[1] != 0


def _outcomes(module: bytes, *, fast: bool) -> list[int | str]:
    def answer(first: int, second: int) -> int:
        if second == 13:
            raise KeyError
        return (first << 1 & MASK64) + second

    machine = Machine(1, 10_000, fast=fast)
    exports = machine.instantiate(module, {("test", "ask"): (_BINARY, answer)})
    mix, ask = (machine.bind(exports[name], _BINARY) for name in ("mix", "ask"))
    twice = machine.bind(exports["twice"], Signature((I32,), (I32,)))
    big = 2**62 + 7
    return [
        _outcome(mix, big, 5), _outcome(twice, 2**31 + 3), _outcome(mix, 1, 13), _outcome(mix, 1, 14),
        _outcome(mix, 2, 1), _outcome(ask, big, MASK32), _outcome(ask, 1, 13), _outcome(ask, 4, 1),
        machine.fuel_used(),
    ]  # fmt: skip


def _outcome(invoke: Invoke, *args: int) -> int | str:
    try:
        return invoke(*args)
    except (ModuleTrapError, FuelError, KeyError) as error:
        return type(error).__name__
