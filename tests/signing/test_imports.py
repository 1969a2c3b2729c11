"""Reading a manifest or an envelope must not cost the start-up of the crypto and schema libraries."""

from __future__ import annotations

import subprocess
import sys


def test_light_modules_stay_light():
    modules = [
        "schemas",
        *(f"signing.{name}" for name in ("capabilities", "contract", "manifest", "dsse", "statement")),
    ]
    code = "import sys\n" + "".join(f"import vmgraft.{name}\n" for name in modules)
    code += "print([m for m in ('cryptography', 'jsonschema', 'numpy', 'construct', 'wasmtime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
