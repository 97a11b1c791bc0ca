"""What `mmtok check` finds of other people's codecs as their packages run them, and behind mmtok's mitigations.

Command:   python recipes/known_faults.py --out recipes/results
Networks:  small random ones of the packages' own classes (`recipes/peers/networks.py`): these are faults of the code,
           so no published weights are needed; --folders takes your own, e.g. --folders dac:/models/dac_16khz
Data:      the sentence that comes with mmtok.
Time:      half a minute on one core.
Result:    known-faults.json, known-faults.md and the table of README.md; `--smoke` writes below --out alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.networks import save_all
from tqdm import tqdm

import mmtok
from mmtok.bench.tables import markdown_table, replace_block
from mmtok.tokens import write_atomic

ROOT = Path(__file__).resolve().parents[1]
LAWS = ("padding", "naive cut", "chunking", "levels", "determinism", "exact size", "odd sizes", "delay")
SEEN = {"padding": "codes change with what else is in the batch", "determinism": "decoding twice gives two sounds"}
NAMES = {"encodec": "EnCodec", "dac": "DAC", "mimi": "Mimi", "snac": "SNAC"}
HEADER = ("codec", "law", "as its package runs it", "mitigated", "what is seen")


def measure(names: Sequence[str], seconds: float, seed: int) -> dict[str, dict[str, Any]]:
    """The reports of each name, raw and mitigated."""
    found = {}
    for name in tqdm(names, desc="known faults", unit="codec"):
        tokenizer: Any = mmtok.load(name)
        reports = {"raw": tokenizer.raw(), "mitigated": tokenizer}
        found[name] = {k: mmtok.check(t, LAWS, seconds=seconds, seed=seed).to_dict() for k, t in reports.items()}
    return found


def rows(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each law that a codec breaks as its package runs it."""
    table = []
    for name, reports in found.items():
        mitigated = {row["law"]: row for row in reports["mitigated"]["rows"]}
        for row in reports["raw"]["rows"]:
            if row["status"] != "broken":
                continue
            after = mitigated[row["law"]]
            family = name.partition(":")[0]
            cells = (NAMES.get(family, name), row["law"], rate(row), rate(after))
            note = SEEN.get(row["law"]) or row["note"].split("; ")[0]
            why = f"; mitigated: {after['note']}" if after["status"] == "not applicable" else ""
            table.append((*cells, note + why))
    return table


def rate(row: Mapping[str, Any]) -> str:
    return "-" if row["miss_rate"] is None else f"{row['miss_rate']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "recipes" / "results", help="where the results go")
    parser.add_argument("--folders", nargs="+", metavar="FAMILY:FOLDER", help="these instead of random networks")
    parser.add_argument("--seconds", type=float, default=0.5, help="longest sound (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and cuts (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a quick run that leaves README as it is")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # snac scripts a function at import
    seconds = 0.2 if args.smoke else args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        names = args.folders or [f"{family}:{path}" for family, path in save_all(Path(folder)).items()]
        found: dict[str, Any] = {}
        for name, reports in measure(names, seconds, args.seed).items():  # random ones: without the passing folder
            found[name if args.folders else name.partition(":")[0]] = reports
    table = markdown_table(HEADER, rows(found))
    write_atomic(args.out / "known-faults.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomic(args.out / "known-faults.md", (table + "\n").encode())
    if not args.smoke and not args.folders and args.out.resolve() == ROOT / "recipes" / "results":
        readme = ROOT / "README.md"
        write_atomic(readme, replace_block(readme.read_text(), "results:faults", table).encode())
    print(table)


if __name__ == "__main__":
    main()
