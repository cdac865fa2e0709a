"""Kills, corruption, full disks and hostile files against the nearest peers, resumed as their manuals say.

    python -m venv trainer && trainer/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
    trainer/bin/python benchmarks/peers_faults.py --peer trainer --trials 30 --seed 0
    python -m venv litgpt && litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13 litdata==0.2.59
    litgpt/bin/python benchmarks/peers_faults.py --peer litgpt --trials 30 --seed 0 --other-disk /dev/shm

`trainer` is transformers.Trainer with PEFT: a random LLaMA, LoRA on all linear layers with dropout 0.05,
`full_determinism`, safetensors, `save_total_limit=2`, and `train(resume_from_checkpoint=True)` as soon as there is a
checkpoint. `litgpt` is what `litgpt pretrain --data TextFiles --resume auto` calls, on a model of the same shape in
fp32. The two cannot share an environment: litgpt wants an older huggingface-hub. Both train 40 steps on the
repository's corpus and save every 5 steps, with one thread; every run is a process of its own, forked after the
imports, in which the peer's own code runs. Two things that litgpt always does are left out, since they take most of the
time of so small a run and have no part in resuming: `torch.compile` (by torch's own variable), and parsing the command
line, at the start and for a second or so again at every save for `hyperparameters.yaml` (a plain one is written).
A save takes a larger share of so short a run than of a long one, so that more of the random kills meet one: the
second set of kills, all aimed at saves, is the one to compare.

A trial ends with the weights at the end compared with those of the run that nobody disturbed. The part with the full
disk mounts a tmpfs and is left out where that is not allowed.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment of every run; set before torch is imported."""
os.environ.update(SETTINGS)

import torch  # noqa: E402  (reads the environment at import)

CORPUS = Path(__file__).parents[1] / "corpus"
STEPS, SAVE_EVERY, BATCH, WINDOW = 40, 5, 4, 64
VOCABULARY = 257
"""The bytes, and one token for the beginning of a text."""
LAYERS, WIDTH, HEADS, INNER = 2, 64, 4, 176
NAN_STEP = 23
STOPPED_AT = 20
"""The newest checkpoint of the run folder that corruption starts from; the one of step 15 lies beside it."""
TIMEOUT = 180.0
"""Seconds after which a run counts as hung."""
BEGIN = "@@begin"
"""Printed into the log of a run when its training loop starts."""


@dataclass(frozen=True)
class Case:
    """How one run differs from the undisturbed one."""

    nan: bool = False
    """One loss is NaN, at step NAN_STEP."""
    pause: float = 0.0
    """Seconds more that a forward pass takes, for what takes seconds to react."""
    signal_saves: bool = False
    """The peer's own saving on SIGTERM, where it has one (off by default there)."""


class Peer(Protocol):
    """What the campaigns need of a trainer."""

    packages: tuple[str, ...]
    state: tuple[str, ...]
    """Files of a checkpoint that hold what a run goes on with."""
    pickles: tuple[str, ...]
    """Files of a checkpoint that a hostile pickle may stand in for."""
    saves_on_signal: bool

    def prepare(self, work: Path) -> None:
        """Lay down the data, once."""

    def train(self, folder: Path, case: Case) -> None:
        """Train to the end, from the newest checkpoint where there is one. Runs in a process of its own."""

    def checkpoints(self, folder: Path) -> list[Path]:
        """From old to new, by the number in the name, whole or not."""

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """What was trained, at the end."""


