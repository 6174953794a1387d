"""A command of a study as a process of its own, which ends when the study does, however that ended.

`python -m safediffusion.study.child WORDS`: `safediffusion WORDS`, with a pipe as standard input that the study holds open and writes nothing
to. Where the study is killed, by force as well, the kernel closes the pipe; the command is then interrupted, and keeps its last checkpoint.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _end_with_the_study() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    try:
        runpy.run_module("safediffusion", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while it is imported; later the command says it
        print("interrupted; the same command again goes on where it stopped", file=sys.stderr)
        sys.exit(130)
