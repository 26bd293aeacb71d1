"""What a run costs at a price that you give.

Prices differ by region, contract and week, so none is written here.

    python3 -m deploy.cost --chips=4 --price=1.20 --hours=10
    python3 -m deploy.cost --chips=4 --price=1.20 --steps=64000 \\
        --batch_size=512 --images_per_second=9000

The speed is that of metrics.jsonl (`images_per_second`) or of `trainer.task --dry_run` on the
same hardware.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from deploy import hardware


def units(job: dict[str, Any]) -> tuple[int, str]:
    """The hardware that a CustomJobSpec uses at once: a count of "chip", "GPU" or "machine"."""
    cores_per_chip = {tpu.accelerator: tpu.cores_per_chip or 1 for tpu in hardware.TPUS.values() if tpu.accelerator}
    counts: dict[str, int] = {}
    for pool in job["workerPoolSpecs"]:
        machine, replicas = pool.get("machineSpec", {}), pool.get("replicaCount", 1)
        if topology := machine.get("tpuTopology"):
            count, name = hardware.chips_of(topology), "chip"
        elif cores := cores_per_chip.get(machine.get("acceleratorType", "")):
            count, name = machine["acceleratorCount"] // cores, "chip"
        elif "acceleratorCount" in machine:
            count, name = machine["acceleratorCount"], "GPU"
        else:
            count, name = 1, "machine"
        counts[name] = counts.get(name, 0) + count * replicas
    # A price for chips or GPUs does not cover machines without them.
    name = max(counts, key=lambda kind: (kind != "machine", counts[kind]))
    return counts[name], name


def maximum(job: dict[str, Any], price: float, trials: int = 1) -> str:
    """The most that a job can cost within its timeout, as one line of arithmetic.

    Args:
        job: a CustomJobSpec.
        price: of one chip, GPU or machine an hour, in any currency.
        trials: how many times the job may run, for a study.
    """
    count, name = units(job)
    hours = float(job.get("scheduling", {}).get("timeout", "604800s").rstrip("s")) / 3600
    each = f"{count} {name}{'s' if count > 1 else ''} x {hours:g} h x {price:g} = {count * hours * price:,.2f}"
    if trials == 1:
        return f"at most {each}"
    return f"at most {trials} trials x {each} = {trials * count * hours * price:,.2f}"


def main(argv: list[str] | None = None) -> int:
    """Prints hours and cost; returns 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python3 -m deploy.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--chips", type=int, default=1, help="chips, GPUs or machines that the price is for")
    parser.add_argument("--price", type=float, required=True, help="of one of them an hour, in any currency")
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=0)
    parser.add_argument("--images_per_second", type=float, default=0.0)
    options = parser.parse_args(argv)
    hours = options.hours
    if not hours:
        if not (options.steps > 0 and options.batch_size > 0 and options.images_per_second > 0):
            print("error: give --hours, or --steps, --batch_size and --images_per_second", file=sys.stderr)
            return 2
        hours = options.steps * options.batch_size / options.images_per_second / 3600
    if min(options.chips, options.price, hours) < 0:
        print("error: no value may be below 0", file=sys.stderr)
        return 2
    print(f"{hours:,.2f} h x {options.chips} x {options.price:g} = {hours * options.chips * options.price:,.2f}")
    return 0


def parse_price(text: str) -> float:
    """The price in a command line.

    Raises:
        ValueError: it is not a number, or below 0.
    """
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise ValueError(f"--price={text}: must be a number, such as 1.20")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
