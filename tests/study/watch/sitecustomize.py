"""Make every Python process that has this file on its path note its start and the hosts it looks up or connects to.

Each note is a line [kind, what, command line] in the file that `COPPICE_TEST_WATCH` names. An audit hook sees what
Python code does, but not what native code does; a network namespace prevents that on machines that allow one.
"""

import ipaddress
import json
import os
import socket
import sys

LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")


def note(kind, what):
    line = json.dumps([kind, what, sys.orig_argv]) + "\n"
    file = os.open(os.environ["COPPICE_TEST_WATCH"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(file, line.encode())
    os.close(file)


def is_outside(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return False
    try:
        return not (ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified)
    except ValueError:
        return True


def hook(event, arguments):
    if event in CONNECTIONS:
        address = arguments[1]  # not a tuple if the socket is not an internet socket
        if isinstance(address, tuple) and is_outside(address[0]):
            note("outside", f"{event} {address[:2]}")
    elif event in LOOKUPS and is_outside(arguments[0]):
        note("outside", f"{event} {arguments[0]}")
    elif event == "import" and arguments[0] == "huggingface_hub":
        note("hub", os.environ.get("HF_HUB_OFFLINE"))


if "COPPICE_TEST_WATCH" in os.environ:
    note("started", os.getpid())
    sys.addaudithook(hook)
