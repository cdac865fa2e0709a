"""Merge an adapter into a model folder, and take it out again, in the memory of one tensor.

Files are copied, then each weight that an adapter changes is read, added to in fp32 or better, cast once to the type it
is stored in, checked to be finite and written over (`stored`).

`relora_merge.json` in the merged folder says what was merged into what, with sha256 sums. With the base at hand an
adapter is taken out by copying the base's weights back, bit for bit. Without it, W' - s·B A is off by the rounding of
two casts: each weight by at most eps (of the stored type) times the largest number of its tensor. What DoRA or full
training put in the place of a weight cannot be subtracted.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from relora.adapters.multi_adapter import Adapters
from relora.adapters.peft_format import CONFIG, TENSORS, Adapter, Factors, read_adapter
from relora.adapters.save_load import check_fits, check_ties
from relora.adapters.stored_model import Place, StoredModel, copied, copy_rest, new_model_folder, sha256
from relora.errors import NonFinite, UserError
from relora.files.atomic import write_json
from relora.files.untrusted import MB, inside, read_json
from relora.model.load import max_positions, model_folder, open_model
from relora.seeding import keyed_generator

RECORD = "relora_merge.json"

_ROWS, _LENGTH = 2, 16
"""Of the tokens on which a merge is checked."""

Change = Callable[[Tensor], Tensor]
"""What is stored -> what is to be stored, in fp32 or better."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out: str
    base: str
    adapter: str
    layers: int
    full_tensors: int
    """Replaced by what was trained in full."""
    bytes: int
    """Of all weights."""
    largest_logit_difference: float | None
    """Between base + adapter and the merged model, in fp32; None if not measured."""
    tokens: int
    """That it was measured on."""


@dataclass(frozen=True)
class UnmergeReport:
    """What was taken out, and how well."""

    out: str
    base: str
    """As it was called when it was merged into."""
    adapter: str
    exact: bool
    """The base's own weights are back, bit for bit."""
    error_bound: float
    """The most that a weight can be off."""


@dataclass(frozen=True)
class Record:
    """What relora_merge.json holds; sums are sha256."""

    base: str
    adapter: str
    adapter_sum: str
    base_files: dict[str, str]
    """Sums by the names of the weight files."""
    merged_files: dict[str, str]


def merge_adapter(
    adapter_folder: str | Path, out: str | Path, *, base: str | Path | None = None, check: bool = True
) -> MergeReport:
    """Write `out`, a model folder like that of `base` with an adapter merged into its weights.

    Args:
        base: folder or hub id; by default what the adapter names.
        check: open both, unless such a model takes more than half of main memory, and compare their logits.

    Raises:
        UserError: the adapter does not fit, `base` holds a merged one, weights are tied, or `out` is there.
        NonFinite: merged weights are not finite in the type they are stored in.
        RunStopped: the disk refuses the write. In each case nothing is left behind.
    """
    folder, out = Path(adapter_folder), Path(out)
    adapter = read_adapter(folder)
    base = base or adapter.base
    if not base:
        raise UserError(f"{folder}: does not name its base model; give it by --base")
    stored = StoredModel(base)
    if (stored.folder / RECORD).exists():
        earlier = _read_record(stored.folder)
        raise UserError(
            f"{base}: {earlier.adapter} is merged into it already; merge into {earlier.base}, or combine the adapters"
        )
    check_fits(adapter, stored.model, folder)
    check_ties(adapter, stored.model, folder)
    changes = _changes(stored, adapter, lambda weight, factors: factors.added_to(weight))
    difference: float | None = None
    with new_model_folder(out) as partial:
        base_files = stored.copy_to(partial)
        _write_over(changes, partial)
        merged_files = {name: sha256(partial / name) or "" for name in base_files}
        summed = adapter_sum(folder) or ""
        record = Record(_full_name(base), _full_name(folder), summed, base_files, merged_files)
        write_json(partial / RECORD, asdict(record))
        if check and 4 * stored.parameters < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
            difference = _largest_logit_difference(stored, folder, partial)
    return MergeReport(
        out=str(out),
        base=str(base),
        adapter=str(folder),
        layers=len(adapter.layers),
        full_tensors=len(adapter.others),
        bytes=sum((out / name).stat().st_size for name in base_files),
        largest_logit_difference=difference,
        tokens=0 if difference is None else _ROWS * _length(stored),
    )


