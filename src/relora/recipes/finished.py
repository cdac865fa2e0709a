"""A model that is there to be used: the result of a run, a model folder or a hub id, with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from relora.data.tokenizer import load_tokenizer
from relora.device import choose_device
from relora.errors import UserError
from relora.model.load import dtype_named, max_positions, model_folder, open_model
from relora.recipes.run_folder import open_run

DEFAULT_LENGTH = 1024
"""Tokens a model is scored on at once where neither a run nor the model says how long it was trained."""


@dataclass(frozen=True)
class Finished:
    """A model on its device, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    sequence_length: int
    """Tokens per sequence in training: of a run its setting, of any other model its positions, 1024 at most."""

    @property
    def start_token(self) -> int:
        """What comes before the first token of a document: the tokenizer's BOS, else the EOS of the one before."""
        bos: int | None = self.tokenizer.bos_token_id
        eos: int = self.tokenizer.eos_token_id  # every tokenizer that `load_tokenizer` opens has one
        return eos if bos is None else bos

    def encode(self, text: str) -> list[int]:
        """The start token and the ids of `text`; `UserError` where the tokenizer gives an id that the model has not."""
        ids = [self.start_token, *self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        rows = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= rows:
            raise UserError(
                f"the tokenizer gives id {max(ids)} but the model has {rows} ids; they do not belong together"
            )
        return ids


def open_finished(
    model_or_run: str | Path, *, device: str = "auto", dtype: str = "fp32", trust_remote_code: bool = False
) -> Finished:
    """Open the model of a run folder (RUN/model), a model folder or a hub id.

    `trust_remote_code` runs code that comes with the model. What the run's own config.yaml says of it does not count
    here: the folder may be somebody else's.

    Raises:
        UserError: a run that has no model yet, or what `open_model`, `load_tokenizer` and `choose_device` refuse.
    """
    place, weights_dtype = choose_device(device), dtype_named(dtype)
    folder, length = Path(model_or_run), None
    if (folder / "config.yaml").is_file():
        run, config = open_run(folder)
        folder, length = run / "model", config.data.sequence_length
        if not folder.is_dir():
            raise UserError(f"{run}: has no model yet; finish the run, or write one with `relora export {run}`")
    else:
        folder = model_folder(model_or_run, trust_remote_code=trust_remote_code)
    model = open_model(folder, dtype=weights_dtype, trust_remote_code=trust_remote_code).to(place).eval()
    length = length or min(max_positions(model) or DEFAULT_LENGTH, DEFAULT_LENGTH)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    return Finished(model, tokenizer, length)
