"""`relora generate` beside `transformers.generate`, on the same folder: tokens per second, and whole processes.

    python benchmarks/generation.py runs/quickstart/model
    python benchmarks/generation.py --preset llama-350m --tokens 32

Both sides continue one prompt in one process by turns, greedily and sampled, up to `--tokens` new ones; ours streams
its text, as the command does. Then several prompts: ours together, transformers' one after another and in a padded
batch; then the last of some turns of a chat, whose prompt transformers reads from its first token. Then each side is a
process of its own, from launch to end. Ratios above 1 mean that ours is faster; medians over the rounds, by wall-clock
time and by CPU time. Whether both sides gave the same tokens is printed beside them. A preset has random weights.
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from relora.inference.decoding import Sampling, continue_prompt, continue_prompts, end_token_ids
from relora.inference.loading import load_model_or_run
from relora.inference.rows import Heard
from relora.model import build_model
from relora.seeding import keyed_seed

PROMPT = "Once upon a time"
PROMPTS = [
    *("The old house stood at the end of the road", "In the morning", "She said that she had never seen", "There was"),
    *("Of all the rivers of the world", "When the war was over they", "A child", "It is a truth that nobody knows why"),
]
SHORT = 8
"""Tokens of the answer in a chat."""
Pair = tuple[tuple[float, float], tuple[float, float]]
"""Rates of the two sides, by wall-clock time and by CPU time."""
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder")
    parser.add_argument("--preset", help="a model of this shape with random weights instead, and with --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="folder")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = arguments.model or random_model(arguments.preset, arguments.tokenizer, Path(name))
        sides = Sides(model, arguments.tokens)
        for sampled in (False, True):
            show("sampled" if sampled else "greedy", "one prompt", *sides.one_prompt(sampled, arguments.rounds))
        show("greedy", "8 prompts, to one by one", *sides.prompts(False, arguments.rounds))
        show("greedy", "8 prompts, to a batch", *sides.prompts(True, arguments.rounds))
        show("greedy", "fifth turn of a chat", *sides.turns(arguments.rounds))
        for sampled in (False, True):
            whole_processes(model, arguments.tokens, arguments.rounds // 3, sampled)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    )


def random_model(preset: str, tokenizer: Path, folder: Path) -> str:
    """Write a model of a preset's shape."""
    build_model(preset, {}, seed=0).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return str(folder)


class Sides:
    """The two sides on one model, each opened as its users open it, in fp32.

    Args:
        tokens: the most that a text gets.
    """

    def __init__(self, model: str, tokens: int) -> None:
        self.loaded = load_model_or_run(model, device="cpu")
        self.theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.theirs.generation_config = GenerationConfig()
        self.tokens = tokens
        self.ends = end_token_ids(self.loaded.model, self.loaded.tokenizer)

    def one_prompt(self, sampled: bool, rounds: int) -> tuple[list[Pair], bool]:
        ids = self.loaded.encode(PROMPT)
        sampling = Sampling(max_new_tokens=self.tokens, do_sample=sampled)

        def ours() -> list[str]:
            return [continue_prompt(*self._opened, ids, sampling, 0, write=lambda text: None).text]

        def plain() -> list[str]:
            torch.manual_seed(keyed_seed(0, "sample", *ids))
            return self._generated([ids], sampled)

        return by_turns(ours, plain, rounds)

    def prompts(self, in_batch: bool, rounds: int) -> tuple[list[Pair], bool]:
        prompts = [self.loaded.encode(text) for text in PROMPTS]
        sampling = Sampling(max_new_tokens=self.tokens, do_sample=False)

        def ours() -> list[str]:
            return [each.text for each in continue_prompts(*self._opened, prompts, sampling, 0, lambda text: None)]

        def plain() -> list[str]:
            if in_batch:
                return self._generated(prompts, False)
            return [text for ids in prompts for text in self._generated([ids], False)]

        return by_turns(ours, plain, rounds)

    def turns(self, rounds: int) -> tuple[list[Pair], bool]:
        """Time a short answer after four questions with answers, which our side has heard."""
        begin, question = [
            [token for text in part for token in self.loaded.encode(text)] for part in (PROMPTS, [PROMPT])
        ]
        heard, before = Heard(), Sampling(max_new_tokens=self.tokens, do_sample=False)
        text = begin + self._ids(continue_prompt(*self._opened, begin, before, 0, heard=heard).text)
        sampling = Sampling(max_new_tokens=SHORT, do_sample=False)

        def ours() -> list[str]:
            return [continue_prompt(*self._opened, text + question, sampling, 0, heard=heard).text]

        def plain() -> list[str]:
            return self._generated([text + question], False, SHORT)

        return by_turns(ours, plain, rounds)

    @property
    def _opened(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        return self.loaded.model, self.loaded.tokenizer

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.loaded.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def _generated(self, prompts: list[list[int]], sampled: bool, tokens: int | None = None) -> list[str]:
        longest, padding = max(map(len, prompts)), self.ends[0]
        ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = {"do_sample": True, **SAMPLED} if sampled else {"do_sample": False}
        whole = self.theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens or self.tokens,
            eos_token_id=self.ends,
            pad_token_id=padding,
            **settings,
        )
        tokenizer = self.loaded.tokenizer
        decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in whole]
        return [
            text[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]
            for text, prompt in zip(decoded, prompts, strict=True)
        ]


def by_turns(ours: Callable[[], list[str]], plain: Callable[[], list[str]], rounds: int) -> tuple[list[Pair], bool]:
    """Time both sides by turns after one call of each; the rates, and whether the texts were the same."""
    same = ours() == plain()
    return [(rates(ours), rates(plain)) for _ in range(rounds)], same


def whole_processes(model: str, tokens: int, rounds: int, sampled: bool) -> None:
    kind = f"do_sample=True, **{SAMPLED}" if sampled else "do_sample=False"
    script = (
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({model!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32)\n"
        f"ids = tokenizer({PROMPT!r}, return_tensors='pt')\n"
        "whole = model.generate(input_ids=ids.input_ids, attention_mask=ids.attention_mask, "
        f"max_new_tokens={tokens}, {kind})\n"
        "print(tokenizer.decode(whole[0]))"
    )
    command = ["generate", model, "--prompt", PROMPT, "--max-new-tokens", str(tokens)]
    greedy = [] if sampled else ["--greedy"]
    ours = ["-c", "from relora.cli import main; main()", *command, *greedy, "--device", "cpu"]
    pairs = [(process_rates(ours), process_rates(["-c", script])) for _ in range(rounds)]
    if pairs:
        show("sampled" if sampled else "greedy", "whole processes", pairs)


def show(kind: str, what: str, pairs: list[Pair], same: bool | None = None) -> None:
    wall, cpu = (statistics.median(a[column] / b[column] for a, b in pairs) for column in (0, 1))
    texts = "" if same is None else ", the same text" if same else ", another text"
    print(f"{kind:8} {what:26} {wall:.2f} times as fast, {cpu:.2f} by CPU time{texts}", flush=True)


def rates(work: Callable[[], object]) -> tuple[float, float]:
    """How often `work` is done per second of wall-clock and of CPU time."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    work()
    return 1 / (time.perf_counter() - begin), 1 / (time.process_time() - cpu_begin)


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
