"""transformers.Trainer with PEFT: a random LLaMA, LoRA with dropout on all linear layers."""

import time
from pathlib import Path
from typing import Any

import peer
import peft
import torch
import transformers
from safetensors.torch import load_file


class TrainerPeer:
    packages = ("transformers", "peft", "accelerate", "safetensors")
    state = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    pickles = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin")
    saves_on_signal = True

    def prepare(self, work: Path) -> None:
        transformers.logging.set_verbosity_error()
        text = torch.frombuffer(bytearray((peer.CORPUS / "the-secret-garden.txt").read_bytes()), dtype=torch.uint8)
        rows = text[: len(text) // peer.WINDOW * peer.WINDOW].view(-1, peer.WINDOW).long()[:1000]
        self.data = [{"input_ids": row, "labels": row} for row in rows]

    def train(self, folder: Path, case: peer.Case) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=peer.STEPS,
            per_device_train_batch_size=peer.BATCH,
            learning_rate=2e-3,
            save_steps=peer.SAVE_EVERY,
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
        trainer = disturbed(case)(model(), arguments, train_dataset=self.data, callbacks=[Marks()])
        trainer.train(resume_from_checkpoint=bool(self.checkpoints(folder)))
        if trainer.state.global_step == peer.STEPS:
            trainer.save_model(str(folder / "final"))

    def checkpoints(self, folder: Path) -> list[Path]:
        return peer.by_number(folder, "checkpoint-*")

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "final" / "adapter_model.safetensors")


def model() -> peft.PeftModel:
    transformers.set_seed(0)
    shape = {"num_hidden_layers": peer.LAYERS, "hidden_size": peer.WIDTH, "num_attention_heads": peer.HEADS}
    config = transformers.LlamaConfig(
        **shape, vocab_size=peer.VOCABULARY, intermediate_size=peer.INNER, max_position_embeddings=peer.WINDOW
    )
    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


class Marks(transformers.TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        print(peer.BEGIN)


def disturbed(case: peer.Case) -> type[transformers.Trainer]:
    """A Trainer whose loss is slow, or once NaN."""

    class Disturbed(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(case.pause)
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if case.nan and self.state.global_step == peer.NAN_STEP - 1 else loss

    return Disturbed
