"""Merging an adapter into a model folder, and unmerging it, with one tensor in memory at a time.

    W' = W + s B A        with DoRA: m (W + s B A) / |W + s B A|, row by row

The base's files are copied. Then each weight that the adapter changes is read, changed in fp32 or better, cast once to
the dtype it is stored in, checked to be finite and written over its old value (`stored_model`).

`relora_merge.json` in the merged folder records which adapter was merged into which base, with sha256 sums. If the base
still exists, unmerging copies its weights back, bit for bit. If it does not, unmerging computes W' - s B A, with the
rounding errors of two casts: each weight is off by at most eps (of the stored dtype) times the largest entry of its
tensor. DoRA and modules that were trained in full replace weights, which cannot be undone by subtraction.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.base_model import base_folder, warn_of_another_base
from relora.adapters.compatibility import changes_alike, check_fits, tied_groups, tied_names, warn_of_notes
from relora.adapters.multi_adapter import Adapters
from relora.adapters.own_tokenizer import warn_of_what_stays_behind
from relora.adapters.peft_format import CONFIG, TENSORS, read_adapter
from relora.adapters.stored_model import (
    INDEX,
    StoredModel,
    StoredTensor,
    copy_and_hash,
    copy_without_weights,
    new_model_folder,
    sha256,
)
from relora.adapters.untie import untied_tensors, write_untied
from relora.adapters.whole_tensors import settled
from relora.errors import NonFinite, UserError
from relora.files.atomic import write_json
from relora.files.untrusted import MB, inside, read_json
from relora.model.load import max_positions, model_folder, open_model
from relora.seeding import keyed_generator

RECORD = "relora_merge.json"
"""File in a merged folder that says what was merged into what."""

_MOST_ROUNDING = 0.25
"""Share of an adapter's effect on the logits that may be rounded away without a warning."""
_CHECK_ROWS, _CHECK_LENGTH = 2, 16
"""Shape of the batch of random tokens on which a merged model is compared with base + adapter."""

_log = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]
"""Function from a stored tensor to the tensor that is to replace it, in fp32 or better."""


@dataclass(frozen=True)
class MergeReport:
    """Report on a merge."""

    out: str
    base: str
    adapter: str
    layers: int
    """Number of linear layers with a low-rank update."""
    full_tensors: int
    """Number of tensors replaced by those that were trained in full."""
    bytes: int
    """Size of all weight files of the merged model."""
    largest_logit_difference: float | None
    """Largest absolute difference between the logits of base + adapter and of the merged model, both in fp32; None if
    it was not measured."""
    tokens: int
    """Number of tokens on which the difference was measured."""
    untied: list[str] = field(default_factory=list)
    """Names of the weights that were tied in the base and are not in the merged model, since the adapter changes them
    under one name alone."""


@dataclass(frozen=True)
class UnmergeReport:
    """Report on an unmerge."""

    out: str
    base: str
    """The base's name in the record of the merge."""
    adapter: str
    """The adapter's name in the record of the merge."""
    exact: bool
    """The weights are those of the base, bit for bit."""
    error_bound: float
    """Upper bound of the absolute error of a weight; 0 if exact."""


@dataclass(frozen=True)
class Record:
    """Content of relora_merge.json; sums are sha256."""

    base: str
    """Whole path of the base folder, or its hub id."""
    adapter: str
    """Whole path of the adapter folder."""
    adapter_sum: str
    """Sum over both files of the adapter (see `adapter_sum`)."""
    base_files: dict[str, str]
    """Sums of the base's weight files by their names."""
    merged_files: dict[str, str]
    """Sums of the merged model's weight files by their names."""
    untied: list[str] = field(default_factory=list)
    """Names of the weights that were tied in the base and are not in the merged model."""


