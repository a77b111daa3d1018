"""The fleet's secrets: on real files, and the simulator's in memory held to the same rules."""

import os
import re
import socket
import ssl
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest

from reconciler.adapters import certificates, secrets
from reconciler.adapters.secrets import FEWEST_KEYS, MOST_KEYS, FileSecrets
from reconciler.errors import SecretsFailed
from reconciler.routes import AUTHORITY_FILE, KEY_FILE
from reconciler.state import Keyring, Trust
from tests.simulation.secrets import MemorySecrets

DAY_S = 86_400.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A secret_dir as an admin makes it."""
    made = tmp_path / "secrets"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def files(folder: Path) -> FileSecrets:
    return FileSecrets(str(folder), "demo")


@pytest.fixture(params=["files", "memory"])
def either(request: pytest.FixtureRequest, files: FileSecrets) -> FileSecrets | MemorySecrets:
    return files if request.param == "files" else MemorySecrets()


# -- what both must do

Either = FileSecrets | MemorySecrets


def test_keyring_is_empty_before_the_first_need(either: Either) -> None:
    """To look makes nothing: `fleet plan` changes nothing."""
    assert either.keyring() == Keyring()


def test_issue_gives_a_job_every_key_there_is(either: Either) -> None:
    """At least two of them, so that there is always one to change over to; oldest first."""
    given = either.issue("tiny", DAY_S)
    assert len(given.keys) == FEWEST_KEYS
    assert either.keyring().ids == given.keys
    added = either.add_key()
    assert either.issue("tiny", DAY_S).keys == (*given.keys, added)
    assert either.issue("other", DAY_S).keys == (*given.keys, added)


def test_removed_key_is_gone(either: Either) -> None:
    """To remove it twice is no error."""
    first, second = either.issue("tiny", DAY_S).keys
    for _ in range(2):
        either.remove_key(first)
    assert either.keyring().ids == (second,)
    assert either.issue("tiny", DAY_S).keys[0] == second


def test_gateway_files_hold_the_key_for_protected_replicas_only(either: Either) -> None:
    """An open replica gets no key: anybody may have bound its port."""
    either.issue("tiny", DAY_S)
    ring = either.keyring()
    made = either.gateway_files(Trust(key=ring.ids[0], authority=ring.authority), {})
    assert made.keys() == {KEY_FILE, AUTHORITY_FILE}
    assert 'default "";' in made[KEY_FILE]
    assert r"~^model\. " in made[KEY_FILE]


@pytest.mark.parametrize("what", ["key", "authority"])
def test_gateway_files_of_what_is_gone_are_refused(either: Either, what: str) -> None:
    """The plan was made for others: the next cycle looks again."""
    either.issue("tiny", DAY_S)
    ring = either.keyring()
    trust = {"key": ring.ids[0], "authority": ring.authority} | {what: "0" * 8}
    with pytest.raises(SecretsFailed, match="meanwhile"):
        either.gateway_files(Trust(**trust), {})


# -- the keys of fallbacks


def external(folder: Path, text: str = "sk-0123.a_b/c+d=", mode: int = 0o600) -> str:
    file = folder / "external.key"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_key_of_a_fallback_is_told_by_its_id(files: FileSecrets, folder: Path) -> None:
    """Another key is another id; a line end behind it does not count."""
    file = external(folder)
    ids, errors = files.external_keys([file])
    assert (list(ids), errors) == ([file], {})
    assert re.fullmatch("[0-9a-f]{8}", ids[file])
    assert files.external_keys([external(folder, "sk-0123.a_b/c+d=\n")])[0] == ids
    assert files.external_keys([external(folder, "sk-other")])[0] != ids


def _made_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


BROKEN_KEYS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "two-lines": lambda path: path.write_text("secret-a\nsecret-b\n"),
    "quote": lambda path: path.write_text('secret"; } server {'),
    "variable": lambda path: path.write_text("secret$uri"),
    "bytes": lambda path: path.write_bytes(b"secret\xff"),
    "open-to-others": lambda path: path.chmod(0o640),
    "fifo": _made_a_fifo,
    "link": lambda path: path.symlink_to(path.rename(path.with_name("other"))),
    "folder": _made_a_folder,
}


@pytest.mark.parametrize("broken", BROKEN_KEYS.values(), ids=BROKEN_KEYS.keys())
def test_R36_file_without_a_key_is_one_line_that_does_not_show_it(
    files: FileSecrets, folder: Path, broken: Callable[[Path], object]
) -> None:
    """It spoils no other, and nothing of it reaches NGINX."""
    file = external(folder)
    broken(Path(file))
    good = folder / "good.key"
    good.write_text("sk-good")
    good.chmod(0o600)
    ids, errors = files.external_keys([file, str(good)])
    assert (list(ids), list(errors)) == ([str(good)], [file])
    assert file in errors[file]
    assert "\n" not in errors[file]
    assert "secret" not in errors[file].replace(str(folder), "")
    with pytest.raises(SecretsFailed):
        files.gateway_files(None, {"tiny": file})


def test_gateway_files_hold_the_keys_of_fallbacks(files: FileSecrets, folder: Path) -> None:
    """Beside the replicas' key, and also where no replica has one."""
    file = external(folder, "sk-external")
    assert files.gateway_files(None, {}) == {}
    alone = files.gateway_files(None, {"tiny": file})
    assert list(alone) == [KEY_FILE]
    assert r'~^external\.tiny$ "Bearer sk-external";' in alone[KEY_FILE]
    files.issue("tiny", DAY_S)
    ring = files.keyring()
    trust = Trust(key=ring.ids[0], authority=ring.authority)
    both = files.gateway_files(trust, {"tiny": file})
    assert both.keys() == {KEY_FILE, AUTHORITY_FILE}
    assert both[KEY_FILE].count("Bearer") == 2


