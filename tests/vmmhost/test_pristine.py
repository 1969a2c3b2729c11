"""The privileged core is the same machine, whether the unprivileged layer exists or not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
if sys.argv[1] == "without":
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("vmgraft.vmmhost.layer") or name == "wasmtime":
                raise ImportError(f"{name} is not installed")
    sys.meta_path.insert(0, Blocker())
    try:
        import vmgraft.vmmhost.layer.client
    except ImportError:
        pass
    else:
        sys.exit("the layer can still be imported")
else:
    import vmgraft.vmmhost.layer.client
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine

class Content:
    sector_size = 512
    def __init__(self, data):
        self.data, self.virtual_size = data, len(data)
    def read(self, offset, length):
        return self.data[offset : offset + length]

content = Content(open(sys.argv[3], "rb").read().ljust(1 << 20, b"\\0"))
disk = VerifiedDisk(content, lambda index, block: True)
with Machine(Engine(sys.argv[2]), disk, trace=True, rtc_epoch=0, timeout=60) as machine:
    result = machine.run()
trace = [[e.write, e.port, e.size, e.value] for e in result.trace]
print(json.dumps({"reason": result.reason.value, "trace": trace, "serial": result.serial.decode()}))
"""


def trace(layer: str, engine: str) -> dict:
    guest = ROOT / "examples" / "guest" / "guest.bin"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, layer, engine, str(guest)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document: dict = json.loads(done.stdout)
    return document


def test_the_trace_is_the_same_without_the_layer() -> None:
    with_layer, without = trace("with", "soft"), trace("without", "soft")
    assert with_layer["reason"] == "shutdown"
    assert "extensions: none" in with_layer["serial"]
    assert len(with_layer["trace"]) > 50
    assert with_layer == without


@pytest.mark.kvm
def test_the_trace_is_the_same_on_kvm() -> None:
    from vmgraft.vmmhost.core.probe import probe_kvm

    info = probe_kvm()
    if not info.usable:
        pytest.skip(f"no working /dev/kvm: {info.reason}")
    assert trace("without", "kvm") == trace("with", "kvm") == trace("with", "soft")
