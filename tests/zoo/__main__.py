"""Runs the zoo, keeps its outcomes in outcomes.json, and writes docs/models.md from them.

python -m tests.zoo                        # every family: about 20 minutes on one core
python -m tests.zoo --only llama mamba     # some; the others keep their outcomes
python -m tests.zoo --document             # only write docs/models.md anew
"""

import argparse

from tests.zoo.document import DOCUMENT, document
from tests.zoo.outcomes import OUTCOMES, read_outcomes, write_outcomes
from tests.zoo.run import run_zoo
from tests.zoo.stages import STAGES
from tests.zoo.tiny_models import FAMILIES


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Run every family of causal LMs.")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", help="run these families alone")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--document", action="store_true", help="run nothing; write docs/models.md from outcomes.json")
    arguments = parser.parse_args()
    records = read_outcomes()
    if not arguments.document:
        for record in run_zoo(arguments.only or FAMILIES, jobs=arguments.jobs):
            records[record["family"]] = record
            print_record(record)
            write_outcomes({family: records[family] for family in FAMILIES if family in records})
        print(f"outcomes in {OUTCOMES}")
    DOCUMENT.write_text(document(read_outcomes()), encoding="utf-8")
    print(f"table in {DOCUMENT}")


def print_record(record: dict[str, object]) -> None:
    """Print a family, and each of its stages that was not ok."""
    stages = record.get("stages")
    if not isinstance(stages, dict):
        print(f"{record['family']}: cannot be built: {record['cannot_be_built']}", flush=True)
        return
    passed = sum(stages[name]["outcome"] == "ok" for name in STAGES)
    print(f"{record['family']}: {passed} of {len(STAGES)} stages ok", flush=True)
    for name, found in stages.items():
        if found["outcome"] in ("refused", "failed"):
            print(f"    {name} {found['outcome']}: {found['text']} {found['place']}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