def merge_adapter(
    adapter_folder: str | Path, out: str | Path, *, base: str | Path | None = None, check: bool = True
) -> MergeReport:
    """Write the model folder `out`: that of `base` with an adapter merged into its weights.

    Args:
        base: folder or hub id of the base model; by default the one that the adapter names.
        check: compare the logits of base + adapter with those of the merged model, unless the weights in fp32 take
            more than half of main memory.

    Raises:
        UserError: the adapter does not fit the base, an adapter is merged into `base` already, no base is known, or
            `out` exists.
        NonFinite: a merged weight is not finite in the dtype in which it is stored, or logits are not finite.
        RunStopped: the disk refuses the write. In each case nothing is left behind.
    """
    folder, out = Path(adapter_folder), Path(out)
    adapter = read_adapter(folder)
    base = base or adapter.base
    if not base:
        raise UserError(f"{folder}: does not name its base model; give it by --base")
    warn_of_another_base(folder, adapter.base, base)
    revision = adapter.revision if base == adapter.base else None
    stored = StoredModel(base_folder(base, revision))
    if (stored.folder / RECORD).exists():
        earlier = _read_record(stored.folder)
        raise UserError(
            f"{base}: {earlier.adapter} is merged into it already; merge into {earlier.base}, or combine the adapters"
        )
    check_fits(adapter, stored.model, folder)
    warn_of_notes(folder, adapter, stored.model)
    warn_of_what_stays_behind(folder, stored.folder)
    layers = len(adapter.layers)
    unsettled = adapter
    adapter = settled(adapter, lambda key: stored.find(key).read(), lambda key: tied_names(stored.model, key), folder)
    changes = _changes(stored, adapter, lambda weight, factors: factors.added_to(weight))
    untied = _untied_names(stored, adapter, changes)
    difference: float | None = None
    with new_model_folder(out) as partial:
        base_files = stored.copy_to(partial)
        added = untied_tensors(stored, lambda name, old: _changed(name, old, changes)) if untied else {}
        _write_changes([(stored.find(key), change) for key, change in changes.items() if key not in added], partial)
        names = write_untied(partial, added, stored) if untied else list(base_files)
        merged_files = {name: sha256(partial / name) or "" for name in names}
        summed = adapter_sum(folder) or ""
        record = Record(
            _full_name(stored.folder if revision else base),
            _full_name(folder),
            summed,
            base_files,
            merged_files,
            untied,
        )
        write_json(partial / RECORD, asdict(record))
        if check and 4 * stored.parameters < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
            difference = _largest_logit_difference(stored, unsettled, folder, partial)
    return MergeReport(
        out=str(out),
        base=str(base),
        adapter=str(folder),
        layers=layers,
        full_tensors=len(adapter.others),
        untied=untied,
        bytes=sum((out / name).stat().st_size for name in names),
        largest_logit_difference=difference,
        tokens=0 if difference is None else _CHECK_ROWS * _check_length(stored),
    )


def unmerge_adapter(
    merged: str | Path, out: str | Path, *, base: str | Path | None = None, adapter: str | Path | None = None
) -> UnmergeReport:
    """Write the model folder `out`: the base model into which an adapter was merged.

    Args:
        merged: the merged model folder.
        base: folder or hub id of the base; by default the one in the record of the merge.
        adapter: folder of the adapter, which is needed only if the base is gone; by default the one in the record.

    Raises:
        UserError: no adapter was merged into `merged`, its weights have changed since the merge, `base` is not what was
            merged into, neither base nor adapter exist as they were, the adapter's changes cannot be subtracted, or
            `out` exists.
        NonFinite: a weight is not finite in the dtype in which it is stored.
        RunStopped: the disk refuses the write. In each case nothing is left behind.
    """
    merged, out = Path(merged), Path(out)
    if not (merged / RECORD).is_file():
        raise UserError(f"{merged}: has no {RECORD}, so no adapter was merged into it; there is nothing to take out")
    record = _read_record(merged)
    for name, expected in record.merged_files.items():
        if sha256(inside(merged, name)) != expected:
            raise UserError(f"{merged / name}: has changed since the merge, so the adapter cannot be taken out")
    original = _existing_folder(record.base if base is None else base)
    if original is not None and all(
        sha256(original / name) == expected for name, expected in record.base_files.items()
    ):
        with new_model_folder(out) as partial:
            copy_without_weights(merged, partial, exclude=RECORD)
            for name in record.base_files:
                copy_and_hash(inside(original, name), partial / name)
            if record.untied:  # these two were changed by the merge
                (partial / INDEX).unlink()
                for name in (INDEX, "config.json"):
                    if (original / name).is_file():
                        shutil.copyfile(original / name, partial / name)
        return UnmergeReport(str(out), record.base, record.adapter, exact=True, error_bound=0.0)
    if base is not None:
        raise UserError(f"{base}: is not what {record.adapter} was merged into; its weights differ, or are not there")
    bound = _unmerge_by_subtraction(merged, out, record, Path(record.adapter if adapter is None else adapter))
    return UnmergeReport(str(out), record.base, record.adapter, exact=False, error_bound=bound)


