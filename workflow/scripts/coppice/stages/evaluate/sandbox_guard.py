"""Take away a process's rights, then run the program that it gets on its standard input; see `sandbox`.

This file is a script: it runs in a new Python without Coppice and without installed packages.

    python -I -S sandbox_guard.py FD TOKEN MEBIBYTES SECONDS FOLDER PREFIX < program

It writes TOKEN to the file descriptor FD if the program came to its end, else what stopped it. With the one word
`landlock` it only says, by its exit status, whether the kernel has Landlock.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # numbers of the system calls, the same on all processors
VERSION, PATH_BENEATH, NO_NEW_PRIVILEGES = 1, 1, 38
EXECUTE, READ_FILE, READ_FOLDER = 1, 4, 8
# version of Landlock -> the number of rights over files that it knows, of which each is a bit
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
RIGHTS_NOW = 16
TCP = 3  # to bind and to connect, from version 4 on
SCOPES = 3  # abstract sockets, and signals to other processes, from version 6 on


def main(words: list[str]) -> None:
    """Run the program on the standard input under the limits that the words give."""
    if words == ["landlock"]:
        sys.exit(0 if landlock_version() > 0 else 1)
    verdict, token, memory, seconds, folder, prefix = words
    program = sys.stdin.buffer.read().decode()
    confine(folder, prefix)
    limit(int(memory), int(float(seconds)) + 1)
    del sys.argv[1:]

    def stop(*_: object) -> None:
        os.write(int(verdict), b"timed out")
        os._exit(1)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        os.write(int(verdict), f"{type(error).__name__}: {error}"[:200].encode(errors="replace"))
        os._exit(1)
    os.write(int(verdict), token.encode())
    os._exit(0)


def limit(memory: int, seconds: int) -> None:
    """Limit memory, in MiB, seconds of the processor, processes and files; the hard limits cannot be raised again."""
    limits = {resource.RLIMIT_AS: memory * 2**20, resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: 2**24}
    limits |= {resource.RLIMIT_NPROC: 0, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0}
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def landlock_version() -> int:
    """Return the version of Landlock that the kernel has; below 1 if it has none."""
    if sys.platform != "linux":
        return 0
    return ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION)


def confine(folder: str, prefix: str) -> None:
    """Restrict this process to its folder, and to reading Python's own files, if the kernel can."""
    version = landlock_version()
    if version < 1:
        return
    system, every = ctypes.CDLL(None, use_errno=True), 2 ** RIGHTS.get(version, RIGHTS_NOW) - 1
    handled = struct.pack("QQQ", every, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    handled = handled[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = checked(system.syscall(CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0))
    readable = (prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
    for place, rights in [(folder, every), *((path, EXECUTE | READ_FILE | READ_FOLDER) for path in readable)]:
        if not os.path.exists(place):
            continue
        rights = rights if os.path.isdir(place) else rights & (EXECUTE | READ_FILE)
        beneath = os.open(place, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, beneath)
        checked(system.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0))
        os.close(beneath)
    checked(system.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    checked(system.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def checked(result: int) -> int:
    """Return what a system call returned; raise OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
