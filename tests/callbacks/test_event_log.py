"""Event logs survive what happens to runs: kills, resumes, second fits, several ranks."""

import copy
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_mp.callbacks.event_log import EventLog, gather_events, run_directory
from lightning_mp.report.events import encode_event, read_events
from tests.models import Regression, batches, trainer

ROOT = Path(__file__).parents[2]


class Steps(Callback):
    """Writes one event per training batch."""

    def __init__(self, dirpath=None):
        self.event_log = EventLog("steps", dirpath)

    def on_train_start(self, trainer, pl_module):
        self.event_log.open(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.event_log.append({"step": trainer.global_step - 1})

    def on_fit_end(self, trainer, pl_module):
        self.event_log.close()


def steps(path):
    return [event["step"] for event in read_events(path)]


def fit(callback, ckpt_path=None, **settings):
    run = trainer(callbacks=[callback], **settings)
    run.fit(Regression(), batches(), ckpt_path=ckpt_path)
    return run


def test_lines_are_strict_json_and_non_finite_numbers_come_back(tmp_path):
    event = {"step": 1, "kind": "nan", "amax": {"input": math.inf, "grad": -math.inf}, "scales": 2.0}
    line = encode_event({**event, "lost": math.nan})
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (tmp_path / "e.jsonl").write_bytes(line)
    (found,) = read_events(tmp_path / "e.jsonl")
    assert math.isnan(found.pop("lost"))
    assert found == event


@pytest.mark.parametrize("event", [{"step": 3, "scale": 2.0**-30, "ok": True, 'a"b': 1e300}, {"step": 3, "fqn": None}])
def test_lines_of_plain_numbers_are_those_of_the_json_library(event):
    assert encode_event(event).decode() == json.dumps(event) + "\n"


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "'NaN", "''Infinity", "'", "nan"])
def test_texts_that_read_like_non_finite_numbers_stay_texts(tmp_path, text):
    event = {"step": 1, "group": text, "inner": {"fqn": text}, "names": [text], "amax": math.inf}
    (tmp_path / "e.jsonl").write_bytes(encode_event(event))
    assert read_events(tmp_path / "e.jsonl") == [event]


def test_torn_last_line_is_ignored_by_the_reader(tmp_path):
    (tmp_path / "e.jsonl").write_bytes(b'{"step": 0}\n{"step": 1}\n{"st')
    assert steps(tmp_path / "e.jsonl") == [0, 1]


def test_missing_log_reads_as_no_events(tmp_path):
    assert read_events(tmp_path / "none.jsonl") == []


