"""Run a train.py as it is, nanoGPT's or ours, and time its iterations block by block.

    python benchmarks/iterations.py path/to/train.py --options...

The program runs in its own folder. Its standard output is watched for the lines `iter N:`
that both nanoGPT's and our train.py print at the end of each iteration; between two of them lies one
whole iteration, whatever it does. A line with a number n on standard input runs n iterations, and
prints their seconds as a JSON list; at the end of the input the program is stopped. With ITERATIONS_LOG=1
in the environment what else the program says goes to standard error. Needs nothing but Python, so
neither side's memory or threads are disturbed.
"""

import io
import json
import os
import runpy
import sys
import time
from pathlib import Path


class Watcher(io.TextIOBase):
    """Standard output for the program: counts its iterations, and holds it back between blocks."""

    def __init__(self) -> None:
        self.answers, self.orders = sys.stdout, sys.stdin
        self.took_s: list[float] = []
        self.wanted = 0
        self.started = 0.0
        self.rest = sys.stderr if os.environ.get("ITERATIONS_LOG") else None

    def write(self, text: str) -> int:
        if text.startswith("iter "):
            now = time.perf_counter()
            self.took_s.append(now - self.started)
            if len(self.took_s) >= self.wanted:
                self.next_block()
            self.started = time.perf_counter()
        elif self.rest and text.strip():
            print(text.strip(), file=self.rest)
        return len(text)

    def next_block(self) -> None:
        if self.wanted:
            print(json.dumps(self.took_s), file=self.answers, flush=True)
        order = self.orders.readline()
        if not order:
            raise SystemExit
        self.wanted, self.took_s = int(order), []


if __name__ == "__main__":
    program = Path(sys.argv[1]).resolve()
    sys.argv = [str(program), *sys.argv[2:]]
    sys.path[0] = str(program.parent)
    sys.stdout = Watcher()
    runpy.run_path(str(program), run_name="__main__")
