"""`relora generate` beside `transformers.generate`, on the same folder: tokens per second, and whole processes.

    python benchmarks/generation.py runs/quickstart/model

Both sides continue one prompt in one process by turns, greedily and sampled, up to `--tokens` new ones; ours streams
its text, as the command does. Then each side is a process of its own, from launch to end. Ratios above 1 mean that ours
is faster; medians over the rounds, by wall-clock time and by CPU time.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora.inference.decoding import Sampling, continue_prompt
from relora.inference.loading import load_model_or_run

PROMPT = "Once upon a time"
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for sampled in (False, True):
        in_one_process(arguments.model, arguments.tokens, arguments.rounds, sampled)
        whole_processes(arguments.model, arguments.tokens, arguments.rounds // 3, sampled)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    )


def in_one_process(model: str, tokens: int, rounds: int, sampled: bool) -> None:
    loaded = load_model_or_run(model, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = loaded.encode(PROMPT)
    prompt = torch.tensor([ids])
    sampling = Sampling(max_new_tokens=tokens, do_sample=sampled)

    def ours() -> int:
        return continue_prompt(loaded.model, loaded.tokenizer, ids, sampling, 0, write=lambda text: None).tokens

    def plain() -> int:
        settings = {"do_sample": True, **SAMPLED} if sampled else {"do_sample": False}
        whole = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            **settings,
        )
        return len(whole[0]) - len(ids)

    ours(), plain()
    pairs = [(rates(ours), rates(plain)) for _ in range(rounds)]
    show(sampled, "tokens per second", pairs)


def whole_processes(model: str, tokens: int, rounds: int, sampled: bool) -> None:
    kind = f"do_sample=True, **{SAMPLED}" if sampled else "do_sample=False"
    script = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = (c.from_pretrained({model!r}) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        f"ids = tokenizer({PROMPT!r}, return_tensors='pt')\n"
        "whole = model.generate(input_ids=ids.input_ids, attention_mask=ids.attention_mask, "
        f"max_new_tokens={tokens}, {kind})\n"
        "print(tokenizer.decode(whole[0]))"
    )
    command = ["generate", model, "--prompt", PROMPT, "--max-new-tokens", str(tokens)]
    greedy = [] if sampled else ["--greedy"]
    ours = ["-c", "from relora.cli import main; main()", *command, *greedy, "--device", "cpu"]
    pairs = [(process_rates(ours), process_rates(["-c", script])) for _ in range(rounds)]
    show(sampled, "whole processes", pairs)


def show(sampled: bool, what: str, pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    wall, cpu = (statistics.median(a[column] / b[column] for a, b in pairs) for column in (0, 1))
    print(
        f"{'sampled' if sampled else 'greedy':8} {what:18} {wall:.2f} times as fast, {cpu:.2f} by CPU time", flush=True
    )


def rates(work: Callable[[], int]) -> tuple[float, float]:
    """What `work` makes per second of wall-clock and of CPU time."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    made = work()
    return made / (time.perf_counter() - begin), made / (time.process_time() - cpu_begin)


def process_rates(arguments: list[str]) -> tuple[float, float]:
    """The same of a process that is done once."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1 / wall, 1 / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    main()
