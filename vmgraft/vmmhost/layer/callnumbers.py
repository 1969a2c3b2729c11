"""Numbers of the system calls that filters name: asm/unistd_64.h and asm-generic/unistd.h, as (x86_64, aarch64).

-1 stands where a machine has no such call.
"""

from __future__ import annotations

from typing import Final

#: What a worker may call once its module is compiled.
WORKER: Final = {
    "read": (0, 63), "write": (1, 64), "sendto": (44, 206), "recvfrom": (45, 207), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "futex": (202, 98),
    "clock_gettime": (228, 113), "getrandom": (318, 278), "restart_syscall": (219, 128), "getpid": (39, 172),
    "gettid": (186, 178), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

#: What the host may call once it is set up; the frequent ones first, since a filter is read from its beginning.
HOST: Final = {
    "ioctl": (16, 29), "read": (0, 63), "write": (1, 64), "sendto": (44, 206), "recvfrom": (45, 207),
    "futex": (202, 98), "clock_gettime": (228, 113), "ppoll": (271, 73), "poll": (7, -1), "pread64": (17, 67),
    "pwrite64": (18, 68), "sendmsg": (46, 211), "recvmsg": (47, 212), "select": (23, -1), "pselect6": (270, 72),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, -1), "epoll_pwait": (281, 22),
    "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70),
    "preadv2": (327, 286), "pwritev2": (328, 287), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "msync": (26, 227), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "setitimer": (38, 103), "getitimer": (36, 102), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, -1),
    "getrandom": (318, 278), "clone": (56, 220), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_setaffinity": (203, 122),
    "getcpu": (309, 168), "prctl": (157, 167), "exit": (60, 93), "exit_group": (231, 94), "getpid": (39, 172),
    "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "uname": (63, 160), "umask": (95, 166), "sysinfo": (99, 179), "getrusage": (98, 165),
    "prlimit64": (302, 261), "getrlimit": (97, 163), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "dup2": (33, -1), "dup3": (292, 24), "fcntl": (72, 25), "pipe2": (293, 59), "eventfd2": (290, 19),
    "memfd_create": (319, 279), "socketpair": (53, 199), "accept": (43, 202), "accept4": (288, 242),
    "getsockopt": (55, 209), "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205),
    "shutdown": (48, 210), "open": (2, -1), "openat": (257, 56), "stat": (4, -1), "lstat": (6, -1),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "fstatfs": (138, 44), "access": (21, -1),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, -1), "readlinkat": (267, 78),
    "getdents64": (217, 61), "getcwd": (79, 17), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fadvise64": (221, 223), "fsync": (74, 82), "fdatasync": (75, 83), "flock": (73, 32), "fchmod": (91, 52),
    "unlink": (87, -1), "unlinkat": (263, 35), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276),
    "kill": (62, 129), "tgkill": (234, 131), "pidfd_send_signal": (424, 424), "wait4": (61, 260),
    "waitid": (247, 95),
}  # fmt: skip

#: What nobody may call any more; named, so that it is refused with "not permitted" in place of "no such call".
REFUSED: Final = {
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "open_by_handle_at": (304, 265), "userfaultfd": (323, 282),
    "reboot": (169, 142), "swapon": (167, 224), "acct": (163, 89), "quotactl": (179, 60),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "iopl": (172, -1),
    "ioperm": (173, -1), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsmount": (432, 432), "fanotify_init": (300, 262), "personality": (135, 92), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "syslog": (103, 116), "sethostname": (170, 161),
}  # fmt: skip

#: Likewise, where the allow list is in force; a program that only has the list of `REFUSED` may need them.
REFUSED_TOO: Final = {
    "fork": (57, -1), "vfork": (58, -1), "socket": (41, 198), "bind": (49, 200), "connect": (42, 203),
    "listen": (50, 201), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159), "capset": (126, 91),
    "chmod": (90, -1), "fchmodat": (268, 53), "chown": (92, -1), "lchown": (94, -1), "fchown": (93, 55),
    "fchownat": (260, 54), "mknod": (133, -1), "mknodat": (259, 33), "link": (86, -1), "linkat": (265, 37),
    "symlink": (88, -1), "symlinkat": (266, 36), "mkdir": (83, -1), "mkdirat": (258, 34), "truncate": (76, 45),
    "setxattr": (188, 5),
}  # fmt: skip

ALL: Final[dict[str, tuple[int, int]]] = {**WORKER, **HOST, **REFUSED, **REFUSED_TOO}
