"""Both ways to call a module behave the same, and the fast one is really in use here."""

import pytest
import wasmtime

from vmgraft.vmmhost.layer import engine
from vmgraft.vmmhost.layer.abi import I32, I64, Signature
from vmgraft.vmmhost.layer.engine import EngineError, FuelError, Machine, ModuleTrapError

MODULE = bytes(
    wasmtime.wat2wasm("""(module
  (import "vmgraft" "now" (func $now (result i64)))
  (import "vmgraft" "log" (func $log (param i32 i32)))
  (func (export "add") (param i64 i32) (result i64) (i64.add (local.get 0) (i64.extend_i32_u (local.get 1))))
  (func (export "small") (param i32) (result i32) (i32.sub (i32.const 0) (local.get 0)))
  (func (export "nothing") (param i64))
  (func (export "time") (result i64) (call $now))
  (func (export "say") (call $log (i32.const -1) (i32.const 5)))
  (func (export "spin") (loop br 0))
  (func (export "fall") unreachable))""")
)


class HostGoneError(Exception):
    pass


@pytest.fixture(params=[True, False], ids=["raw", "public"])
def call(request):
    machine = Machine(1, 50_000, fast=request.param)
    said = []

    def log(*args):
        said.append(args)
        raise HostGoneError

    exports = machine.instantiate(
        MODULE,
        {
            ("vmgraft", "now"): (Signature((), (I64,)), lambda: (1 << 63) + 5),
            ("vmgraft", "log"): (Signature((I32, I32)), log),
        },
    )
    types = {
        "add": Signature((I64, I32), (I64,)), "small": Signature((I32,), (I32,)), "nothing": Signature((I64,)),
        "time": Signature((), (I64,)), "say": Signature(()), "spin": Signature(()), "fall": Signature(()),
    }  # fmt: skip
    bound = {name: machine.bind(exports[name], signature) for name, signature in types.items()}

    def invoke(name, *args):
        return bound[name](*args)

    invoke.said = said
    return invoke


def test_values(call):
    assert call("add", 2**64 - 1, 2) == 1
    assert call("add", 7, 2**32 - 1) == 7 + 2**32 - 1
    assert call("small", 1) == 2**32 - 1
    assert call("nothing", 9) == 0
    assert call("time") == (1 << 63) + 5


def test_what_an_import_raises_comes_out(call):
    with pytest.raises(HostGoneError):
        call("say")
    assert call.said == [(2**32 - 1, 5)]
    assert call("small", 3) == 2**32 - 3
    with pytest.raises(ModuleTrapError, match="unreachable"):
        call("fall")


def test_traps_and_fuel(call):
    with pytest.raises(ModuleTrapError, match="unreachable"):
        call("fall")
    with pytest.raises(FuelError):
        call("spin")
    assert call("add", 1, 1) == 2  # the next call has its own fuel


def test_fast_calls_work_with_the_installed_engine():
    assert engine.fast_calls_work()


def test_a_binding_without_the_raw_call_falls_back(monkeypatch):
    monkeypatch.setattr(engine, "_RAW", object())
    assert not engine.fast_calls_work()


def test_a_raw_call_that_lies_is_found_out(monkeypatch):
    class Liar:
        set_fuel = staticmethod(lambda *_args: None)
        call = define = trap_new = staticmethod(lambda *_args: None)

    monkeypatch.setattr(engine, "_RAW", Liar)
    assert not engine.fast_calls_work()


@pytest.mark.parametrize(
    "text",
    ["(module (memory i64 1))", "(module (memory 1) (memory 1))", "(module (func (param v128)))", "(module (tag))",
     "(module (func return_call 0))", "(module (memory 1 1 shared))", "(module (memory 17))"],
)  # fmt: skip
def test_what_the_abi_lacks_is_off_in_the_engine_too(text):
    with pytest.raises(EngineError):
        Machine(1, 1000, fast=True).instantiate(bytes(wasmtime.wat2wasm(text)), {})
