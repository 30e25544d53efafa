"""Run scripts in separate processes that start within milliseconds: they are forked from one process that has imported the libraries.

This file, run as a program, is that process. It computes nothing, because PyTorch's backward pass fails in a process that was forked from one
which had called it.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Forks:
    """The process that forks; `close` ends it."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, lines: list[list[str]], cwd: Path, output: Path, launched: bool = False) -> list[int]:
        """Run command lines at the same time, a process each, with this process's environment; return their exit codes.

        They write to `output`.out and `output`.err. If they are `launched`, they have the variables that `accelerate launch` sets.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        count = str(len(lines))
        several = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (several if launched else {})
        job = {"lines": lines, "cwd": str(cwd), "output": str(output), "launched": launched, "environment": environment}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def next_job() -> tuple[dict, int] | None:
    """Fork the processes of each job on stdin: returns the job and the rank in a child, and None in the parent at the end."""
    while line := sys.stdin.readline():
        job, children = json.loads(line), []
        for rank in range(len(job["lines"])):
            children.append(os.fork())
            if children[-1] == 0:
                return job, rank
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    return None


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import generate  # noqa: F401
    import train_des  # noqa: F401

    from diffusers import StableDiffusionPipeline  # noqa: F401

    gc.freeze()  # the children do not search the libraries' objects for garbage
    if given := next_job():
        job, rank = given
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if job["launched"] else {}
        os.environ.clear()
        os.environ.update(job["environment"] | ranks)
        os.chdir(job["cwd"])
        signal.alarm(600)  # a process whose peers have died would wait for hours
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.argv = job["lines"][rank]
        code = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)  # without freeing the libraries object by object, which takes longer than most scripts
