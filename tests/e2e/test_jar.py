"""A signed JAR and a launcher: grafted, they run and verify under Java as before."""

import subprocess
from pathlib import Path

import pytest

SOURCE = """
public class Hello {
    public static void main(String[] arguments) throws Exception {
        byte[] text = Hello.class.getResourceAsStream("/text.txt").readAllBytes();
        System.out.println("hello " + new String(text));
    }
}
"""
JOURNEYS = [("plain.jar", "sidecar"), ("signed.jar", "inline"), ("launcher.jar", "inline")]


@pytest.fixture(scope="module")
def jars(tmp_path_factory) -> Path:
    """A plain JAR, a signed one, and one behind a shell script that starts it."""
    folder = tmp_path_factory.mktemp("jars")
    (folder / "Hello.java").write_text(SOURCE)
    (folder / "text.txt").write_text("from a jar")
    secret = ("-keystore", "keys", "-storepass", "changeit")
    for command in (
        ("javac", "Hello.java"),
        ("jar", "cfe", "plain.jar", "Hello", "Hello.class", "text.txt"),
        ("cp", "plain.jar", "signed.jar"),
        ("keytool", "-genkeypair", *secret, "-keypass", "changeit", "-alias", "a", "-keyalg", "EC", "-dname", "CN=x"),
        ("jarsigner", *secret, "signed.jar", "a"),
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    script = b'#!/bin/sh\nexec java -jar "$0"\n'
    (folder / "launcher.jar").write_bytes(script + (folder / "plain.jar").read_bytes())
    (folder / "launcher.jar").chmod(0o755)
    return folder


@pytest.mark.parametrize(("name", "placement"), JOURNEYS)
def test_journey(cli, vendor: Path, jars: Path, clock: Path, tool, sha256, name: str, placement: str) -> None:
    jar = vendor / name
    jar.write_bytes((jars / name).read_bytes())
    jar.chmod(0o755)
    before = sha256(jar)
    cli("attach", jar, clock, "--key", vendor / "acme.key", "--placement", placement)
    assert sha256(jar) != before
    assert "hello from a jar" in tool("java", "-jar", jar)
    if name == "launcher.jar":
        assert "hello from a jar" in tool("sh", jar)
    if name == "signed.jar":
        assert "jar verified." in tool("jarsigner", "-verify", jar)
    assert "Hello.class" in tool("jar", "tf", jar)
    assert cli.json("list", jar)["state"] == "ok"
    cli("verify", jar, "--policy", vendor / "policy.json")
    assert cli.json("digest", jar)["sha256"] == before
    cli("detach", jar)
    assert sha256(jar) == before


def test_a_changed_entry_is_found_by_both(cli, vendor: Path, jars: Path, clock: Path, tool) -> None:
    jar = vendor / "signed.jar"
    jar.write_bytes((jars / "signed.jar").read_bytes())
    cli("attach", jar, clock, "--key", vendor / "acme.key")
    data = bytearray(jar.read_bytes())
    at = data.index(b"Hello.class") + len(b"Hello.class") + 40
    data[at] ^= 1
    jar.write_bytes(bytes(data))
    assert "jar verified." not in tool("jarsigner", "-verify", jar, code=None)
    cli("verify", jar, "--policy", vendor / "policy.json", code=12)


def test_an_archive_is_not_booted(cli, vendor: Path, jars: Path, clock: Path) -> None:
    jar = vendor / "plain.jar"
    jar.write_bytes((jars / "plain.jar").read_bytes())
    cli("attach", jar, clock, "--key", vendor / "acme.key")
    report = cli.json("run", jar, "--policy", vendor / "policy.json", "--cpu", "soft", "--timeout", "30", code=3)
    assert "nothing to boot" in report["error"]["message"]
