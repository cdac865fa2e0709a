"""Studies: what they were made for, where they are kept, and that optuna's own tools open them."""

import io
import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from relora.errors import UserError
from relora.experiments.tune.rungs import Trial
from relora.experiments.tune.storage import without_password
from relora.experiments.tune.study import Study

PURPOSE: dict[str, dict[str, Any]] = {"configuration": {"lowrank.r": 8, "seed": 0}, "data": {"fingerprint": "a"}}
DISTRIBUTIONS = {"rate": FloatDistribution(1e-4, 1e-2, log=True), "init": CategoricalDistribution(("kaiming", "pissa"))}
PARAMETERS = {"rate": 1e-3, "init": "pissa"}


def opened(folder: Path, location: str | None = None, purpose: Any = PURPOSE) -> Study:
    folder.mkdir(exist_ok=True)
    return Study(folder, location, purpose)


def storages(tmp_path: Path) -> list[str | None]:
    return [None, f"journal:{tmp_path / 'journal.log'}", f"sqlite:///{tmp_path / 'elsewhere.db'}"]


@pytest.mark.parametrize("kind", range(3))
def test_trials_come_back_as_they_were_put_in(tmp_path: Path, kind: int) -> None:
    location = storages(tmp_path)[kind]
    study = opened(tmp_path / "study", location)
    first = Trial(0, "running", PARAMETERS, {"optimizer.lr": 1e-3}, seed=3, figures={"adapter_bytes": 12.0})
    assert [study.add(first, DISTRIBUTIONS) for _ in range(4)] == [0, 1, 2, 3]
    study.report(0, 50, 2.5, {"tokens": 10.0})
    study.report(0, 50, 9.9, {"tokens": 10.0})  # said again after a kill: the first one stays
    study.promote(0, 1)
    study.report(1, 100, 1.5, {})
    study.complete(1, 1.5)
    study.report(2, 50, math.inf, {})
    study.complete(2, math.inf)
    study.fail(3, "no memory")
    found = opened(tmp_path / "study", location).trials()
    assert found[0] == Trial(
        0, "running", PARAMETERS, {"optimizer.lr": 1e-3}, {50: 2.5}, target=1, seed=3, figures={"tokens": 10.0}
    )
    assert [trial.state for trial in found] == ["running", "complete", "complete", "failed"]
    assert found[1].loss == 1.5 and found[2].diverged and found[3].reason == "no memory"
    assert study.distributions(1) == DISTRIBUTIONS


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "study")
    other = {**PURPOSE, "configuration": {"lowrank.r": 16, "seed": 0}}
    with pytest.raises(
        UserError, match=r"study of another configuration; it differs in lowrank\.r \(8 there, 16 here\)"
    ):
        opened(tmp_path / "study", purpose=other)
    with pytest.raises(UserError, match="study of another data"):
        opened(tmp_path / "study", purpose={**PURPOSE, "data": {"fingerprint": "b"}})
    opened(tmp_path / "study")


def test_workers_without_a_common_folder_are_refused(tmp_path: Path) -> None:
    location = f"sqlite:///{tmp_path / 'shared.db'}"
    opened(tmp_path / "study", location)
    (tmp_path / "machine").mkdir()
    with pytest.raises(UserError, match="is not the folder of the study study in this storage"):
        opened(tmp_path / "machine" / "study", location)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/none", "postgresql+psycopg://me:***@127.0.0.1:1/none: cannot be used"),
        ("nonsense://host/db", "cannot be used"),
        ("nonsense", "cannot be used"),
        ("mysql+pymysql://me:secret@127.0.0.1/none", "pip install pymysql"),
        ("journal:/no/such/folder/log", "there is no folder"),
        ("sqlite:////no/such/folder/study.db", "unable to open database file"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(tmp_path: Path, location: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "study", location)
    message = str(caught.value)
    assert "--storage" in message and words in message and "secret" not in message and "\n" not in message


def test_a_password_is_hidden() -> None:
    assert without_password("postgresql://a:b@h/d") == "postgresql://a:***@h/d"
    assert without_password("sqlite:///a.db") == "sqlite:///a.db"


def test_the_dashboard_opens_a_study(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    study = opened(tmp_path / "study")
    study.add(Trial(0, "running", PARAMETERS, {"optimizer.lr": 1e-3}), DISTRIBUTIONS)
    study.report(0, 100, 1.5, {})
    study.complete(0, 1.5)
    app = dashboard.wsgi(optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study' / 'study.db'}"))

    def get(path: str) -> Any:
        answered = []
        request = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SERVER_NAME": "here",
            "SERVER_PORT": "80",
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
        }
        body = b"".join(app(request, lambda status, headers, error=None: answered.append(status)))
        assert answered == ["200 OK"], body
        return json.loads(body)

    [summary] = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "study"
    [trial] = get(f"/api/studies/{summary['study_id']}")["trials"]
    assert trial["state"] == "Complete" and trial["values"] == [1.5]
