"""A study of optuna: its trials, and what it was made for. optuna's dashboard opens it as it is.

optuna's value of a trial is its held-out loss at the end of the run, and its intermediate values are those at the
rungs, with the percent of the run as their step. What else a trial has stands in its user attributes. A study keeps
what it was made for in attributes of its own, and is refused to a search of anything else.
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora.errors import UserError
from relora.experiments.tune.rungs import Trial
from relora.experiments.tune.storage import import_optuna, open_storage
from relora.files.atomic import write_json
from relora.files.untrusted import read_json
from relora.messages import first_line, short_repr

TOKEN_FILE = "study.json"
_PURPOSE, _TOKEN = "made_for", "folder"
"""Attributes of a study: what it was made for, and the token that its folder holds, too."""


class Study:
    """The study in a folder.

    Args:
        folder: its folder, which is there; the name of the folder is that of the study.
        location: see `open_storage`.
        purpose: section -> key -> value: everything that decides what a trial of the study means.

    Raises:
        UserError: the storage cannot be used, or holds another study of this name.
    """

    def __init__(self, folder: Path, location: str | None, purpose: Mapping[str, Mapping[str, Any]]) -> None:
        optuna = import_optuna()
        self.folder = folder
        storage = self._storage = open_storage(location, folder)
        try:
            self.optuna = optuna.create_study(
                storage=storage,
                study_name=folder.name,
                direction="minimize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),  # draws nothing: `sampler.py` does
            )
            attributes = self.optuna.user_attrs
            if _PURPOSE not in attributes:
                self._begin(purpose)
            else:
                self._check(attributes, json.loads(json.dumps(purpose)))
        except UserError:
            self.close()
            raise
        except Exception as error:  # SQLAlchemy's errors and those of a damaged journal have no common class
            raise UserError(f"--storage: the study cannot be read: {first_line(str(error))}") from None

    def close(self) -> None:
        """Close the connections to a database."""
        if hasattr(self._storage, "engine"):
            self._storage.remove_session()
            self._storage.engine.dispose()

    def trials(self) -> list[Trial]:
        """Return all trials by number."""
        return [_as_trial(one) for one in self.optuna.get_trials(deepcopy=False)]

    def add(self, trial: Trial, distributions: Mapping[str, Any]) -> int:
        """Add a trial that is going to run, and return its number; the number in `trial` is not used.

        Args:
            distributions: optuna's distribution of each of its parameters.
        """
        optuna = import_optuna()
        attributes = {"values": trial.values, "target": trial.target, "seed": trial.seed, "figures": trial.figures}
        if trial.repeats is not None:
            attributes["repeats"] = trial.repeats
        before = {one.number for one in self.optuna.get_trials(deepcopy=False)}
        self.optuna.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=trial.parameters,
                distributions=dict(distributions),
                user_attrs=attributes,
            )
        )
        (number,) = {one.number for one in self.optuna.get_trials(deepcopy=False)} - before
        return int(number)

    def distributions(self, number: int) -> dict[str, Any]:
        """Return optuna's distributions of a trial's parameters."""
        return dict(self._frozen(number).distributions)

    def promote(self, number: int, target: int) -> None:
        """Send a trial to a further rung."""
        self._handle(number).set_user_attr("target", target)

    def report(self, number: int, percent: int, loss: float, figures: Mapping[str, float]) -> None:
        """Note the held-out loss at a rung, and what the trial has taken so far; a loss that is there already stays."""
        self.note(number, figures)
        if percent not in self._frozen(number).intermediate_values:
            self._handle(number).report(loss, percent)

    def note(self, number: int, figures: Mapping[str, float]) -> None:
        """Note what a trial has taken so far."""
        self._handle(number).set_user_attr("figures", dict(figures))

    def complete(self, number: int, loss: float) -> None:
        """End a trial with the loss of its finished run."""
        self.optuna.tell(number, loss)

    def give_up(self, number: int, reason: str) -> None:
        """End a trial on its way."""
        self._handle(number).set_user_attr("reason", reason)
        self.optuna.tell(number, state=import_optuna().trial.TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """End a trial that could not be run."""
        self._handle(number).set_user_attr("reason", reason)
        self.optuna.tell(number, state=import_optuna().trial.TrialState.FAIL)

    def _frozen(self, number: int) -> Any:
        return self.optuna.get_trials(deepcopy=False)[number]

    def _handle(self, number: int) -> Any:
        """Return the object by which optuna changes a trial that runs."""
        return import_optuna().trial.Trial(self.optuna, self._frozen(number)._trial_id)

    def _begin(self, purpose: Mapping[str, Any]) -> None:
        """Note in a new study, and in its folder, that they belong together, and what the study is made for."""
        token = secrets.token_hex(8)
        write_json(self.folder / TOKEN_FILE, {"token": token, "made_for": purpose})
        self.optuna.set_user_attr(_TOKEN, token)
        self.optuna.set_user_attr(_PURPOSE, dict(purpose))  # last: a study without it is begun again

    def _check(self, attributes: Mapping[str, Any], purpose: Mapping[str, Any]) -> None:
        """Refuse a study that was made for something else, or whose other workers have another folder."""
        there = attributes[_PURPOSE]
        for section in purpose:
            old, new = there.get(section, {}), purpose[section]
            differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            if differing:
                key = differing[0]
                raise UserError(
                    f"output_dir: {self.folder} holds a study of another {section}; it differs in {key} "
                    f"({short_repr(old.get(key))} there, {short_repr(new.get(key))} here); choose another output_dir"
                )
        file = self.folder / TOKEN_FILE
        tree = read_json(file) if file.is_file() else {}
        if not isinstance(tree, dict) or tree.get("token") != attributes.get(_TOKEN):
            raise UserError(
                f"output_dir: {self.folder} is not the folder of the study {self.folder.name} in this storage; give "
                "the folder that its other workers use, on a disk that all share, or a folder of another name"
            )


def _as_trial(frozen: Any) -> Trial:
    """Convert a trial of optuna."""
    attributes = frozen.user_attrs
    states = {"RUNNING": "running", "WAITING": "running", "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    return Trial(
        number=frozen.number,
        state=states[frozen.state.name],
        parameters=dict(frozen.params),
        values=dict(attributes.get("values", {})),
        losses={int(step): float(loss) for step, loss in frozen.intermediate_values.items()},
        target=int(attributes.get("target", 0)),
        repeats=attributes.get("repeats"),
        seed=int(attributes.get("seed", 0)),
        figures=dict(attributes.get("figures", {})),
        reason=attributes.get("reason"),
    )
