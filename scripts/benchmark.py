"""Benchmark training steps, predictions, augmentation, memory, planning, conversion and comparison.

Where times are compared, contenders take turns within one run, after warm-up rounds, so that other load on the machine
affects all of them alike. Prints the machine, medians, and ratios beside their limits; -o writes all of it as JSON.
docs/benchmarks.md explains the output.

    python scripts/benchmark.py step --threads 2 --precision float32 bfloat16
    python scripts/benchmark.py step --device cuda --compile
    python scripts/benchmark.py memory --device cuda
    python scripts/benchmark.py predict --threads 2
    python scripts/benchmark.py bspline
    python scripts/benchmark.py data
    python scripts/benchmark.py plans
    python scripts/benchmark.py brats
    python scripts/benchmark.py compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from benchmarks import brats, bspline, compare, data, memory, plans, predict, step
from benchmarks.arguments import add_common, check
from benchmarks.report import write
from benchmarks.timing import BenchmarkError

SUBCOMMANDS = {
    "step": step,
    "memory": memory,
    "predict": predict,
    "bspline": bspline,
    "data": data,
    "plans": plans,
    "brats": brats,
    "compare": compare,
}
# one thread, as in a worker process for augmentation
THREADS = {"bspline": 1, "data": 1}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="{" + ",".join(SUBCOMMANDS) + "}")
    for name, module in SUBCOMMANDS.items():
        line = (module.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=line, description=line)
        module.add_arguments(subparser)
        add_common(subparser, THREADS.get(name))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    module = SUBCOMMANDS[parsed.subcommand]
    try:
        check(parsed)
        if parsed.threads is not None:
            torch.set_num_threads(parsed.threads)
        report = module.run(parsed)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    report["command"] = ["benchmark.py", *(sys.argv[1:] if arguments is None else arguments)]
    if parsed.output is not None:
        write(report, parsed.output)
    print(module.as_table(report))


if __name__ == "__main__":
    main()
