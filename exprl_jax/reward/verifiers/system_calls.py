"""The filter of system calls (seccomp) in a program's sandbox, written by libseccomp.

What namespaces and resource limits leave open is refused here: sockets that no network namespace holds back, memory
that belongs to no process and so is counted nowhere, new namespaces, and calls that only serve attacks on the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import mmap
import socket
import tempfile

# Memory outside of any process's resident pages: System V segments and queues, files in memory, pages given to a pipe,
# watches on files, rings of asynchronous input and output.  Below: locks on files, of which Linux limits no number, and
# larger buffers of sockets.
_MEMORY = (
    "shmget shmat shmctl msgget msgsnd semget semop semtimedop mq_open memfd_create memfd_secret vmsplice"
    " inotify_add_watch io_setup io_uring_setup io_uring_enter io_uring_register"
).split()
# Rules about files and ports (landlock_create_ruleset, ..._add_rule, ..._restrict_self), of which each takes memory; by
# number, the same on every architecture, because older libraries have no name for them.
_RULES = (444, 445, 446)
_LOCKS = (fcntl.F_SETLK, fcntl.F_SETLKW, 37, 38)  # the last two: F_OFD_SETLK, F_OFD_SETLKW
_BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF, 32, 33)  # the last two: SO_SNDBUFFORCE, SO_RCVBUFFORCE
_NAMESPACES = (
    "unshare setns mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr"
).split()
_CLONE_NEW = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_ATTACKS = (
    "ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd bpf perf_event_open userfaultfd keyctl add_key"
    " request_key name_to_handle_at open_by_handle_at fanotify_init quotactl acct swapon swapoff reboot init_module"
    " finit_module delete_module kexec_load kexec_file_load syslog lookup_dcookie modify_ldt iopl ioperm move_pages"
    " migrate_pages"
).split()
_MAP_HUGETLB = 0x40000
_LOW_32_BITS = 0xFFFFFFFF


@functools.cache
def filter_program() -> bytes:
    """The filter, in the form that bubblewrap's `--seccomp` reads; for this machine's architecture, no other's calls.

    Raises:
      ValueError: libseccomp, or its binding, is not installed.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{error}: install libseccomp2 and pyseccomp") from None
    Arg, NE, MASKED_EQ = pyseccomp.Arg, pyseccomp.NE, pyseccomp.MASKED_EQ
    refused = pyseccomp.ERRNO(errno.EPERM)
    calls = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    calls.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for name in (*_MEMORY, *_RULES, *_NAMESPACES, *_ATTACKS):
        calls.add_rule(refused, name)
    for name in ("socket", "socketpair"):
        calls.add_rule(pyseccomp.ERRNO(errno.EAFNOSUPPORT), name, Arg(0, NE, socket.AF_UNIX))
    # A shared page outlives its place in the resident set (MADV_DONTNEED), and huge ones are never in it.
    shared = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    calls.add_rule(refused, "mmap", Arg(3, MASKED_EQ, shared, shared))
    calls.add_rule(refused, "mmap", Arg(3, MASKED_EQ, _MAP_HUGETLB, _MAP_HUGETLB))
    for command in _LOCKS:
        # The kernel reads 32 bits of what a filter sees 64 of.
        calls.add_rule(refused, "fcntl", Arg(1, MASKED_EQ, _LOW_32_BITS, command))
    for option in _BUFFERS:
        level = Arg(1, MASKED_EQ, _LOW_32_BITS, socket.SOL_SOCKET)
        calls.add_rule(refused, "setsockopt", level, Arg(2, MASKED_EQ, _LOW_32_BITS, option))
    for flag in _CLONE_NEW:
        calls.add_rule(refused, "clone", Arg(0, MASKED_EQ, flag, flag))
    # Its flags lie in memory, where a filter cannot read them; the C library falls back to clone.
    calls.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        calls.export_bpf(file)
        file.seek(0)
        return file.read()