class TrainerPeer:
    """transformers.Trainer with PEFT."""

    packages = ("transformers", "peft", "accelerate", "safetensors")
    state = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    pickles = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin")
    saves_on_signal = True

    def prepare(self, work: Path) -> None:
        import peft  # noqa: F401  (imported before the fork, as is all that training imports)
        import transformers
        from transformers import LlamaForCausalLM, Trainer  # noqa: F401

        transformers.logging.set_verbosity_error()
        text = torch.frombuffer(bytearray((CORPUS / "the-secret-garden.txt").read_bytes()), dtype=torch.uint8)
        rows = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW).long()[:1000]
        self.data = [{"input_ids": row, "labels": row} for row in rows]

    def train(self, folder: Path, case: Case) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

        class Marks(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                print(BEGIN)

        class Poisoned(Trainer):
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                time.sleep(case.pause)
                loss = super().compute_loss(*args, **kwargs)
                return loss * float("nan") if case.nan and self.state.global_step == NAN_STEP - 1 else loss

        set_seed(0)
        shape = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS}
        config = LlamaConfig(**shape, vocab_size=VOCABULARY, intermediate_size=INNER, max_position_embeddings=WINDOW)
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            save_steps=SAVE_EVERY,
            save_total_limit=2,
            logging_steps=1,
            full_determinism=True,
            seed=0,
            data_seed=0,
            enable_jit_checkpoint=case.signal_saves,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        model = get_peft_model(LlamaForCausalLM(config), lora)
        trainer = Poisoned(model, arguments, train_dataset=self.data, callbacks=[Marks()])
        trainer.train(resume_from_checkpoint=bool(self.checkpoints(folder)))
        if trainer.state.global_step == STEPS:
            trainer.save_model(str(folder / "final"))

    def checkpoints(self, folder: Path) -> list[Path]:
        return by_number(folder, "checkpoint-*")

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(folder / "final" / "adapter_model.safetensors")


