"""Kill a search at random moments, and check that nothing is lost and nothing is done twice.

    python benchmarks/tune_kills.py --kills 20 --trials 8

A tiny model is fine-tuned by `relora tune`. The search is killed (SIGKILL, the worker alone or all its processes) at a
random moment, started again by the same command, and so on; then it is left to its end. Every loss that the storage
held at a kill must be there at the end, every trial must be finished once, and the losses must be those of a search
that nobody disturbed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import yaml

from relora.data.pretraining.prepare import prepare
from relora.data.tokenizer import load_tokenizer
from relora.model.load import build_model
from relora.model.save import save_model

Losses = dict[int, dict[int, float]]
SPACE = {
    "optimizer.lowrank_lr": {"low": 0.1, "high": 10, "log": True, "of": "optimizer.lowrank_lr"},
    "lowrank.r": [2, 4, 8],
}


def write_inputs(folder: Path) -> Path:
    """Write a model, records, a space and a configuration of twelve steps."""
    corpus = Path(__file__).parents[1] / "corpus"
    prepare([str(corpus)], folder / "prepared", tokenizer=None, train_tokenizer=512, validation=0.2, take=2)
    tokenizer = load_tokenizer(str(folder / "prepared" / "train" / "tokenizer"))
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    save_model(build_model("llama-9m", shape, seed=0, eos_token_id=tokenizer.eos_token_id), folder / "base", tokenizer)
    records = [{"prompt": f"Count to {n}.", "response": ", ".join(map(str, range(n % 5)))} for n in range(1, 25)]
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    tree = {
        "output_dir": str(folder / "study"),
        "task": "instruct",
        "model": {"path": str(folder / "base")},
        "data": {"train": str(folder / "records.json"), "validation_share": 0.2, "template": "plain"},
        "lowrank": {"r": 4},
        "schedule": {"total_steps": 12, "warmup_steps": 0},
        "optimizer": {"lowrank_lr": 2e-3},
        "batch": {"sequences": 4, "micro_sequences": 4},
        "samples": {"examples": 0},
        "log": {"every_steps": 1, "trackers": []},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def start(config: Path, study: str, trials: int) -> "subprocess.Popen[bytes]":
    """Start the search in a session of its own."""
    command = [sys.executable, "-c", "from relora.cli import main; main()", "tune", str(config)]
    command += ["--space", str(config.with_name("space.yaml")), "--trials", str(trials), "--rungs", "0.5,1"]
    command += [f"output_dir={config.with_name(study)}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def losses(config: Path, study: str) -> tuple[Losses, list[str]]:
    """Return the losses and the state of every trial that the storage holds."""
    file = config.with_name(study) / "study.db"
    if not file.is_file():
        return {}, []
    try:
        trials = optuna.load_study(study_name=study, storage=f"sqlite:///{file}").trials
    except (KeyError, optuna.exceptions.StorageInternalError):  # the search has only begun
        return {}, []
    return {trial.number: dict(trial.intermediate_values) for trial in trials}, [trial.state.name for trial in trials]


def descendants(process: int) -> list[int]:
    """Return the processes that a process has started, and theirs."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def main() -> None:
    """Run the campaign and print what was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--trials", type=int, default=8)
    options.add_argument("--seconds", type=float, default=20, help="longest time from a start to its kill")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    draws = random.Random(given.seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        config = write_inputs(Path(name))
        seen: Losses = {}
        killed = lost = 0
        while killed < given.kills:
            process = start(config, "study", given.trials)
            try:
                process.wait(draws.uniform(0, given.seconds))
                break  # the search has come to its end first
            except subprocess.TimeoutExpired:
                some = [process.pid, *(descendants(process.pid) if draws.random() < 0.5 else [])]
                for one in some:
                    try:
                        os.kill(one, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                process.wait()
                killed += 1
                time.sleep(0.5)
            now, _ = losses(config, "study")
            lost += sum(now.get(number, {}).get(at) != loss for number, own in seen.items() for at, loss in own.items())
            seen = now
        assert start(config, "study", given.trials).wait() == 0
        ended, states = losses(config, "study")
        lost += sum(ended[number].get(at) != loss for number, own in seen.items() for at, loss in own.items())
        assert start(config, "calm", given.trials).wait() == 0
        calm, _ = losses(config, "calm")
        unfinished = sum(state not in ("COMPLETE", "PRUNED") for state in states)
        print(f"{killed} kills: {lost} losses lost, {len(states)} trials of {given.trials}, {unfinished} not finished")
        print(f"losses equal to those of an undisturbed search: {ended == calm}")


if __name__ == "__main__":
    main()
