"""Several processes beside one, and low rank beside full rank on a slow link: whole runs by the product's own commands.

    python benchmarks/ranks.py scaling                 # one process, two processes, one thread each
    python benchmarks/ranks.py link --rate 1gbit       # two network namespaces as two machines (Linux, root)

`scaling` divides the tokens per second of `--ranks` processes by those of one, for each method. `link` runs two
processes in namespaces that a pair of virtual cards connects, whose rate `tc` limits, and puts the measured step beside
the bound: the measured step without a limit, and the bytes that it sends over the rate.

All figures are medians over the steps of every run after the first `--skip`, which make moments and buckets; runs of
the sides take turns. The methods are full rank with AdamW, and the package's default at low rank from scratch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from relora.data.pretraining.prepare import prepare

METHODS = ("full", "relora")
HOSTS = ("10.9.0.1", "10.9.0.2")


def config_of(arguments: argparse.Namespace, method: str, folder: Path, data: Path) -> Path:
    """Write the configuration of a run of one side."""
    sequences = arguments.tokens // arguments.length
    train, validation = (str(data / part) for part in ("train", "validation"))
    tree = {
        "output_dir": str(folder),
        "model": {
            "preset": "llama-9m",
            "vocab_size": arguments.vocabulary,
            "hidden_size": arguments.hidden,
            "intermediate_size": round(arguments.hidden * 8 / 3 / 16) * 16,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": arguments.hidden // 64,
        },
        "data": {"train": train, "validation": validation, "sequence_length": arguments.length},
        "method": method,
        "lowrank": {"r": arguments.rank, "lora_alpha": arguments.rank},
        "warm_start": {"steps": 0},
        "schedule": {"total_steps": arguments.steps, "warmup_steps": 1},
        "optimizer": {"lr": 1e-4},
        "batch": {"sequences": sequences, "micro_sequences": min(sequences, arguments.micro)},
        "precision": {"dtype": "fp32", "frozen": "fp32"},
        "checkpoint": {"every_steps": arguments.steps},
        "evaluate": {"every_steps": arguments.steps, "tokens": 1000},
        "log": {"every_steps": 1, "trackers": []},
        "samples": {"prompts": []},
        "distributed": {"strategy": "replicate"},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return file


def metrics(folder: Path, skip: int) -> list[dict[str, Any]]:
    """Read the records of the steps that count."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train" and record["step"] > skip]


def run(commands: Sequence[Sequence[str]]) -> None:
    """Run commands side by side with one thread each; exit with what the first one that fails has said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    pipes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    said = [pipe.communicate()[0] for pipe in pipes]
    for pipe, text in zip(pipes, said, strict=True):
        if pipe.returncode:
            sys.exit(text)


def launched(ranks: int, config: Path) -> list[list[str]]:
    """Build the command of a run on so many processes of this machine."""
    product = ["-m", "relora", "pretrain", str(config), "--quiet"]
    if ranks == 1:
        return [[sys.executable, *product]]
    return [[sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *product]]


def on_two_hosts(config: Path) -> list[list[str]]:
    """Build the commands of a run on two namespaces."""
    # gloo asks for the address of the host's name, which is that of the real machine: it is told the card instead
    launcher = ["env", "GLOO_SOCKET_IFNAME=card", sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    launcher += ["--nproc-per-node=1", f"--master-addr={HOSTS[0]}", "--master-port=29511"]
    product = ["-m", "relora", "pretrain", str(config), "--quiet"]
    return [["ip", "netns", "exec", f"relora{node}", *launcher, f"--node-rank={node}", *product] for node in range(2)]


@contextmanager
def two_hosts() -> Iterator[None]:
    """Make two network namespaces, `relora0` and `relora1`, that a pair of virtual cards connects."""
    names = [f"relora{node}" for node in range(2)]
    try:
        for name in names:
            run_system("ip", "netns", "add", name)
        run_system(
            "ip", "link", "add", "card", "netns", names[0], "type", "veth", "peer", "name", "card", "netns", names[1]
        )
        for name, address in zip(names, HOSTS, strict=True):
            run_system("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "card")
            for device in ("card", "lo"):
                run_system("ip", "-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def limit(rate: str | None) -> None:
    """Limit what each namespace sends to a rate of `tc`; None takes the limit away."""
    for node in range(2):
        inside = ["ip", "netns", "exec", f"relora{node}", "tc", "qdisc"]
        subprocess.run([*inside, "del", "dev", "card", "root"], check=False, capture_output=True)
        if rate is not None:
            run_system(*inside, "add", "dev", "card", "root", "tbf", "rate", rate, "burst", "1mb", "latency", "100ms")


def run_system(*command: str) -> None:
    """Run a command of the system; exit with its message if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")