def test_killed_process_leaves_every_line_that_it_appended(tmp_path):
    code = f"""
import os, signal
from lightning_mp.callbacks.event_log import EventLog
from tests.models import trainer
log = EventLog("steps", {str(tmp_path)!r})
log.open(trainer())
for step in range(100):
    log.append({{"step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert steps(tmp_path / "steps.jsonl") == list(range(100))


def test_deferred_events_are_written_in_order_when_16_wait_and_with_the_next_one(tmp_path):
    log, path = EventLog("steps", tmp_path), tmp_path / "steps.jsonl"
    log.open(trainer())
    for step in range(20):
        log.defer({"step": step})
    assert steps(path) == list(range(16))
    log.append({"step": 20})
    assert steps(path) == list(range(21))
    log.defer({"step": 21})
    assert [event["step"] for event in log.read()] == list(range(22))
    log.defer({"step": 22})
    log.close()
    assert steps(path) == list(range(23))


def test_copy_leaves_deferred_events_to_the_original(tmp_path):
    log = EventLog("steps", tmp_path)
    log.open(trainer())
    log.defer({"step": 0})
    copy.deepcopy(log).close()
    log.close()
    assert steps(tmp_path / "steps.jsonl") == [0]


def test_resume_cuts_the_steps_that_are_made_again_and_repairs_the_torn_line(tmp_path):
    run = fit(Steps(tmp_path), limit_train_batches=5)
    checkpoint = tmp_path / "last.ckpt"
    run.save_checkpoint(checkpoint)
    log = tmp_path / "steps.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 5}\n{"step": 6}\n{"step"')
    fit(Steps(tmp_path), ckpt_path=checkpoint, max_epochs=2, limit_train_batches=3)
    assert steps(log) == list(range(8))
    assert log.read_bytes().endswith(b"\n")


def test_resume_keeps_a_log_that_needs_no_cut_untouched(tmp_path):
    run = fit(Steps(tmp_path), limit_train_batches=5)
    run.save_checkpoint(tmp_path / "last.ckpt")
    inode = os.stat(tmp_path / "steps.jsonl").st_ino
    fit(Steps(tmp_path), ckpt_path=tmp_path / "last.ckpt", max_epochs=2, limit_train_batches=2)
    assert steps(tmp_path / "steps.jsonl") == list(range(7))
    assert os.stat(tmp_path / "steps.jsonl").st_ino == inode


def test_new_run_in_the_same_directory_sets_the_old_log_aside(tmp_path):
    for limit in (3, 2, 4):
        fit(Steps(tmp_path), limit_train_batches=limit)
    assert steps(tmp_path / "steps.jsonl") == [0, 1, 2, 3]
    assert steps(tmp_path / "steps-v1.jsonl") == [0, 1, 2]
    assert steps(tmp_path / "steps-v2.jsonl") == [0, 1]


def test_second_of_two_monitors_in_one_directory_writes_a_log_of_its_own(tmp_path):
    first, second, elsewhere = Steps(tmp_path), Steps(tmp_path), Steps(tmp_path / "deeper")
    for _ in range(2):
        run = trainer(callbacks=[first, second, elsewhere])
        run.fit(Regression(), batches(), ckpt_path=None)
    for path in ("steps", "steps-v1", "steps-copy2", "steps-copy2-v1", "deeper/steps", "deeper/steps-v1"):
        assert steps(tmp_path / f"{path}.jsonl") == list(range(8))


def test_second_fit_of_one_trainer_continues_the_log(tmp_path):
    callback = Steps(tmp_path)
    run = trainer(callbacks=[callback])
    model = Regression()
    run.fit(model, batches())
    run.fit_loop.max_epochs = 2
    run.fit(model, batches())
    assert steps(tmp_path / "steps.jsonl") == list(range(16))


@pytest.mark.parametrize("logger_class", [CSVLogger, TensorBoardLogger])
def test_log_lies_beside_the_files_of_the_logger(tmp_path, logger_class):
    logger = logger_class(tmp_path)
    fit(Steps(), logger=logger)
    assert steps(Path(logger.log_dir) / "steps.jsonl") == list(range(8))


class OwnLogger(Logger):
    def __init__(self, save_dir=None):
        super().__init__()
        self._save_dir = save_dir

    name = "project"
    version = 3

    @property
    def save_dir(self):
        return self._save_dir

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params, *args, **kwargs): ...


def test_directory_is_dirpath_then_log_dir_then_where_checkpoints_go(tmp_path):
    bare, own = OwnLogger(), OwnLogger(str(tmp_path))
    csv = CSVLogger(tmp_path, name="csv")
    assert run_directory(trainer(logger=[bare, csv]), "here") == Path("here")
    assert run_directory(trainer(logger=[bare, csv])) == Path(csv.log_dir)
    assert run_directory(trainer(logger=own)) == tmp_path / "project" / "version_3"
    assert run_directory(trainer(logger=bare)) is None
    assert run_directory(trainer(logger=OwnLogger("s3://bucket/runs"))) is None


def test_without_a_directory_events_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = Steps()
    fit(callback)
    assert [event["step"] for event in callback.event_log.read()] == list(range(8))
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_and_a_run_without_events_leave_no_file(tmp_path):
    fit(Steps(tmp_path / "dev"), fast_dev_run=True)
    fit(Callback())
    fit(Steps(tmp_path / "empty"), limit_train_batches=0)
    assert list(tmp_path.iterdir()) == []


class FinderModel(Regression):
    lr = 1e-3

    def configure_optimizers(self):
        self.settings["lr"] = self.lr
        return super().configure_optimizers()


@pytest.mark.parametrize("monitor_first", [True, False])
def test_learning_rate_finder_leaves_no_trace(tmp_path, monitor_first):
    callback = Steps(tmp_path)
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    both = [callback, finder] if monitor_first else [finder, callback]
    run = trainer(callbacks=both, default_root_dir=tmp_path / "root")
    run.fit(FinderModel(), batches())
    assert steps(tmp_path / "steps.jsonl") == list(range(8))


def test_copy_of_an_open_log_can_be_made_and_appends(tmp_path):
    log = EventLog("steps", tmp_path)
    log.open(trainer())
    log.append({"step": 0})
    for each in (copy.deepcopy(log), pickle.loads(pickle.dumps(log))):
        each.append({"step": 1})
        each.close()
    log.close()
    assert steps(tmp_path / "steps.jsonl") == [0, 1, 1]


def test_gathering_without_ranks_returns_the_events():
    assert gather_events([1, 2]) == [1, 2]
