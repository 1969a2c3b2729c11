#!/bin/sh
# Runs a command as an ordinary user who is in the group of /dev/kvm; root's to call, in a mount namespace of its own.
# as_user.sh UID GROUP FOLDER... -- COMMAND...: in the first of the folders; each is reachable for the user, even where a
# folder above it is closed (private homes are, and pytest's are, which closes them again whenever a session starts): the
# outermost closed one is covered by an open one in which only the way to these folders leads on. No folder's name may
# hold a newline. /dev/kvm gets the owner that a distribution gives it.
set -e
uid=$1 group=$2 work=$3
shift 2
mount -t tmpfs -o mode=755 tmpfs /mnt
count=0
: > /mnt/closed
while [ "$1" != -- ]; do
    closed= above=$1
    while [ "$above" != / ]; do
        case $(stat -c %A "$above") in *[xt]) ;; *) [ "$above" = "$1" ] || closed=$above ;; esac
        above=$(dirname "$above")
    done
    if [ -n "$closed" ]; then
        mkdir "/mnt/$count"
        mount --bind "$1" "/mnt/$count"
        printf '%s\n' "$1" > "/mnt/name$count"
        grep -qxF -- "$closed" /mnt/closed || printf '%s\n' "$closed" >> /mnt/closed
        count=$((count + 1))
    fi
    shift
done
shift
while read -r closed; do
    mount -t tmpfs -o mode=755 tmpfs "$closed"
done < /mnt/closed
while [ "$count" -gt 0 ]; do
    count=$((count - 1))
    read -r folder < "/mnt/name$count"
    [ -e "$folder/." ] || mkdir -p "$folder"
    mount --move "/mnt/$count" "$folder"
done
if [ -c /dev/kvm ]; then
    mknod -m 660 /mnt/kvm c 10 232 # linux/miscdevice.h: KVM_MINOR
    chgrp "$group" /mnt/kvm
    mount --bind /mnt/kvm /dev/kvm
fi
cd "$work"
exec setpriv --reuid="$uid" --regid="$uid" --groups="$group" --inh-caps=-all "$@"
