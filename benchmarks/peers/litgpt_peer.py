"""What `litgpt pretrain --data TextFiles --resume auto` calls, on a LLaMA in fp32.

Two things that litgpt always does are left out, since they take most of the time of so small a run and have no part in
resuming: `torch.compile` (by torch's own variable), and parsing the command line, at the start and for a second or so
again at every save for `hyperparameters.yaml` (a plain one is written).
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import peer
import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import TextFiles
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MODEL = Config(
    name="tiny",
    block_size=peer.WINDOW,
    n_layer=peer.LAYERS,
    n_embd=peer.WIDTH,
    n_head=peer.HEADS,
    intermediate_size=peer.INNER,
    vocab_size=peer.VOCABULARY,
    padded_vocab_size=peer.VOCABULARY,
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
    parallel_residual=False,
    rotary_percentage=1.0,
    bias=False,
)
TRAIN = TrainArgs(
    save_interval=peer.SAVE_EVERY,
    global_batch_size=peer.BATCH,
    micro_batch_size=peer.BATCH,
    max_tokens=peer.STEPS * peer.BATCH * peer.WINDOW,
    max_norm=1.0,
    lr_warmup_steps=5,
)


class LitGPTPeer:
    packages = ("litgpt", "lightning", "litdata", "fsspec")
    state = ("lit_model.pth",)
    pickles = ("lit_model.pth",)
    saves_on_signal = False

    def prepare(self, work: Path) -> None:
        self.tokenizer, self.text = work / "tokenizer", work / "text"
        self.tokenizer.mkdir()
        self.text.mkdir()
        byte_tokenizer().save(str(self.tokenizer / "tokenizer.json"))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>"}
        (self.tokenizer / "tokenizer_config.json").write_text(json.dumps(names))
        for name in ("the-wind-in-the-willows.txt", "the-secret-garden.txt"):
            shutil.copy(peer.CORPUS / name, self.text)

    def train(self, folder: Path, case: peer.Case) -> None:
        disturb(case)
        pretrain.setup(
            "tiny",
            model_config=MODEL,
            out_dir=folder,
            precision="32-true",
            resume="auto",
            data=TextFiles(self.text, num_workers=0),
            train=TRAIN,
            eval=EvalArgs(interval=1000, max_iters=1),
            devices=1,
            tokenizer_dir=self.tokenizer,
            logger_name="csv",
            seed=0,
        )

    def checkpoints(self, folder: Path) -> list[Path]:
        return peer.by_number(folder, "step-*")

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        return torch.load(folder / "final" / "lit_model.pth", weights_only=True)["model"]


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>")])
    return tokenizer


def disturb(case: peer.Case) -> None:
    """Wrap litgpt's training loop, loss and hyperparameters, in this process and for good."""
    fit, loss, calls = pretrain.fit, pretrain.chunked_cross_entropy, Counter[str]()

    def marked_fit(*args: Any, **kwargs: Any) -> None:
        print(peer.BEGIN)
        fit(*args, **kwargs)

    def disturbed_loss(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or args[0].is_meta:  # a validation, or a count of operations
            return loss(*args, **kwargs)
        calls["train"] += 1
        time.sleep(case.pause)
        return loss(*args, **kwargs) * (float("nan") if case.nan and calls["train"] == peer.NAN_STEP else 1.0)

    def plain_hyperparameters(_: Any, checkpoint: Path) -> None:
        (checkpoint / "hyperparameters.yaml").write_text(repr(TRAIN))

    pretrain.fit, pretrain.chunked_cross_entropy = marked_fit, disturbed_loss
    pretrain.save_hyperparameters = plain_hyperparameters
