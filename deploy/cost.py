"""What a run costs, by the price that you give: prices differ by region, contract and week, so none is written here.

    python3 -m deploy.cost --chips=4 --price=1.20 --hours=10
    python3 -m deploy.cost --chips=4 --price=1.20 --steps=64000 --batch_size=512 --images_per_second=9000

The speed is that of metrics.jsonl (`images_per_second`) or of `trainer.task --dry_run` on the same hardware.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

# v2 and v3 are asked for by core and have two on a chip.
_CORES_A_CHIP = 2


def units(job: dict[str, Any]) -> tuple[int, str]:
    """What a CustomJobSpec takes at once: a count, and of what (TPU chips, GPUs, or machines without either)."""
    found: dict[str, int] = {}
    for pool in job["workerPoolSpecs"]:
        machine, replicas = pool.get("machineSpec", {}), pool.get("replicaCount", 1)
        if topology := machine.get("tpuTopology"):
            count, name = 1, "chip"
            for side in topology.split("x"):
                count *= int(side)
        elif str(machine.get("acceleratorType", "")).startswith("TPU_"):
            count, name = machine["acceleratorCount"] // _CORES_A_CHIP, "chip"
        elif "acceleratorCount" in machine:
            count, name = machine["acceleratorCount"], "GPU"
        else:
            count, name = 1, "machine"
        found[name] = found.get(name, 0) + count * replicas
    # Machines beside chips or GPUs are not priced by these.
    name = max(found, key=lambda kind: (kind != "machine", found[kind]))
    return found[name], name


def most(job: dict[str, Any], price: float, trials: int = 1) -> str:
    """The most that a job can cost, from its timeout, in a line; `price` is for one chip, GPU or machine an hour."""
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
    chosen = parser.parse_args(argv)
    hours = chosen.hours
    if not hours:
        if not (chosen.steps > 0 and chosen.batch_size > 0 and chosen.images_per_second > 0):
            print("error: give --hours, or --steps, --batch_size and --images_per_second", file=sys.stderr)
            return 2
        hours = chosen.steps * chosen.batch_size / chosen.images_per_second / 3600
    if min(chosen.chips, chosen.price, hours) < 0:
        print("error: nothing of it can be below 0", file=sys.stderr)
        return 2
    print(f"{hours:,.2f} h x {chosen.chips} x {chosen.price:g} = {hours * chosen.chips * chosen.price:,.2f}")
    return 0


def price(text: str) -> float:
    """A price from a command line.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise ValueError(f"--price={text}: must be a number, such as 1.20")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