def bytes_per_second(rate: str) -> float:
    """Convert a rate of `tc` in gbit or mbit."""
    factors = {"gbit": 1e9 / 8, "mbit": 1e6 / 8}
    return float(rate[:-4]) * factors[rate[-4:]]


def scaling(arguments: argparse.Namespace, place: Path, data: Path) -> None:
    """Print the tokens per second of several processes relative to those of as many times one."""
    seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    peaks: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for turn in range(arguments.turns):
        for method in arguments.methods:
            for ranks in (1, *arguments.ranks):
                folder = place / f"{method}-{ranks}-{turn}"
                run(launched(ranks, config_of(arguments, method, folder, data)))
                found = metrics(folder, arguments.skip)
                seconds[method, ranks] += [record["step_seconds"] for record in found]
                peaks[method, ranks] += [record["peak_memory_bytes"] for record in found]
    print(f"{'method':8} {'ranks':>5} {'s/step':>8} {'of as many times one':>21} {'peak of a rank':>15}")
    for (method, ranks), of_steps in seconds.items():
        step = statistics.median(of_steps)
        share = statistics.median(seconds[method, 1]) / ranks / step
        print(f"{method:8} {ranks:5} {step:8.3f} {share:21.3f} {max(peaks[method, ranks]) / 1e9:12.2f} GB")


def link(arguments: argparse.Namespace, place: Path, data: Path) -> None:
    """Print the step of both methods with and without a limit of the link, beside its bound."""
    seconds: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
    sent: dict[str, int] = {}
    with two_hosts():
        for turn in range(arguments.turns):
            for method in METHODS:
                for rate in (None, arguments.rate):
                    limit(rate)
                    folder = place / f"{method}-{rate}-{turn}"
                    run(on_two_hosts(config_of(arguments, method, folder, data)))
                    found = metrics(folder, arguments.skip)
                    seconds[method, rate] += [record["step_seconds"] for record in found]
                    sent[method] = found[-1]["reduced_bytes"]
    print(f"{arguments.tokens} tokens a step, 2 hosts, {arguments.rate}")
    print(f"{'method':8} {'MB':>7} {'no limit':>9} {'limited':>8} {'bound':>8} {'limited/bound':>14}")
    for method in METHODS:
        free, slow = (statistics.median(seconds[method, rate]) for rate in (None, arguments.rate))
        bound = free + sent[method] / bytes_per_second(arguments.rate)  # a ring of two sends each byte once
        print(f"{method:8} {sent[method] / 1e6:7.1f} {free:9.2f} {slow:8.2f} {bound:8.2f} {slow / bound:14.3f}")
    full, low = (statistics.median(seconds[method, arguments.rate]) for method in METHODS)
    print(f"bytes of full rank / low rank: {sent['full'] / sent['relora']:.2f}; steps per second: {full / low:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scaling", "link"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of `scaling`")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rate", default="1gbit", help="of the link, as `tc` writes it, in gbit or mbit")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, all processes together")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--micro", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skip", type=int, default=2, help="first steps of each run that do not count")
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(__file__).parents[1] / "corpus"
        prepare([str(corpus)], Path(name) / "data", tokenizer=None, train_tokenizer=4096, validation=0.01)
        {"scaling": scaling, "link": link}[arguments.what](arguments, Path(name), Path(name) / "data")


if __name__ == "__main__":
    main()