def adapter_sum(folder: Path) -> str | None:
    """Return the sha256 of the sha256 sums of an adapter's two files; None if one of them does not exist."""
    sums = [sha256(folder / name) for name in (CONFIG, TENSORS)]
    return None if None in sums else hashlib.sha256(" ".join(map(str, sums)).encode()).hexdigest()


def _changes(
    stored: StoredModel, adapter: Adapter, changed_weight: Callable[[Tensor, Factors], Tensor]
) -> dict[str, Change]:
    """Return the functions that change tensors of the model, by the tensors' names.

    Args:
        changed_weight: computes the new weight [out, in] of a linear layer from the old one and the layer's factors.
    """

    def change_of_layer(path: str, factors: Factors) -> Change:
        replaced = adapter.others.get(f"{path}.weight")
        is_transposed = stored.is_transposed(path) or factors.of_embedding

        def change(weight: Tensor) -> Tensor:
            weight = weight if replaced is None else replaced
            return changed_weight(weight.T, factors).T if is_transposed else changed_weight(weight, factors)

        return change

    def replacement_by(tensor: Tensor) -> Change:
        return lambda _: tensor

    changes = {key: replacement_by(tensor) for key, tensor in adapter.others.items()}
    return changes | {f"{path}.weight": change_of_layer(path, factors) for path, factors in adapter.layers.items()}


def _untied_names(stored: StoredModel, adapter: Adapter, changes: Mapping[str, Change]) -> list[str]:
    """Return all names of the tied weights that an adapter changes under one of their names alone."""
    return [
        name
        for names in tied_groups(stored.model)
        if changes.keys() & set(names) and not changes_alike(adapter, names)
        for name in names
    ]


def _changed(name: str, old: Tensor, changes: Mapping[str, Change]) -> Tensor:
    """Return the tensor that the merged model has under a name, in the dtype of the base's tensor `old`.

    Raises:
        NonFinite: it is not finite in that dtype.
    """
    new = changes[name](old).to(old.dtype) if name in changes else old
    if not torch.isfinite(new).all():
        dtype = str(old.dtype).removeprefix("torch.")
        raise NonFinite(f"{name}: would not be finite in {dtype}, as it is stored; nothing was written")
    return new


def _subtract_update(weight: Tensor, factors: Factors) -> Tensor:
    """Return W - s B A [out, in] in fp32 or better."""
    delta = factors.delta(torch.promote_types(weight.dtype, torch.float32))
    return weight.to(delta.dtype) - delta


def _write_changes(changes: list[tuple[StoredTensor, Change]], folder: Path) -> float:
    """Change the tensors in the copies of their files in `folder`.

    Returns:
        The upper bound of a weight's error after two casts to the stored dtype, that of the merge and this one.

    Raises:
        NonFinite: a changed tensor is not finite in the dtype in which it is stored.
    """
    bound = 0.0
    for stored, change in changes:
        old = stored.read()
        new = _changed(stored.name, old, {stored.name: change})
        bound = max(bound, torch.finfo(new.dtype).eps * max(old.abs().max().item(), new.abs().max().item()))
        stored.write(new, folder)
    return bound