class LitGPTPeer:
    """`litgpt pretrain`."""

    packages = ("litgpt", "lightning", "litdata", "fsspec")
    state = ("lit_model.pth",)
    pickles = ("lit_model.pth",)
    saves_on_signal = False

    def prepare(self, work: Path) -> None:
        import litdata  # noqa: F401  (imported before the fork)
        import litgpt.pretrain  # noqa: F401
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken("<s>")])
        self.tokenizer, self.text = work / "tokenizer", work / "text"
        self.tokenizer.mkdir()
        self.text.mkdir()
        tokenizer.save(str(self.tokenizer / "tokenizer.json"))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>"}
        (self.tokenizer / "tokenizer_config.json").write_text(json.dumps(names))
        for name in ("the-wind-in-the-willows.txt", "the-secret-garden.txt"):
            shutil.copy(CORPUS / name, self.text)

    def train(self, folder: Path, case: Case) -> None:
        from litgpt import pretrain
        from litgpt.args import EvalArgs, TrainArgs
        from litgpt.config import Config
        from litgpt.data import TextFiles

        fit, loss, calls = pretrain.fit, pretrain.chunked_cross_entropy, Counter[str]()

        def marked_fit(*args: Any, **kwargs: Any) -> None:
            print(BEGIN)
            fit(*args, **kwargs)

        def marked_loss(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or args[0].is_meta:
                return loss(*args, **kwargs)
            calls["train"] += 1
            time.sleep(case.pause)
            poisoned = case.nan and calls["train"] == NAN_STEP
            return loss(*args, **kwargs) * (float("nan") if poisoned else 1.0)

        def quick_hyperparameters(_: Any, checkpoint: Path) -> None:
            (checkpoint / "hyperparameters.yaml").write_text(repr(train))

        pretrain.fit, pretrain.chunked_cross_entropy = marked_fit, marked_loss
        pretrain.save_hyperparameters = quick_hyperparameters
        model = Config(
            name="tiny",
            block_size=WINDOW,
            n_layer=LAYERS,
            n_embd=WIDTH,
            n_head=HEADS,
            intermediate_size=INNER,
            vocab_size=VOCABULARY,
            padded_vocab_size=VOCABULARY,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            parallel_residual=False,
            rotary_percentage=1.0,
            bias=False,
        )
        train = TrainArgs(
            save_interval=SAVE_EVERY,
            global_batch_size=BATCH,
            micro_batch_size=BATCH,
            max_tokens=STEPS * BATCH * WINDOW,
            max_norm=1.0,
            lr_warmup_steps=5,
        )
        pretrain.setup(
            "tiny",
            model_config=model,
            out_dir=folder,
            precision="32-true",
            resume="auto",
            data=TextFiles(self.text, num_workers=0),
            train=train,
            eval=EvalArgs(interval=1000, max_iters=1),
            devices=1,
            tokenizer_dir=self.tokenizer,
            logger_name="csv",
            seed=0,
        )

    def checkpoints(self, folder: Path) -> list[Path]:
        return by_number(folder, "step-*")

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        return torch.load(folder / "final" / "lit_model.pth", weights_only=True)["model"]


PEERS: dict[str, type[TrainerPeer] | type[LitGPTPeer]] = {"trainer": TrainerPeer, "litgpt": LitGPTPeer}


def by_number(folder: Path, pattern: str) -> list[Path]:
    """Folders that match, in the order of the number at the end of their names."""
    return sorted(folder.glob(pattern), key=number)


def number(checkpoint: Path) -> int:
    """The step a checkpoint's name claims."""
    return int(checkpoint.name.rsplit("-", 1)[1])


class Run:
    """One process that trains in `folder`; its words go to a log beside it."""

    def __init__(self, peer: Peer, folder: Path, case: Case) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True, parents=True)
        self.log = folder.with_name(folder.name + ".log")
        self.log.write_text("")
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._child(peer, case)

    def _child(self, peer: Peer, case: Case) -> None:
        """Never returns: the status is that of a Python script which did the same."""
        status = 1
        try:
            words = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(words, 1)
            os.dup2(words, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            peer.train(self.folder, case)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    @property
    def over(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def until(self, happens: Callable[[], bool], seconds: float = TIMEOUT) -> bool:
        """Wait for something, or the end, or the time. True where it happened."""
        end = time.monotonic() + seconds
        while not (happened := happens()) and not self.over and time.monotonic() < end:
            time.sleep(0.0003)
        return happened

    def begun(self) -> bool:
        return self.until(lambda: BEGIN in self.log.read_text(errors="replace"))

    def send(self, which: signal.Signals) -> None:
        if not self.over:
            os.kill(self.pid, which)

    def finish(self) -> int | None:
        """Exit status (negative: the signal), or None where it hung and was killed."""
        self.until(lambda: False)
        if self.over:
            return self.status
        self.send(signal.SIGKILL)
        self.until(lambda: False)
        return None

    @property
    def why(self) -> str:
        """The last line of the log, without the figures and paths in it."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines[-1] if lines else "").split("/")[0][:90]


@dataclass
class Lab:
    """A peer, its undisturbed run, and what the trials have shown."""

    peer: Peer
    work: Path
    draw: random.Random
    goal: dict[str, torch.Tensor] = field(default_factory=dict)
    train_seconds: float = 0.0
    save_seconds: float = 0.0
    rows: list[tuple[str, int, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    trial: int = 0

    def fresh(self, source: Path | None = None) -> Path:
        """A new run folder, empty or a copy."""
        self.trial += 1
        folder = self.work / f"run-{self.trial}"
        if source is not None:
            shutil.copytree(source, folder)
        return folder

    def go(self, folder: Path, case: Case = Case()) -> Run:
        """Train to the end and wait for it."""
        run = Run(self.peer, folder, case)
        run.finish()
        return run

    def distance(self, folder: Path) -> float:
        """Largest difference from the undisturbed weights; NaN counts as infinite, 0.0 means equal bits."""
        ours = self.peer.weights(folder)
        if ours.keys() != self.goal.keys():
            return float("inf")
        if all(torch.equal(ours[name].view(torch.uint8), self.goal[name].view(torch.uint8)) for name in ours):
            return 0.0
        gap = max((ours[name].double() - self.goal[name].double()).abs().max().item() for name in ours)
        return gap if gap == gap else float("inf")

    def judge(self, run: Run, campaign: str) -> str:
        """What became of a run that was to end with the undisturbed weights."""
        if run.status is None:
            return "hung"
        if run.status != 0:
            self.reasons[f"{campaign}: {run.why}"] += 1
            return "not resumed"
        gap = self.distance(run.folder)
        return "bit-equal" if gap == 0 else "equal to 1e-6" if gap <= 1e-6 else "another result"

    def report(self, fault: str, outcomes: list[str]) -> None:
        """One row of the table; the folders of its trials are removed."""
        words = ", ".join(f"{what} {count}" for what, count in Counter(outcomes).most_common())
        self.rows.append((fault, len(outcomes), words))
        print(f"{time.strftime('%H:%M:%S')} {fault}: {len(outcomes)} trials: {words}", file=sys.stderr, flush=True)
        for folder in self.work.glob("run-*"):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def measure(lab: Lab) -> None:
    """The undisturbed run, three times: its weights, its time, and the time a save takes."""
    folders = [lab.fresh() for _ in range(3)]
    for folder in folders:
        run = Run(lab.peer, folder, Case())
        run.begun()
        begin = time.monotonic()
        spans = watch_saves(lab, run)
        if run.finish() != 0:
            sys.exit(f"the undisturbed run failed: {run.log.read_text()[-3000:]}")
        lab.train_seconds = time.monotonic() - begin
        lab.save_seconds = statistics.median(spans)
        if not lab.goal:
            lab.goal = lab.peer.weights(folder)
    same = [lab.distance(folder) == 0 for folder in folders]
    lab.report("none (is it reproducible?)", ["bit-equal" if equal else "another result" for equal in same])


def watch_saves(lab: Lab, run: Run) -> list[float]:
    """For every checkpoint of the run, the seconds from its folder's appearance to the last change of its state."""
    first: dict[str, float] = {}
    last: dict[str, tuple[float, object]] = {}
    while not run.over:
        for checkpoint in lab.peer.checkpoints(run.folder)[-1:]:  # the older ones are only ever removed
            seen = listing(checkpoint, lab.peer.state)
            first.setdefault(checkpoint.name, time.monotonic())
            if last.get(checkpoint.name, (0.0, None))[1] != seen:
                last[checkpoint.name] = (time.monotonic(), seen)
        time.sleep(0.0003)
    return [last[name][0] - first[name] for name in first]


def listing(folder: Path, names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Names and sizes of those files that are there."""
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found.append((name, (folder / name).stat().st_size))
    return found


AT_RANDOM, IN_SAVE, AT_FILE = "at a random time of training", "while it saves", "as the first file of state appears"


def kills(lab: Lab, trials: int, aim: str) -> None:
    """SIGKILL at a random time of the training, of a save, or as the first state file appears; then resume."""
    campaign = f"SIGKILL {aim}"
    outcomes: list[str] = []
    while len(outcomes) < trials:
        folder = lab.fresh()
        run = Run(lab.peer, folder, Case())
        run.begun()
        if aim == AT_RANDOM:
            time.sleep(lab.draw.uniform(0, lab.train_seconds))
        else:
            step = lab.draw.randrange(SAVE_EVERY, STEPS, SAVE_EVERY)
            awaited = lab.peer.state if aim == AT_FILE else ("",)
            run.until(lambda step=step, folder=folder, awaited=awaited: appeared(lab, folder, step, awaited))
            time.sleep(lab.draw.uniform(0, lab.save_seconds) if aim == IN_SAVE else 0)
        run.send(signal.SIGKILL)
        if run.finish() == 0:
            continue  # it was done before the blow: no trial
        outcomes.append(lab.judge(lab.go(folder), campaign))
    lab.report(campaign, outcomes)


def appeared(lab: Lab, folder: Path, step: int, names: tuple[str, ...]) -> bool:
    """Whether the checkpoint of a step, or one of these files in it, is there ("" is the folder)."""
    return any(bool(listing(path, names)) for path in lab.peer.checkpoints(folder) if number(path) == step)


def stopped(lab: Lab) -> Path:
    """A run folder whose newest checkpoint, of step STOPPED_AT, is whole: resumed, it gives the undisturbed weights."""
    while True:
        folder = lab.fresh()
        run = Run(lab.peer, folder, Case(pause=0.1))
        run.until(lambda folder=folder: STOPPED_AT in map(number, lab.peer.checkpoints(folder)))
        time.sleep(0.25 + lab.save_seconds)
        run.send(signal.SIGKILL)
        run.finish()
        if number(lab.peer.checkpoints(folder)[-1]) == STOPPED_AT:
            template = lab.work / "stopped"
            folder.rename(template)
            return template


CORRUPTIONS = ("bit flip", "zeroed page", "truncation", "deletion")


def damage(path: Path, kind: str, draw: random.Random) -> bool:
    """Harm one file. False where its bytes are what they were."""
    sound = path.read_bytes()
    harmed = bytearray(sound)
    if kind == "deletion":
        path.unlink()
        return True
    if kind == "bit flip":
        harmed[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
    elif kind == "zeroed page":
        start = draw.randrange(0, len(sound), 4096)
        harmed[start : start + 4096] = bytes(len(sound[start : start + 4096]))
    else:
        del harmed[draw.randrange(len(sound)) :]
    path.write_bytes(harmed)
    return bytes(harmed) != sound


def corruption(lab: Lab, template: Path, trials: int) -> None:
    """Harm the files of state of the newest checkpoint in turn, `trials` times for a kind; delete every file once."""
    names = sorted(path.name for path in lab.peer.checkpoints(template)[-1].iterdir())
    state = lab.peer.state
    plan = [(kind, state[i % len(state)]) for kind in CORRUPTIONS[:3] for i in range(trials)]
    plan += [("deletion", name) for name in names]
    outcomes: dict[str, list[str]] = {kind: [] for kind in CORRUPTIONS}
    per_file: dict[str, Counter[str]] = {name: Counter() for name in names}
    for kind, name in plan:
        folder = lab.fresh(template)
        while not damage(lab.peer.checkpoints(folder)[-1] / name, kind, lab.draw):
            pass
        outcome = judge_corruption(lab, lab.go(folder), kind)
        outcomes[kind].append(outcome)
        per_file[name][outcome] += 1
        shutil.rmtree(folder)
    for kind in CORRUPTIONS:
        lab.report(f"{kind} in the newest checkpoint", outcomes[kind])
    for name, counts in per_file.items():
        words = ", ".join(f"{what} {count}" for what, count in counts.most_common())
        lab.rows.append((f"… of these in `{name}`", counts.total(), words))


def judge_corruption(lab: Lab, run: Run, kind: str) -> str:
    """Refused, or passed over in silence with or without harm."""
    if run.status is None:
        return "hung"
    if run.status < 0:
        return f"killed by signal {-run.status}"
    if run.status != 0:
        lab.reasons[f"{kind}: {run.why}"] += 1
        return "run ends with an error"
    return "no error, same result" if lab.distance(run.folder) == 0 else "NO ERROR, ANOTHER RESULT"


def terminations(lab: Lab, trials: int, case: Case, title: str) -> None:
    """SIGTERM at a random time: status, whether the step reached was saved, and what the resumed run gives."""
    seconds = lab.train_seconds + STEPS * case.pause
    outcomes: list[str] = []
    while len(outcomes) < trials:
        folder = lab.fresh()
        run = Run(lab.peer, folder, case)
        run.begun()
        time.sleep(lab.draw.uniform(0, 0.5 * seconds if case.signal_saves else seconds))
        sent = time.time()
        run.send(signal.SIGTERM)
        status = run.finish()
        if status == 0 and (folder / "final").exists():
            continue  # it was done before the signal: no trial
        extra = any(newest.stat().st_mtime > sent for newest in lab.peer.checkpoints(folder)[-1:])
        after = lab.judge(lab.go(folder), title)
        outcomes.append(f"status {status} / {'saved' if extra else 'nothing saved'} / resumed {after}:")
    lab.report(title, outcomes)


def not_a_number(lab: Lab) -> None:
    """One NaN loss: what the weights at the end are worth."""
    run = lab.go(lab.fresh(), Case(nan=True))
    if run.status == 0:
        ended = lab.peer.weights(run.folder).values()
        bad = sum(not tensor.isfinite().all() for tensor in ended)
        outcome = f"exit status 0, {bad} of {len(ended)} trained tensors not finite at the end"
    else:
        outcome = f"exit status {run.status}: {run.why}"
    lab.report(f"one NaN loss (step {NAN_STEP})", [outcome])


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of 64 MB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(lab: Lab, template: Path, trials: int) -> None:
    """Resume with less room than one checkpoint takes; then make room and resume again."""
    newest = lab.peer.checkpoints(template)[-1]
    need = sum(path.stat().st_size for path in newest.iterdir())
    first, after, by_hand = [], [], []
    for i in range(trials):
        with small_disk(lab.work / f"disk-{lab.trial}-{i}") as disk:
            folder = disk / "run"
            shutil.copytree(template, folder)
            left = int(need * (i + 0.5) / trials)
            room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            with (disk / "ballast").open("wb") as ballast:
                ballast.write(bytes(room - left))
            run = lab.go(folder)
            first.append(f"status {run.status}")
            (disk / "ballast").unlink()
            after.append(lab.judge(lab.go(folder), "full disk"))
            if after[-1] != "bit-equal":
                torn = [path for path in lab.peer.checkpoints(folder) if number(path) > STOPPED_AT]
                for path in torn:
                    shutil.rmtree(path)
                by_hand.append(lab.judge(lab.go(folder), "full disk, torn checkpoint removed by hand"))
    lab.report("disk full while it saves: the run", first)
    lab.report("disk full: room made, resumed", after)
    if by_hand:
        lab.report("disk full: resumed after a person removed the torn checkpoint", by_hand)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def hostile_pickles(lab: Lab, template: Path) -> None:
    """Every pickled file in turn replaced by one that runs code, with and without torch's guard taken off."""
    for title, unguarded in (("", False), (" with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1", True)):
        outcomes = []
        for name in lab.peer.pickles:
            folder = lab.fresh(template)
            checkpoint, mark = lab.peer.checkpoints(folder)[-1], folder.with_suffix(".mark")
            torch.save(Payload(mark), checkpoint / name)
            if name == "adapter_model.bin":
                (checkpoint / "adapter_model.safetensors").unlink()
            if unguarded:
                os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
            run = lab.go(folder)
            os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
            fate = "EXECUTED" if mark.exists() else "refused" if run.status else "not read"
            outcomes.append(f"`{name}` {fate}")
        lab.report(f"hostile pickle{title}", outcomes)


def other_disk(lab: Lab, trials: int, room: Path) -> None:
    """Kills aimed at the file itself, with the runs on another file system than the temporary folder."""
    with tempfile.TemporaryDirectory(dir=room) as place:
        home, lab.work = lab.work, Path(place)
        kills(lab, trials, AT_FILE)
        fault, count, words = lab.rows.pop()
        lab.rows.append((f"{fault}, TMPDIR on another file system", count, words))
        lab.work = home


def campaigns(lab: Lab, arguments: argparse.Namespace) -> None:
    """All of it, in the order of the table."""
    measure(lab)
    kills(lab, arguments.trials, AT_RANDOM)
    kills(lab, arguments.trials, IN_SAVE)
    if arguments.other_disk:
        other_disk(lab, arguments.trials // 2, arguments.other_disk)
    template = stopped(lab)
    lab.report(f"SIGKILL between two saves (step {STOPPED_AT})", [lab.judge(lab.go(lab.fresh(template)), "template")])
    corruption(lab, template, arguments.corruptions // 3)
    terminations(lab, arguments.terminations, Case(), "SIGTERM")
    if lab.peer.saves_on_signal:
        paced = Case(pause=0.2, signal_saves=True)
        terminations(lab, arguments.terminations, paced, "SIGTERM, enable_jit_checkpoint")
    not_a_number(lab)
    if os.geteuid() == 0:
        full_disk(lab, template, arguments.disks)
    hostile_pickles(lab, template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
    parser.add_argument("--trials", type=int, default=30, help="kills, at random times and again aimed at saves")
    parser.add_argument("--corruptions", type=int, default=90, help="flips, zeroed pages and truncations together")
    parser.add_argument("--terminations", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--disks", type=int, default=10, help="fill levels of a small disk")
    parser.add_argument("--other-disk", type=Path, help="a folder on another file system than TMPDIR, such as /dev/shm")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(dir=place)  # killed runs leave litter there
        peer = PEERS[arguments.peer]()
        peer.prepare(Path(place))
        lab = Lab(peer, Path(place), random.Random(arguments.seed))
        campaigns(lab, arguments)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *peer.packages))
    print(f"\n{arguments.peer}: {versions}; Python {sys.version.split()[0]}, seed {arguments.seed}")
    print(f"{lab.train_seconds:.2f} s of training a run, {1000 * lab.save_seconds:.0f} ms a save, ", end="")
    print(f"{time.monotonic() - began:.0f} s in all\n\n| fault | trials | outcome |\n|---|---|---|")
    for fault, count, words in lab.rows:
        print(f"| {fault} | {count} | {words} |")
    print("\nLast lines of the runs that ended with an error:")
    for reason, count in lab.reasons.most_common():
        print(f"- {count} x {reason}")


if __name__ == "__main__":
    main()
