"""The services behind the trap BIOS: each INT is a function here, called while the guest waits in a ROM stub."""