def unmerge_adapter(
    merged: str | Path, out: str | Path, *, base: str | Path | None = None, adapter: str | Path | None = None
) -> UnmergeReport:
    """Write `out`, the model folder that an adapter was merged into.

    Args:
        base: where it is now, if not where it was.
        adapter: likewise; it serves only where the base is gone.

    Raises:
        UserError: nothing was merged, the weights have changed since, or neither base nor adapter can be had.
        RunStopped: the disk refuses the write. In each case nothing is left behind.
    """
    merged, out = Path(merged), Path(out)
    if not (merged / RECORD).is_file():
        raise UserError(f"{merged}: has no {RECORD}, so no adapter was merged into it; there is nothing to take out")
    record = _read_record(merged)
    for name, expected in record.merged_files.items():
        if sha256(inside(merged, name)) != expected:
            raise UserError(f"{merged / name}: has changed since the merge, so the adapter cannot be taken out")
    original = _folder_of(record.base if base is None else base)
    if original is not None and all(sha256(original / name) == sum_ for name, sum_ in record.base_files.items()):
        with new_model_folder(out) as partial:
            copy_rest(merged, partial, but=RECORD)
            for name in record.base_files:
                copied(inside(original, name), partial / name)
        return UnmergeReport(str(out), record.base, record.adapter, exact=True, error_bound=0.0)
    if base is not None:
        raise UserError(f"{base}: is not what {record.adapter} was merged into; its weights differ, or are not there")
    bound = _subtract(merged, out, record, Path(record.adapter if adapter is None else adapter))
    return UnmergeReport(str(out), record.base, record.adapter, exact=False, error_bound=bound)


def adapter_sum(folder: Path) -> str | None:
    """sha256 over both files of an adapter; None if one is not there."""
    sums = [sha256(folder / name) for name in (CONFIG, TENSORS)]
    return None if None in sums else hashlib.sha256(" ".join(map(str, sums)).encode()).hexdigest()


def _changes(
    stored: StoredModel, adapter: Adapter, changed: Callable[[Tensor, Factors], Tensor]
) -> list[tuple[Place, Change]]:
    """Where something changes, and how; `changed` is for weights [out, in]."""

    def of_layer(path: str, factors: Factors) -> Change:
        if stored.is_transposed(path):
            return lambda weight: changed(weight.T, factors).T
        return lambda weight: changed(weight, factors)

    def of_tensor(tensor: Tensor) -> Change:
        return lambda _: tensor

    layers = [(stored.place(f"{path}.weight"), of_layer(path, factors)) for path, factors in adapter.layers.items()]
    return layers + [(stored.place(key), of_tensor(tensor)) for key, tensor in adapter.others.items()]


def _subtracted(weight: Tensor, factors: Factors) -> Tensor:
    delta = factors.delta(torch.promote_types(weight.dtype, torch.float32))
    return weight.to(delta.dtype) - delta


def _write_over(changes: list[tuple[Place, Change]], folder: Path) -> float:
    """Change the copies in `folder`; the most that a weight is off after two such casts."""
    bound = 0.0
    for place, change in changes:
        old = place.read()
        new = change(old).to(old.dtype)
        if not torch.isfinite(new).all():
            kind = str(old.dtype).removeprefix("torch.")
            raise NonFinite(f"{place.name}: would not be finite in {kind}, as it is stored; nothing was written")
        bound = max(bound, torch.finfo(new.dtype).eps * max(old.abs().max().item(), new.abs().max().item()))
        place.write(new, folder)
    return bound


def _subtract(merged: Path, out: Path, record: Record, folder: Path) -> float:
    """Take an adapter out by arithmetic; the most that a weight can be off."""
    if adapter_sum(folder) != record.adapter_sum:
        raise UserError(
            f"{merged}: neither its base ({record.base}) nor its adapter ({folder}) is there as it was; "
            "give --base or --adapter"
        )
    adapter = read_adapter(folder)
    if adapter.dora or adapter.others:
        what = "DoRA scaled weights" if adapter.dora else "what was trained in full replaced weights"
        raise UserError(f"{merged}: {what}, which only the base ({record.base}) can undo; give it by --base")
    stored = StoredModel(merged)
    changes = _changes(stored, adapter, _subtracted)
    with new_model_folder(out) as partial:
        stored.copy_to(partial)
        (partial / RECORD).unlink()
        return _write_over(changes, partial)


@torch.no_grad()
def _largest_logit_difference(stored: StoredModel, folder: Path, merged: Path) -> float:
    """Between base + adapter and the merged model, in fp32, on drawn tokens."""
    rows = stored.model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (_ROWS, _length(stored)), generator=keyed_generator(0, "merge check"))
    model = open_model(stored.folder).eval()
    adapters = Adapters(model)
    adapters.load("adapter", folder)
    adapters.use("adapter")
    logits = model(ids).logits
    del model, adapters  # one model at a time
    difference: float = (open_model(merged).eval()(ids).logits - logits).abs().max().item()
    if not math.isfinite(difference):
        raise NonFinite(f"{folder}: with this adapter the model's logits are not finite; nothing was written")
    return difference


def _length(stored: StoredModel) -> int:
    return min(_LENGTH, max_positions(stored.model) or _LENGTH)


def _folder_of(model: str | Path) -> Path | None:
    """The folder of a model given as a folder or a hub id; None if it cannot be had any more."""
    try:
        return model_folder(model)
    except UserError:
        return None


def _full_name(model: str | Path) -> str:
    """A folder by its whole path, for whoever looks for it from elsewhere; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def _read_record(folder: Path) -> Record:
    read_json(folder / RECORD, MB)  # a plain file of an honest size
    try:
        record = TypeAdapter(Record).validate_json((folder / RECORD).read_bytes(), strict=True)
    except ValidationError:
        raise UserError(f"{folder / RECORD}: damaged") from None
    for name in (*record.base_files, *record.merged_files):
        inside(folder, name)
    return record