def _unmerge_by_subtraction(merged: Path, out: Path, record: Record, folder: Path) -> float:
    """Write `out` by subtracting the update of the adapter in `folder`; return the upper bound of a weight's error.

    Raises:
        UserError: the adapter is not the one that was merged, or it replaced weights.
    """
    if adapter_sum(folder) != record.adapter_sum:
        raise UserError(
            f"{merged}: neither its base ({record.base}) nor its adapter ({folder}) is there as it was; "
            "give --base or --adapter"
        )
    adapter = read_adapter(folder)
    if adapter.dora or adapter.others or adapter.rows or adapter.base_copies or record.untied:
        what = "DoRA scaled weights" if adapter.dora else "what was trained in full replaced weights"
        what = "the merge untied weights" if record.untied else what
        raise UserError(f"{merged}: {what}, which only the base ({record.base}) can undo; give it by --base")
    stored = StoredModel(merged)
    changes = _changes(stored, adapter, _subtract_update)
    with new_model_folder(out) as partial:
        stored.copy_to(partial)
        (partial / RECORD).unlink()
        return _write_changes([(stored.find(key), change) for key, change in changes.items()], partial)


@torch.no_grad()
def _largest_logit_difference(stored: StoredModel, adapter: Adapter, folder: Path, merged: Path) -> float:
    """Return the largest difference between the logits of base + adapter and of the merged model, on random tokens.

    Both models are opened in fp32, one after the other. `folder` is the adapter's.

    Raises:
        NonFinite: a logit is not finite.
    """
    rows = stored.model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (_CHECK_ROWS, _check_length(stored)), generator=keyed_generator(0, "merge check"))
    model = open_model(stored.folder).eval()
    adapters = Adapters(model)
    adapters.add("adapter", adapter, folder)
    plain = model(ids, use_cache=False).logits
    adapters.use("adapter")
    logits = model(ids, use_cache=False).logits
    del model, adapters  # so that only one model is in memory
    difference: float = (open_model(merged).eval()(ids, use_cache=False).logits - logits).abs().max().item()
    if not math.isfinite(difference):
        raise NonFinite(f"{folder}: with this adapter the model's logits are not finite; nothing was written")
    effect = (logits - plain).abs().max().item()
    if difference > _MOST_ROUNDING * effect:
        _log.warning(
            "warning: %s: moves the logits by %.2g, of which the dtype of the base's weights rounds away up to %.2g; "
            "merge into the base in fp32",
            *(folder, effect, difference),
        )
    return difference


def _check_length(stored: StoredModel) -> int:
    """Return the length of the sequences on which the logits are compared, at most the model's positions."""
    return min(_CHECK_LENGTH, max_positions(stored.model) or _CHECK_LENGTH)


def _existing_folder(model: str | Path) -> Path | None:
    """Return the local folder of a model given as a folder or hub id; None if there is no such model any more."""
    try:
        return model_folder(model)
    except UserError:
        return None


def _full_name(model: str | Path) -> str:
    """Return the absolute path of a folder, so that it is found from other working directories; a hub id unchanged."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def _read_record(folder: Path) -> Record:
    """Read relora_merge.json; `UserError` if it is damaged or names files outside the folder."""
    read_json(folder / RECORD, MB)  # refuses anything but a regular file of at most 1 MB
    try:
        record = TypeAdapter(Record).validate_json((folder / RECORD).read_bytes(), strict=True)
    except ValidationError:
        raise UserError(f"{folder / RECORD}: damaged") from None
    for name in (*record.base_files, *record.merged_files):
        inside(folder, name)
    return record
