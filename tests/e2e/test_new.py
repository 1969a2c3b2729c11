"""A vendor's first hour: `new`, make, attach, run, and a guest that sees the device."""

from pathlib import Path

GUEST = """
bits 16
org 0x7c00
        mov cx, 3
next:   mov dx, 0x518           ; the counter of the scaffold
        in eax, dx
        add al, '0'
        mov dx, 0x3f8
        out dx, al
        loop next
        mov dx, 0x604           ; power off
        mov ax, 0x2000
        out dx, ax
        hlt
times 510-($-$$) db 0
        dw 0xaa55
"""


def test_a_scaffold_becomes_a_device(cli, tmp_path: Path, tool) -> None:
    folder, disk = tmp_path / "counter", tmp_path / "disk.img"
    cli("new", folder, "--id", "com.acme.counter")
    tool("make", "-C", folder)
    (tmp_path / "guest.asm").write_text(GUEST)
    tool("nasm", "-f", "bin", "-o", disk, tmp_path / "guest.asm")
    cli("keygen", "acme", "--no-passphrase")
    cli("policy", "init", "--trust", "acme.pub", "--grant-all-declared", folder, "-o", "policy.json")
    cli("attach", disk, folder, "--key", "acme.key")
    report = cli.json("run", disk, "--policy", "policy.json", "--cpu", "soft", "--timeout", "30")
    assert report["end"]["serial"] == "123"
    assert report["layer"][0]["calls"] == 3
    plain = cli.json("run", disk, "--policy", "policy.json", "--cpu", "soft", "--timeout", "30", "--without-extensions")
    assert plain["end"]["serial"] == "///"  # an absent port reads all ones
