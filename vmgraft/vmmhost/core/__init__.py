"""The privileged core: vCPU, guest RAM, devices, trap BIOS and the verified disk.

It never loads, imports or evaluates anything that comes from an image, and it works whether or not
``vmgraft.vmmhost.layer`` exists. Start at :mod:`vmgraft.vmmhost.core.machine`.
"""
