#!/bin/sh
# Runs a command as an ordinary user who is in the group of /dev/kvm; root's to call.
# as_user.sh FOLDER UID GROUP PREFIX COMMAND...: FOLDER is a scratch one, PREFIX that of the interpreter.
# All of it happens in a mount namespace of its own: an interpreter in a private home becomes reachable there, and
# /dev/kvm gets the owner that a distribution gives it.
set -e
scratch=$1 uid=$2 group=$3 prefix=$4
shift 4
mount -t tmpfs -o mode=755 tmpfs "$scratch"
if ! setpriv --reuid="$uid" --regid="$uid" --clear-groups test -x "$prefix/bin"; then
    top=/$(printf %s "$prefix" | cut -d/ -f2)
    mkdir "$scratch/prefix"
    mount --bind "$prefix" "$scratch/prefix"
    mount -t tmpfs -o mode=755 tmpfs "$top"
    mkdir -p "$prefix"
    mount --move "$scratch/prefix" "$prefix"
fi
if [ -c /dev/kvm ]; then
    mknod -m 660 "$scratch/kvm" c 10 232 # linux/miscdevice.h: KVM_MINOR
    chgrp "$group" "$scratch/kvm"
    mount --bind "$scratch/kvm" /dev/kvm
fi
exec setpriv --reuid="$uid" --regid="$uid" --groups="$group" --inh-caps=-all "$@"
