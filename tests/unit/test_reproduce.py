"""The harness of the tables, with a stand-in for the commands that prepare, train and evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intra_distillation_fairseq.cli import main, reproduce, train
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import jobs, reproduction
from intra_distillation_fairseq.files import lock

# Does what the commands do as far as the harness can see it. A file fail-NAME, kill-NAME or stop-NAME in the folder HERE,
# where NAME is a method or a language, makes it fail, be killed, or stop the harness and wait to be stopped; save-NAME and
# term-NAME end it as a request to stop does, with and without a save.
STAND_IN = """
import hashlib, json, os, signal, sys
from pathlib import Path
here, command, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

def value(flag):
    return words[words.index(flag) + 1]

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))

def obey(name):
    if (here / f"fail-{name}").exists():
        sys.exit(f"error: {name} cannot be done")
    if (here / f"kill-{name}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if (here / f"save-{name}").exists():
        sys.exit(75)
    if (here / f"term-{name}").exists():
        sys.exit(143)
    if (here / f"stop-{name}").exists():
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()

with open(here / "calls.txt", "a") as calls:
    environment = [os.environ.get(name, "-") for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
    calls.write("\\t".join([*environment, command, *words]) + "\\n")
if command.startswith("prepare"):
    source, target = (value("--langs"), "en") if "--langs" in words else ("en", "de")
    obey(source)
    data = Path(value("--out")) / f"{source}-{target}"
    splits = [f"{split}.{source}-{target}" for split in ("train", "valid", "test")]
    for name in ["dict", *splits]:
        for lang in (source, target):
            for ending in ("txt",) if name == "dict" else ("bin", "idx"):
                write(data / "bin" / f"{name}.{lang}.{ending}", 1)
    write(data / "manifest.json", {"format": 1, "source_lang": source, "target_lang": target, "corpus": "invented"})
elif command == "train":
    method, folder = value("--method"), Path(value("--save-dir"))
    obey(method)
    recipe = json.loads(Path(value("--config")).read_text())
    settings = {"method": method, "seed": int(value("--seed")), "options": {**recipe["train"], **recipe["methods"][method]}}
    settings["data_digest"] = hashlib.sha256((Path(words[0]) / "manifest.json").read_bytes()).hexdigest()
    settings |= {"flags": words[words.index("--") + 1 :], "precision": "fp32"}
    write(folder / "run.json", {"format": 1, "settings": settings, "corpus": "invented", "lines": {}})
    if not (folder / "finished.json").exists():
        write(folder / "finished.json", {"updates": 3, "seconds": 1, "time": "t"})
        for name in ("1", "2", "_2_3", "_best", "_last"):
            (folder / f"checkpoint{name}.pt").write_bytes(bytes(1000))
else:
    folder = Path(words[0])
    method = folder.parent.name
    obey("evaluate-" + method)
    evaluation = {"beam": 5, "lenpen": 1.0, "max_len_a": 0.0, "max_len_b": 200, "batch_size": 100}
    evaluation |= {"lowercase": False, "tokenize": "13a"}
    score = {"bleu": 12.5, "bleu_signature": "s", "checkpoint": "best", "finished": "t"}
    score["inputs"] = {"evaluation": evaluation}
    out = folder / "eval" / value("--checkpoint")
    write(out / "score.json", score)
    for name in ("hypotheses", "references"):
        (out / f"{name}.txt").write_text("a b c d e\\n")
"""
CONFIG = {
    "train": {"arch": "transformer_small", "max-update": 3},
    "methods": {name: {"criterion": "a"} for name in ("transformer", "rdrop", "id_x", "mine")},
}


def write_config(here: Path, **changes) -> None:
    """JSON is YAML, too, and is read without a library."""
    (here / "tiny.yaml").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")


class Harness:
    """`reproduce` in a folder of its own."""

    def __init__(self, here: Path, capsys):
        self.here = here
        self.results = here / "results"
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        where = ["--config", self.here / "tiny.yaml", "--data-root", self.here / "data", "--results", self.results]
        table = (
            [] if any("--table" in word for word in words) else ["--table", "2", "--archive", self.here / "2014-01.tgz"]
        )
        self._capsys.readouterr()
        own, *after = " ".join(words).split(" -- ") if words else [""]
        after = ["--", *after[0].split()] if after else []
        arguments = [*table, *where, *own.split(), *after]
        status = main.main(["reproduce", *map(str, arguments)])
        said = self._capsys.readouterr()
        return status, said.out, said.err

    def prepare(self, lang: str) -> None:
        """Make a data folder beforehand."""
        words = ["stand_in.py", ".", "prepare", "--langs", lang, "--out", "data"]
        subprocess.run([sys.executable, *words], cwd=self.here, check=True)
        self.calls()

    def calls(self) -> list[list[str]]:
        """What was called since the last time: places and words."""
        path = self.here / "calls.txt"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split("\t") for line in lines]

    def steps(self) -> list[str]:
        """The same in short, as in `train id_x` and `prepare-iwslt14 de`."""
        short = []
        for _, _, command, *words in self.calls():
            names = {"train": "--method", "evaluate": None}.get(command, "--langs")
            what = words[words.index(names) + 1] if names else Path(words[0]).parent.name
            short.append(f"{command} {what}")
        return short


@pytest.fixture
def harness(tmp_path, monkeypatch, capsys) -> Harness:
    here = tmp_path / "mit Leer é"
    here.mkdir()
    (here / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    write_config(here)
    (here / "2014-01.tgz").touch()
    monkeypatch.setattr(
        reproduction, "INTRA_DISTILLATION", (sys.executable, "-IS", str(here / "stand_in.py"), str(here))
    )
    monkeypatch.setattr(reproduce.devices, "probe", lambda: {"devices": [], "cuda": None, "threads": 1})
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # no picture: a second less each
    monkeypatch.chdir(here)
    return Harness(here, capsys)


# -- what is run


def test_everything_from_the_archive_to_the_table(harness):
    status, table, said = harness("--langs de,es --methods transformer,id_x --seeds 1,2")
    assert status == 0, said
    steps = harness.steps()
    assert steps[:2] == ["prepare-iwslt14 de", "prepare-iwslt14 es"]
    one_seed = [f"{step} {method}" for method in ("transformer", "id_x") for step in ("train", "evaluate")]
    assert steps[2:] == one_seed * 4
    folders = sorted(str(path.parent.relative_to(harness.results)) for path in harness.results.glob("*/*/*/run.json"))
    expected = [
        f"{pair}-en/{method}/seed{k}" for pair in ("de", "es") for method in ("id_x", "transformer") for k in (1, 2)
    ]
    assert folders == expected
    assert "BLEU on invented" in table and "12.50 ± 0.00" in table
    lines = said.split("\n")
    assert "8 cells: 0 done, 8 to go, 1 at a time on CPU" in lines[0]
    done = [line for line in lines if "done  " in line]
    assert "done  de-en/transformer/seed1: BLEU 12.50 after 0:00:0" in done[0] and done[0].endswith("7 of 8 cells left")
    log = harness.results / "de-en" / "id_x" / "seed1" / "cell.log"
    assert f"start de-en/id_x/seed1 on CPU, log: {log}" in said and log.exists()
    assert (harness.results / "table.md").read_text(encoding="utf-8") == table


def test_the_commands_get_what_was_asked_for(harness):
    words = "--langs de --methods id_x --seeds 7 --precision bf16 --checkpoint average3"
    assert harness(f"{words} --prepare-flags=--force -- --cpu --lr 1")[0] == 0
    prepare, train, evaluate = (call[2:] for call in harness.calls())
    data, folder = str(harness.here / "data" / "de-en"), str(harness.results / "de-en" / "id_x" / "seed7")
    archive = str(harness.here / "2014-01.tgz")
    assert prepare == [
        *("prepare-iwslt14", "--langs", "de", "--out", str(harness.here / "data"), "--archive", archive, "--force")
    ]
    config = str(harness.here / "tiny.yaml")
    assert train == [
        *("train", data, "--method", "id_x", "--config", config, "--save-dir", folder, "--seed", "7"),
        *("--precision", "bf16", "--", "--cpu", "--lr", "1"),
    ]
    assert evaluate == ["evaluate", folder, "--data", data, "--checkpoint", "average3", "--cpu"]


def test_table_3(harness):
    status, table, said = harness("--table 3 --methods id_x --prepare-flags=--vocab-size=500 --archives .")
    assert status == 0, said
    prepare, train, _ = (call[2:] for call in harness.calls())
    out = str(harness.here / "data")
    assert prepare == ["prepare-wmt17", "--archives", ".", "--out", out, "--vocab-size=500"]
    assert train[1] == str(harness.here / "data" / "en-de")
    assert "| id_x" in table


def test_the_rows_of_the_table_that_the_config_has(harness):
    status, _, said = harness("--langs de")
    assert status == 0
    assert f"note: {harness.here / 'tiny.yaml'} has no sage, switch, id_js\n" in said
    assert [step for step in harness.steps() if step[:5] == "train"] == [
        "train transformer",
        "train rdrop",
        "train id_x",
    ]


def test_a_language_of_ones_own_that_is_prepared(harness):
    manifest = harness.here / "data" / "fr-en" / "manifest.json"
    status, _, said = harness("--langs fr --methods mine")
    assert (status, manifest.exists()) == (2, False)
    assert "--langs has 'fr': needed are languages of the table (ar de es fa he it nl pl), or others that are" in said
    harness.prepare("fr")
    assert harness("--langs fr --methods mine")[0] == 0


# -- where it runs


def test_one_cell_for_each_gpu(harness, monkeypatch):
    monkeypatch.setattr(reproduce.devices, "probe", lambda: {"devices": ["a GPU"] * 4})
    status, _, said = harness("--langs de --methods transformer,rdrop,id_x,mine --gpus 2")
    assert status == 0, said
    places = {call[0] for call in harness.calls() if call[2] == "train"}
    assert places == {"0", "1"}
    assert "2 at a time on GPU 0, GPU 1" in said


def test_all_gpus_for_one_cell_of_table_3(harness, monkeypatch):
    monkeypatch.setattr(reproduce.devices, "probe", lambda: {"devices": ["a GPU"] * 4})
    assert harness("--table 3 --methods transformer,id_x --archives .")[0] == 0
    assert {call[0] for call in harness.calls() if call[2] == "train"} == {"0,1,2,3"}


def test_places_on_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place.name for place in jobs.gpu_places(5, None, 2, 1)] == ["GPU 0,1", "GPU 2,3"]
    assert [place.name for place in jobs.gpu_places(2, None, 1, 2)] == ["GPU 0", "GPU 1", "GPU 0", "GPU 1"]
    assert [place.name for place in jobs.gpu_places(3, 2, None, 1)] == ["GPU 0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-a,7")
    assert [place.environment for place in jobs.gpu_places(3, 2, 1, 1)] == [
        *({"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "MIG-a"})
    ]
    with pytest.raises(UserError, match="--gpus '4': 3 are there, give that many at most"):
        jobs.gpu_places(3, 4, 1, 1)
    with pytest.raises(UserError, match="--gpus-per-cell '3': 2 are there, give that many at most"):
        jobs.gpu_places(8, 2, 3, 1)


def test_cells_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [place.environment for place in jobs.cpu_places(1)] == [{}]
    assert [place.environment for place in jobs.cpu_places(3)] == [{"OMP_NUM_THREADS": "2"}] * 3
    assert jobs.cpu_places(16)[0].environment == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert jobs.cpu_places(3)[0].environment == {"OMP_NUM_THREADS": "4"}


def test_a_step_does_not_import_torch_before_it_needs_it():
    words = [*reproduction.INTRA_DISTILLATION, "user-dir"]
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout.rstrip().endswith("intra_distillation_fairseq")
    assert "intra_distillation_fairseq.cli" in done.stderr and "torch" not in done.stderr


# -- failures


def test_a_failed_cell_does_not_stop_the_others(harness):
    (harness.here / "fail-transformer").touch()
    status, table, said = harness("--langs de --methods transformer,id_x")
    assert status == 1
    log = harness.results / "de-en" / "transformer" / "seed1" / "cell.log"
    assert f"FAIL  de-en/transformer/seed1: train failed, log: {log}; 1 of 2 cells left\n" in said
    end = said.rstrip().split("\n")[-2:]
    assert end[0].endswith(
        f"error: de-en/transformer/seed1: train failed: error: transformer cannot be done; log: {log}"
    )
    assert end[1].endswith("1 of 2 cells failed: the same command tries them again")
    assert " failed |" in table and "12.50" in table
    assert f"- de-en/transformer/seed1: train failed: error: transformer cannot be done; log: {log}\n" in table
    harness.steps()

    (harness.here / "fail-transformer").unlink()
    status, table, said = harness("--langs de --methods transformer,id_x")
    assert (status, harness.steps()) == (0, ["train transformer", "evaluate transformer"])
    assert "2 cells: 1 done, 1 to go" in said and "failed" not in table


def test_a_failed_evaluation_and_a_killed_training(harness):
    (harness.here / "fail-evaluate-id_x").touch()
    (harness.here / "kill-transformer").touch()
    status, _, said = harness("--langs de --methods transformer,id_x")
    assert status == 1
    assert "error: de-en/id_x/seed1: evaluate failed: error: evaluate-id_x cannot be done; log: " in said
    assert "train failed: train ended with SIGKILL (too little memory is the usual reason); log: " in said


def test_a_language_that_cannot_be_prepared_fails_its_cells_only(harness):
    (harness.here / "fail-de").touch()
    status, table, said = harness("--langs de,es --methods transformer,id_x")
    assert status == 1
    assert [step for step in harness.steps() if "prepare" not in step] == [
        *("train transformer", "evaluate transformer", "train id_x", "evaluate id_x")
    ]
    log = harness.results / "logs" / "prepare-de-en.log"
    line = (
        "de-en (2 cells): prepare failed: error: de cannot be done (flags of the prepare command go into --prepare-flags="
        f'"..."); log: {log}\n'
    )
    assert f"error: {line}" in said and f"- {line}" in table
    assert f"FAIL  de-en (2 cells): prepare failed, log: {log}; 2 of 4 cells left\n" in said
    assert said.count("cannot be done") == 2 and table.count("cannot be done") == 1  # when it happens and at the end


def test_without_an_archive_one_try_is_enough(harness, monkeypatch):
    (harness.here / "fail-de").touch()
    config, results = str(harness.here / "tiny.yaml"), str(harness.results)
    words = ["--table", "2", "--langs", "de es", "--methods", "id_x", "--config", config, "--results", results]
    assert main.main(["reproduce", *words, "--data-root", "nothing"]) == 1
    assert harness.steps() == ["prepare-iwslt14 de"]


def test_a_folder_that_holds_another_pair_is_refused(harness):
    harness.prepare("es")
    os.rename("data/es-en", "data/de-en")
    status, _, said = harness("--langs de --methods id_x")
    assert (status, harness.calls()) == (2, [])
    assert "data/de-en' holds es-en, not de-en: rename it, or give another --data-root\n" in said


def test_a_damaged_folder_of_another_corpus_is_left_alone(harness):
    harness.prepare("de")
    (harness.here / "data" / "de-en" / "bin" / "dict.en.txt").unlink()
    status, _, said = harness("--langs de --methods id_x")
    assert (status, harness.calls()) == (1, [])
    assert (
        "prepare failed: '" in said and "dict.en.txt' is missing: run the prepare command of this folder again" in said
    )


# -- again


def test_a_second_run_does_nothing(harness):
    assert harness("--langs de --methods transformer,id_x")[0] == 0
    harness.calls()
    status, table, said = harness("--langs de --methods transformer,id_x")
    assert (status, harness.calls()) == (0, [])
    assert "all 2 cells are done\n" in said and "12.50" in table


def test_what_is_done_is_done_without_its_data(harness):
    assert harness("--langs de --methods id_x")[0] == 0
    os.rename("data", "elsewhere")
    harness.calls()
    assert (harness("--langs de --methods id_x")[0], harness.calls()) == (0, [])


@pytest.mark.parametrize("change", ["flags", "options", "data", "evaluation", "precision"])
def test_other_settings_are_not_taken_for_done(harness, change):
    assert harness("--langs de --methods id_x")[0] == 0
    harness.calls()
    words = "--langs de --methods id_x"
    if change == "options":
        write_config(harness.here, train={**CONFIG["train"], "max-update": 4})
    elif change == "evaluation":
        write_config(harness.here, evaluate={"beam": 4})
    elif change == "data":
        manifest = harness.here / "data" / "de-en" / "manifest.json"
        manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    else:
        words += {"flags": " -- --lr 1", "precision": " --precision bf16"}[change]
    assert harness(words)[0] == 0
    assert harness.steps() == ["train id_x", "evaluate id_x"]


def test_stopped_and_gone_on(harness):
    (harness.here / "stop-rdrop").touch()
    status, table, said = harness("--langs de --methods transformer,rdrop,id_x")
    assert (status, table) == (143, "")
    assert harness.steps()[-1] == "train rdrop"
    assert said.rstrip().endswith("stopped by SIGTERM, 2 cells left: the same command goes on")
    assert not (harness.results / "de-en" / "rdrop" / "seed1" / "failed.json").exists()
    (harness.here / "stop-rdrop").unlink()
    assert harness("--langs de --methods transformer,rdrop,id_x")[0] == 0
    assert harness.steps() == [f"{step} {method}" for method in ("rdrop", "id_x") for step in ("train", "evaluate")]


@pytest.mark.parametrize("how", ["save", "term"])
def test_a_cell_that_is_stopped_alone_has_not_failed(harness, how):
    (harness.here / f"{how}-rdrop").touch()
    status, _, said = harness("--langs de --methods rdrop,id_x")
    assert (status, harness.steps()[-2:]) == (75, ["train id_x", "evaluate id_x"])
    assert "stop  de-en/rdrop/seed1: " in said and "FAIL" not in said
    assert said.rstrip().endswith("1 cells left: the same command goes on")
    assert not (harness.results / "de-en" / "rdrop" / "seed1" / "failed.json").exists()


def test_stopped_while_it_prepares(harness):
    (harness.here / "stop-de").touch()
    status, _, said = harness("--langs de,es --methods id_x")
    assert (status, harness.steps()) == (143, ["prepare-iwslt14 de"])
    assert "stopped by SIGTERM, 2 cells left" in said


def test_a_second_run_at_once_is_refused(harness):
    with lock(harness.results / ".reproduce.lock", "the results folder") as held:
        held.tell("intra-distillation reproduce (process 12) and its cells (34)")
        status, _, said = harness("--langs de --methods id_x")
    assert (status, harness.calls()) == (2, [])
    assert f"the results folder '{harness.results}' is in use by intra-distillation reproduce (process 12)" in said
    assert "and its cells (34) on " in said and said.count("\n") == 1


def test_whoever_is_kept_out_is_told_of_all_cells(harness, monkeypatch):
    told = []
    monkeypatch.setattr(reproduction.Held, "tell", lambda self, who: told.append(who))
    assert harness("--langs de --methods id_x")[0] == 0
    me = f"intra-distillation reproduce (process {os.getpid()})"
    assert told[1] == me  # the first one is the lock's own
    assert told[2].startswith(f"{me} and its prepare command (") and told[3] == me
    assert any(who.startswith(f"{me} and its cells (") for who in told)


def test_the_prepare_command_holds_the_results_folder_too(harness, monkeypatch):
    """Where the harness is killed and it lives on, a second one must not begin beside it."""
    held = []

    def run_logged(command, log, *, follow, started, pass_fds):
        held.append([os.readlink(f"/proc/self/fd/{number}") for number in pass_fds])
        log.write_text("no\n")
        return 2

    monkeypatch.setattr(reproduction.processes, "run_logged", run_logged)
    assert harness("--langs de --methods id_x")[0] == 1
    assert held == [[str(harness.results / ".reproduce.lock")]]


def test_a_results_folder_of_another_table_is_refused(harness):
    assert harness("--langs de --methods id_x")[0] == 0
    status, _, said = harness("--table 3 --methods id_x")
    assert (status, "holds the runs of table 2, not of table 3: give another folder" in said) == (2, True)


# -- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods nothing", "method 'nothing' is not in "),
        ("--langs xx", "--langs has 'xx': needed are languages of the table (ar de es fa he it nl pl)"),
        ("--seeds 1,two", "--seeds has 'two': needed are whole numbers from 0 on with a space between them"),
        ("--seeds ,", "--seeds ',' is empty: give at least one, or leave --seeds out"),
        ("--gpus none", "--gpus 'none': needed is a whole number, at least 1"),
        ("--parallel 0", "--parallel '0': needed is a whole number, at least 1"),
        ("--gpus 1", "--gpus '1': there is no GPU to use: leave it out"),
        ("--precision fp16", "--precision 'fp16' needs a GPU, and there is none: use auto, fp32 or bf16"),
        ("--archive nowhere.tgz", "--archive 'nowhere.tgz' is not a file: give the path of 2014-01.tgz"),
        ("--archives .", "--archives '.' is not for table 2: give --archive"),
        ("--table 3 --archive x", "--archive 'x' is not for table 3: give --archives"),
        ("--table 3 --archives nowhere", "--archives 'nowhere' is not a folder: give the one that holds the archives"),
        ("--table 3 --langs de", "--langs 'de' is for table 2: table 3 is about en-de"),
        ("--checkpoint newest", "--checkpoint is 'newest': allowed are best, last and averageN, as in average5"),
        ("--prepare-flags '", "--prepare-flags ''' cannot be split (No closing quotation): mind the quotes"),
        ("--config nowhere", "config 'nowhere' does not exist"),
        ("--results tiny.yaml", "--results 'tiny.yaml' is a file: give a folder"),
        ("--results tiny.yaml/x", "--results 'tiny.yaml/x' cannot be made: '"),
        ("--data-root tiny.yaml", "--data-root 'tiny.yaml' is a file: give a folder"),
        ("--data-root tiny.yaml/x/y", "tiny.yaml' is a file: give a folder"),
        ("-- --save-dir x", "'--save-dir' cannot be given after --: it comes from --save-dir of train.sh"),
        ("--langs de -- --max-update 0", "the training would never end"),
    ],
)
def test_mistakes_before_anything_is_run(harness, words, message):
    words = f"--langs de {words}" if words.startswith("-- ") else words
    status, _, said = harness(words)
    assert (status, harness.calls()) == (2, [])
    said = "\n".join(line for line in said.split("\n") if "| note: " not in line)
    assert message in said and said.count("\n") == 1
    assert not harness.results.exists()


def test_too_many_gpus_leave_the_plan_as_it_is(harness, monkeypatch):
    assert harness("--langs de --methods id_x")[0] == 0
    plan = (harness.results / "reproduce.json").read_bytes()
    monkeypatch.setattr(reproduce.devices, "probe", lambda: {"devices": ["a GPU"] * 2})
    for flag in ("--gpus", "--gpus-per-cell"):
        status, _, said = harness(f"--langs es --methods id_x {flag} 3")
        assert (status, f"{flag} '3': 2 are there, give that many at most\n" in said) == (2, True)
    assert (harness.results / "reproduce.json").read_bytes() == plan


@pytest.mark.parametrize("text", ["{", "[]", '{"table": 2, "checkpoint": "best", "data_root": "d"}'])
def test_a_damaged_plan_is_refused_and_left_alone(harness, text):
    plan = harness.results / "reproduce.json"
    harness.results.mkdir()
    plan.write_text(text, encoding="utf-8")
    status, _, said = harness("--langs de --methods id_x")
    assert (status, harness.calls(), plan.read_text(encoding="utf-8")) == (2, [], text)
    assert f"error: '{plan}' is damaged: restore it, or delete it (the runs stay; " in said and said.count("\n") == 1


def test_another_checkpoint_is_a_table_of_its_own(harness):
    assert harness("--langs de --methods id_x")[0] == 0
    status, table, said = harness("--langs de --methods id_x --checkpoint last")
    assert (status, "Checkpoint: last." in table) == (0, True)
    assert "note: this table is of --checkpoint last; `table` takes best, as the first call in this folder" in said
    assert json.loads((harness.results / "reproduce.json").read_text(encoding="utf-8"))["checkpoint"] == "best"


# -- the disk


def numbered(harness) -> list[str]:
    return sorted(path.name for path in harness.results.glob("de-en/id_x/seed1/checkpoint*.pt"))


def test_a_cell_that_is_done_keeps_best_and_last(harness):
    said = harness("--langs de --methods id_x")[2]
    assert "de-en/id_x/seed1: removed 3 numbered checkpoints (0.0 GB), kept best and last\n" in said
    assert numbered(harness) == ["checkpoint_best.pt", "checkpoint_last.pt"]
    harness.calls()
    assert (harness("--langs de --methods id_x")[0], harness.calls()) == (0, [])


@pytest.mark.parametrize("flag", ["--keep-checkpoints", "--checkpoint average2"])
def test_checkpoints_that_are_to_stay(harness, flag):
    assert harness(f"--langs de --methods id_x {flag}")[0] == 0
    assert len(numbered(harness)) == 5


def test_what_was_trained_before_is_left_as_it_is(harness):
    (harness.here / "fail-evaluate-id_x").touch()
    assert harness("--langs de --methods id_x")[0] == 1
    (harness.here / "fail-evaluate-id_x").unlink()
    assert harness("--langs de --methods id_x")[0] == 0
    assert len(numbered(harness)) == 5


def test_a_failure_beside_a_score_is_tried_again(harness):
    assert harness("--langs de --methods id_x")[0] == 0
    harness.calls()
    failure = {"step": "train", "reason": "r", "log": "l"}
    path = harness.results / "de-en" / "id_x" / "seed1" / "failed.json"
    path.write_text(json.dumps(failure), encoding="utf-8")
    assert harness("--langs de --methods id_x")[0] == 0
    assert (harness.steps(), path.exists()) == (["train id_x", "evaluate id_x"], False)


def test_a_score_from_before_the_end_of_the_training_is_not_taken_for_done(harness):
    assert harness("--langs de --methods id_x")[0] == 0
    harness.calls()
    path = harness.results / "de-en" / "id_x" / "seed1" / "eval" / "best" / "score.json"
    score = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**score, "finished": None}), encoding="utf-8")
    assert harness("--langs de --methods id_x")[0] == 0
    assert harness.steps() == ["train id_x", "evaluate id_x"]


def test_a_config_without_any_row(harness):
    write_config(harness.here, methods={"mine": {"criterion": "d"}})
    status, _, said = harness("--langs de")
    assert (
        status,
        "has none of the methods transformer, sage, rdrop, switch, id_js, id_x: give --methods" in said,
    ) == (
        2,
        True,
    )


def test_a_full_disk_is_one_line(harness, monkeypatch):
    def full(*words):
        raise OSError(28, "No space left on device", "some/file")

    for step in ("add_to_plan", "write_table"):
        with monkeypatch.context() as patch:
            patch.setattr(reproduce, step, full)
            status, _, said = harness("--langs de --methods id_x")
        assert status == 2
        assert "no space left on the disk of 'some/file' (No space left on device): free some and run the same" in said
        assert said.endswith("it goes on where it stopped; or give another --results\n")


def test_what_cannot_be_launched_leaves_nothing_running(harness, monkeypatch):
    """The second of two cells cannot be started: the first one is stopped."""
    (harness.here / "stop-transformer").write_text("")
    started, real = [], jobs._launch

    def launch(job, *words):
        if started:
            raise OSError(28, "No space left on device", "cell.log")
        started.append(real(job, *words))
        return started[0]

    monkeypatch.setattr(jobs, "_launch", launch)
    monkeypatch.setattr(os, "getppid", lambda: 0)
    assert harness("--langs de --methods transformer,id_x --parallel 2")[0] == 2
    assert started[0].wait(30) != 0


def test_the_plan_is_kept(harness):
    assert harness("--langs de --methods id_x")[0] == 0
    plan = json.loads((harness.results / "reproduce.json").read_text(encoding="utf-8"))
    assert plan["cells"] == [["de-en", "id_x", 1]] and (plan["table"], plan["checkpoint"]) == (2, "best")


def test_the_cause_of_a_failure_is_what_fairseq_said(tmp_path):
    log = tmp_path / "cell.log"
    for lines, reason in {
        "progress\nRuntimeError: no\nerror: fairseq-train ended with exit status 1; its log: x\n": "RuntimeError: no",
        "progress\nintra-distillation train: error: other settings\n": "intra-distillation train: error: other settings",
        "error: fairseq-train is not there\n": "it said nothing",
        "": "it said nothing",
    }.items():
        log.write_text(lines, encoding="utf-8")
        assert reproduction.failure_reason(log) == reason


# -- the batch on several GPUs


def test_the_batch_stays_the_recipes(harness, capsys, monkeypatch):
    """train.sh on 2 GPUs, then on 3: the run is the same one, and its log says what a batch was."""
    harness.prepare("de")
    write_config(harness.here, train={**CONFIG["train"], "max-tokens": 4096, "update-freq": 16})
    monkeypatch.setattr(train.processes, "fairseq_command", lambda name: f"/bin/{name}")
    monkeypatch.setattr(train.processes, "run_logged", lambda *words, **more: 1)
    said = []
    for gpus in (2, 3):
        probed = {"devices": ["a GPU"] * gpus, "cuda": "13", "threads": 1}
        monkeypatch.setattr(train.devices, "probe", lambda probed=probed: probed)
        words = ["data/de-en", "--method", "id_x", "--config", "tiny.yaml", "--save-dir", "run", "--", "--lr", "1"]
        assert main.main(["train", *words]) == 1
        said.append(capsys.readouterr().err)
        assert f" --update-freq {(8, 5)[gpus - 2]} --lr 1\n" in (harness.here / "run" / "train.log").read_text("utf-8")
        (harness.here / "run" / "checkpoint_last.pt").touch()
    batches = (
        "2 GPUs: update-freq 8, so a batch has 2 x 8 x 4096 = 65,536 tokens, as the recipe's\n",
        "3 GPUs: update-freq 5, so a batch has 3 x 5 x 4096 = 61,440 tokens, the nearest to the recipe's 16 x 4096 = "
        "65,536\n",
    )
    log = (harness.here / "run" / "train.log").read_text(encoding="utf-8")
    for batch, text in zip(batches, said):
        assert f"note: {batch}" in text and f" | batch: {batch}" in log
    assert log.count("peak resident memory: ") == 2
    settings = json.loads((harness.here / "run" / "run.json").read_text(encoding="utf-8"))["settings"]
    assert settings["options"]["update-freq"] == 16 and settings["flags"] == ["--lr", "1"]
    launches = json.loads((harness.here / "run" / "environment.json").read_text(encoding="utf-8"))["launches"]
    assert [(one["processes"], one["update_freq"]) for one in launches] == [(2, "8"), (3, "5")]
