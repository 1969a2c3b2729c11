"""Kernels that the operator hands to the machine: multiboot, PVH, Linux; and the state they are entered in."""

from vmgraft.vmmhost.core.loaders.contract import BootModule, DirectBoot, Protocol
from vmgraft.vmmhost.core.loaders.entry import LoadedKernel
from vmgraft.vmmhost.core.loaders.select import load_kernel

__all__ = ["BootModule", "DirectBoot", "LoadedKernel", "Protocol", "load_kernel"]
