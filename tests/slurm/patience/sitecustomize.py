"""Make the first training of Mistral wait when it writes to its log, until it is asked to stop.

The file that `COPPICE_TEST_PATIENCE` names then holds the path of its log; later trainings find this file and do not
wait.
"""

import os
import signal
import sys
import time

LONGEST = 300


def hook(event, arguments):
    if event != "open" or arguments[1] != "a" or not str(arguments[0]).endswith("/training_log.txt"):
        return
    if "/Mistral/" not in str(arguments[0]):
        return
    try:
        file = os.open(os.environ["COPPICE_TEST_PATIENCE"], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    os.write(file, str(arguments[0]).encode())
    os.close(file)
    started = time.monotonic()
    while not signal.getsignal(signal.SIGTERM).__self__.asked and time.monotonic() - started < LONGEST:
        time.sleep(0.1)


if "COPPICE_TEST_PATIENCE" in os.environ:
    sys.addaudithook(hook)
