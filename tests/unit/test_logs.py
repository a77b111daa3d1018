"""`fleet logs`: the right job's log, its last lines, and one line where there is none."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from reconciler.adapters.logs import Log, last_lines, newest_log, read_on
from reconciler.cli import main
from reconciler.errors import LogMissing
from reconciler.naming import ReplicaName, parse_log_name
from tests.unit.build import spec_record

NAME = ReplicaName(fleet="demo", model="tiny", revision="0123abcd", ordinal=0)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec whose jobs log into `tmp_path/logs`."""
    (tmp_path / "logs").mkdir()
    folder = tmp_path / "spec"
    folder.mkdir()
    record = spec_record()
    record["slurm"] |= {"log_dir": str(tmp_path / "logs")}
    (folder / "fleet.yaml").write_text(json.dumps(record))
    return folder


def write(spec: Path, file: str, text: str = "hello\n") -> Path:
    path = spec.parent / "logs" / file
    path.write_bytes(text.encode())
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["logs", *map(str, arguments)])


def test_log_of_a_model_is_that_of_its_newest_job(spec: Path) -> None:
    """The highest job id, as a number; other models, fleets and files are nothing to it."""
    write(spec, "demo.tiny.89abcdef.1.9.log", "old\n")
    write(spec, "demo.tiny.0123abcd.0.10.log", "new\n")
    for other in (
        *("demo.big.0123abcd.0.99.log", "prod.tiny.0123abcd.0.99.log", "tiny.log", "notes"),
        *("demo.tiny.0123abcd.0.99.log.old", "demo.tiny.0123abcd.0.x.log", "demo.tiny.0.99.log"),
    ):
        write(spec, other, "other\n")
    assert invoke(spec, "tiny").stdout == "new\n"
    assert invoke(spec, "demo.tiny.89abcdef.1").stdout == "old\n"


def test_log_shows_its_last_lines_as_asked(spec: Path) -> None:
    """100 by default; a last line without an end counts; JSON has the job beside them."""
    path = write(spec, f"{NAME}.7.log", "".join(f"line {at}\n" for at in range(300)) + "rest")
    assert invoke(spec, "tiny").stdout.splitlines() == [
        *(f"line {at}" for at in range(201, 300)),
        "rest",
    ]
    record = json.loads(invoke(spec, "tiny", "--lines", 2, "--json").stdout)
    assert record == {
        "name": str(NAME),
        "job_id": 7,
        "file": str(path),
        "lines": ["line 299", "rest"],
    }


def test_last_lines_are_found_from_the_end_of_a_large_file(tmp_path: Path) -> None:
    """Whatever the blocks in which it is read: exactly so many lines, and where they end."""
    path = tmp_path / "log"
    text = "".join(f"{at} {'x' * (at % 3000)}\n" for at in range(400))
    path.write_text(text)
    log = Log(name=NAME, job_id=1, path=path)
    for count in (1, 2, 99, 399, 400, 1000):
        shown, end = last_lines(log, count)
        assert shown == "".join(text.splitlines(keepends=True)[-count:])
        assert end == len(text)


def test_R37_log_moves_no_cursor(spec: Path) -> None:
    """Lines and tabs stay, escape sequences do not reach the terminal."""
    write(spec, f"{NAME}.7.log", "a\tb\x1b[2Jc\rd\n")
    assert invoke(spec, "tiny").stdout == "a\tb?[2Jc?d\n"


def test_log_that_is_not_there_is_one_line(spec: Path) -> None:
    """No log yet, and a folder that this host does not have, say what to do."""
    logs = spec.parent / "logs"
    result = invoke(spec, "tiny")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"fleet: no job of tiny has a log in {logs} yet; `fleet explain` says what it waits for\n"
    )
    logs.rmdir()
    result = invoke(spec, "tiny")
    assert result.exit_code == 1
    assert result.stderr == (
        f"fleet: {logs} can't be read on this host (No such file or directory): "
        "run this where the jobs' log_dir is mounted\n"
    )


def test_log_that_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    """A folder in its place, as no permission can be taken from root."""
    (tmp_path / f"{NAME}.7.log").mkdir()
    log = newest_log(tmp_path, "demo", str(NAME))
    for read in (last_lines, read_on):
        with pytest.raises(LogMissing, match="can't be read: Is a directory"):
            read(log, 1)


def test_what_is_added_is_read_in_whole_lines(tmp_path: Path) -> None:
    """A character of several bytes is never torn; a log that was cut begins again."""
    path = tmp_path / "log"
    path.write_bytes("one\ntwo é".encode()[:-1])
    log = Log(name=NAME, job_id=1, path=path)
    text, position = read_on(log, 0)
    assert text == "one\n"
    assert read_on(log, position) == ("", position)
    path.write_bytes("one\ntwo é\n".encode())
    text, position = read_on(log, position)
    assert text == "two é\n"
    path.write_bytes(b"new\n")
    assert read_on(log, position) == ("new\n", 4)
    path.write_bytes(b"x" * 100_000)
    assert read_on(log, 0) == ("x" * 65536, 65536)


def test_followed_log_shows_what_is_added_until_told_to_end(spec: Path) -> None:
    """Ctrl-C is how it ends, so that is no error."""
    path = write(spec, f"{NAME}.7.log", "one\n")
    argv = [sys.executable, "-m", "reconciler", "logs", str(spec), "tiny", "--follow"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        assert tail.stdout.readline() == "one\n"
        with path.open("a") as log:
            log.write("two\n")
        assert tail.stdout.readline() == "two\n"
        tail.send_signal(signal.SIGINT)
        _, said = tail.communicate(timeout=60)
    assert (tail.returncode, said) == (0, f"{path}:\n")


def test_json_and_follow_exclude_each_other(spec: Path) -> None:
    """A record has an end."""
    result = invoke(spec, "tiny", "--json", "--follow")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


@pytest.mark.parametrize("text", ["", ".log", "a.log", "demo.tiny.0123abcd.0.log", "x.y.z.0.1.log"])
def test_file_of_another_name_is_no_log_of_ours(text: str) -> None:
    """Only a whole job name and an id."""
    assert parse_log_name(text) is None