# -- files


def everything(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def test_all_that_is_made_is_its_users_alone(files: FileSecrets, folder: Path) -> None:
    """Folders 0700, files 0600 whatever the umask; and nothing half-written is left."""
    before = os.umask(0)
    try:
        files.issue("tiny", DAY_S)
    finally:
        os.umask(before)
    for path in everything(folder):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not list(folder.rglob(".part-*"))


def test_keys_ids_say_nothing_of_them(files: FileSecrets, folder: Path) -> None:
    """Names, repr and errors carry ids; the keys themselves are only in their files."""
    files.issue("tiny", DAY_S)
    keys = files.backend_keys()
    names = " ".join(map(str, everything(folder)))
    # Nothing in it is special to a shell, YAML, NGINX or an engine's command line.
    assert all(re.fullmatch("[0-9a-f]{64}", key.text) for key in keys)
    assert not any(key.text in names or key.text in repr(keys) for key in keys)


LOOSE = {
    "secret_dir": ("", 0o750),
    "fleet": ("demo", 0o701),
    "keys": ("demo/keys", 0o755),
    "a-key": ("demo/keys/*", 0o640),
    "authority": ("demo/ca.pem", 0o604),
}


@pytest.mark.parametrize(("pattern", "mode"), LOOSE.values(), ids=LOOSE.keys())
def test_what_others_may_read_is_refused_in_one_line(
    files: FileSecrets, folder: Path, pattern: str, mode: int
) -> None:
    """It names the file and its mode; nothing is read, and no job gets anything of it."""
    files.issue("tiny", DAY_S)
    path = next(folder.glob(pattern)) if pattern else folder
    path.chmod(mode)
    for ask in (files.keyring, lambda: files.issue("tiny", DAY_S)):
        with pytest.raises(SecretsFailed) as failed:
            ask()
        assert f"{path} is open to other users: its mode is {mode:04o}, not 0" in str(failed.value)


def test_what_belongs_to_another_user_is_refused(
    files: FileSecrets, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that somebody else made may hold keys that they know."""
    files.issue("tiny", DAY_S)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(SecretsFailed, match=f"{folder} belongs to another user"):
        files.keyring()


@pytest.mark.parametrize("what", ["secret_dir", "ca.pem", "models/tiny.pem"])
def test_link_is_refused(files: FileSecrets, folder: Path, what: str) -> None:
    """Where it leads may change between a look at it and its use."""
    files.issue("tiny", DAY_S)
    path = folder if what == "secret_dir" else folder / "demo" / what
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))
    with pytest.raises(SecretsFailed, match=path.name):
        files.issue("tiny", DAY_S)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no-secret_dir": ("", lambda path: path.rename(f"{path}.gone"), "No such file"),
    "authority-gone": ("demo/ca.pem", Path.unlink, "is gone, but not the keys"),
    "authority-empty": ("demo/ca.pem", lambda path: path.write_text(""), "holds no certificate"),
    "authority-cut": (
        "demo/ca.pem",
        lambda path: path.write_text(path.read_text().replace("PRIVATE", "PUBLIC")),
        "is damaged",
    ),
    "a-key": ("demo/keys/*", lambda path: path.write_text("x"), "holds another key than it says"),
}


@pytest.mark.parametrize(("pattern", "damage", "line"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_one_line_and_nothing_is_made_anew(
    files: FileSecrets, folder: Path, pattern: str, damage: Callable[[Path], object], line: str
) -> None:
    """New ones in their place would be those that no replica believes."""
    files.issue("tiny", DAY_S)
    damage(next(folder.glob(pattern)) if pattern else folder)
    with pytest.raises(SecretsFailed, match=line) as failed:
        # A walltime for which the certificate that there is would not do.
        files.issue("tiny", 500 * DAY_S)
    assert "\n" not in str(failed.value)


def test_without_a_folder_there_is_nothing() -> None:
    """An open fleet needs none; a protected job without one is refused."""
    none = FileSecrets(None, "demo")
    assert none.keyring() == Keyring()
    with pytest.raises(SecretsFailed, match="secret_dir"):
        none.issue("tiny", DAY_S)


def test_first_need_of_many_hosts_at_once_makes_one_authority(folder: Path) -> None:
    """Whoever comes second uses what the first one made; every certificate is of the same."""
    hosts = [FileSecrets(str(folder), "demo") for _ in range(8)]
    with ThreadPoolExecutor(len(hosts)) as pool:
        given = list(pool.map(lambda host: host.issue("tiny", DAY_S), hosts))
    known = set(hosts[0].keyring().ids)
    assert all(known.issuperset(one.keys) for one in given)
    own, signer = secrets._certificates(folder / "demo" / "models" / "tiny.pem")
    assert own != signer == hosts[0].authority()


def test_a_newer_key_is_the_last_whatever_the_clock_says(
    files: FileSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that was set back must not make a new key an old one."""
    files.issue("tiny", DAY_S)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    added = files.add_key()
    assert files.keyring().ids[-1] == added


def test_keys_are_few_enough_for_a_comment(files: FileSecrets) -> None:
    """Each id takes its place in a job's comment."""
    files.issue("tiny", DAY_S)
    for _ in range(MOST_KEYS - FEWEST_KEYS):
        files.add_key()
    with pytest.raises(SecretsFailed, match="revoke some of the older ones"):
        files.add_key()


# -- certificates


def certificate(folder: Path) -> str:
    return (folder / "demo" / "models" / "tiny.pem").read_text()


def test_certificate_stays_until_a_job_could_outlive_it(files: FileSecrets, folder: Path) -> None:
    """Then there is another, long before; also when another authority has signed it."""
    files.issue("tiny", DAY_S)
    first = certificate(folder)
    files.issue("tiny", 30 * DAY_S)
    assert certificate(folder) == first
    files.issue("tiny", 300 * DAY_S)
    second = certificate(folder)
    assert second != first
    assert certificates.seconds_left(second) > 600 * DAY_S
    assert certificates.seconds_left(second) < 700 * DAY_S
    FileSecrets(str(folder), "other").issue("tiny", DAY_S)
    others = (folder / "other" / "models" / "tiny.pem").read_text()
    (folder / "demo" / "models" / "tiny.pem").write_text(others)
    files.issue("tiny", DAY_S)
    assert certificate(folder) not in (first, second, others)


def test_certificate_never_outlives_its_authority(files: FileSecrets) -> None:
    """It would be believed by nobody from then on."""
    with pytest.raises(SecretsFailed, match="ends before a new"):
        files.issue("tiny", 40 * 365 * DAY_S)


def shake_hands(server: Path, authority: str, name: str) -> str:
    """Return how a client that believes an authority and wants a name gets on with a server."""
    here, there = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server)

    def serve() -> None:
        try:
            with context.wrap_socket(there, server_side=True) as connection:
                connection.recv(1)
        except OSError:
            there.close()  # the client would have none of it

    thread = Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cadata=authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with client.wrap_socket(here, server_hostname=name):
            return "believes"
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        here.close()
        thread.join()


def test_certificate_is_believed_for_its_model_alone(files: FileSecrets, folder: Path) -> None:
    """By those who know the fleet's authority, however strict; not for another model's name."""
    files.issue("tiny", DAY_S)
    other = FileSecrets(str(folder), "other")
    other.issue("tiny", DAY_S)
    server, name = folder / "demo" / "models" / "tiny.pem", "tiny.demo.modelfleet.internal"
    assert shake_hands(server, files.authority(), name) == "believes"
    assert "Hostname mismatch" in shake_hands(server, files.authority(), f"x{name}")
    assert shake_hands(server, other.authority(), name) != "believes"
