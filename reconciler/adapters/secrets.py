"""The fleet's own certificate authority, its replicas' certificates and its backend keys, as files.

`<secret_dir>/<fleet>` holds `ca.pem` (who signs), `models/<model>.pem` (what a replica of the model
proves itself with: key, certificate, and who signed it) and `keys/<made at>.<id>`, a file for each
backend key. Nothing is ever changed in place: a file is linked or renamed to its name when it is
whole, and to rotate or revoke is to add or remove one file. So several hosts may do so at once, and
a job that reads meanwhile sees no half of anything.

Everything is the fleet's user's alone; what is not is an error, and nothing is read of it.
"""

import hashlib
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from reconciler.errors import SecretsFailed
from reconciler.naming import tls_name
from reconciler.routes import AUTHORITY_FILE, KEY_FILE, key_file
from reconciler.state import Credentials, Keyring, Trust

# Jobs are given one to use and one to change over to.
FEWEST_KEYS = 2
# Each id takes its place in a job's comment, which holds 1,024 bytes.
MOST_KEYS = 12

_DAY_S = 86_400
# A job may wait for long before it reads its certificate, and must not outlive it then.
_LEAST_LEFT_S = 90 * _DAY_S
_LASTS_BEYOND_S = 365 * _DAY_S

_KEY_NAME = re.compile(r"([0-9]{1,12})\.([0-9a-f]{8})")
# What can stand in NGINX's quotes, and in a header.
_EXTERNAL_KEY = re.compile(r"[A-Za-z0-9._~+/=:-]{1,1000}")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\n.*?-----END CERTIFICATE-----\n", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class BackendKey:
    """A key that replicas take, and when it was made (epoch seconds)."""

    made_at: int
    id: str
    text: str = field(repr=False)


class FileSecrets:
    """The adapter for one fleet's secrets; without a folder it has none, and can make none."""

    def __init__(self, secret_dir: str | None, fleet: str) -> None:
        self._parent = None if secret_dir is None else Path(secret_dir)
        self._fleet = fleet
        self._making = Lock()  # several submissions are under way at once

    def keyring(self) -> Keyring:
        """Return what there is, without its secrets. Raises SecretsFailed if that can't be told."""
        keys = self.backend_keys()
        if not keys:
            return Keyring()
        digest = hashlib.sha256(self.authority().encode()).hexdigest()
        return Keyring(ids=tuple(key.id for key in keys), authority=digest[:12])

    def backend_keys(self) -> list[BackendKey]:
        """Return the backend keys, oldest first. Raises SecretsFailed."""
        if self._parent is None:
            return []
        with _explained():
            _check(self._parent, stat.S_IFDIR)
            try:
                _check(self._folder, stat.S_IFDIR)
                folder = _check(self._folder / "keys", stat.S_IFDIR)
                names = [path.name for path in folder.iterdir()]
            except FileNotFoundError:
                return []  # none are made yet
            found = filter(None, map(_KEY_NAME.fullmatch, names))
            return sorted(self._key(name[0], int(name[1]), name[2]) for name in found)

    def authority(self) -> str:
        """Return the certificate, in PEM, of who signs those of the replicas."""
        with _explained():
            return _certificates(self._folder / "ca.pem")[-1]

    def issue(self, model: str, walltime_s: float) -> Credentials:
        """Return what a job of the model needs; what is missing of it is made first."""
        with self._making, _explained():
            folders = (self._folder, self._folder / "models", self._folder / "keys")
            _check(self._folder.parent, stat.S_IFDIR)
            for folder in folders:
                folder.mkdir(mode=0o700, exist_ok=True)
                _check(folder, stat.S_IFDIR)
            self._make_authority()
            while len(self.backend_keys()) < FEWEST_KEYS:
                self.add_key()
            try:
                self._renew(model, walltime_s)
            except ValueError:
                what = f"{self._folder / 'ca.pem'} or models/{model}.pem is damaged"
                raise SecretsFailed(f"{what}: put it back from your backup") from None
            ids = tuple(key.id for key in self.backend_keys())
            return Credentials(folder=str(self._folder), keys=ids)

    def external_keys(self, files: Iterable[str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the id of the key in each of these files, and one line for each that has none."""
        ids, errors = {}, {}
        for file in files:
            try:
                ids[file] = _key_id(_external_key(file))
            except SecretsFailed as error:
                errors[file] = str(error)
        return ids, errors

    def gateway_files(self, trust: Trust | None, external: Mapping[str, str]) -> Mapping[str, str]:
        """Return the secret files of a gateway that shows that key and believes that authority.

        `external` names the file with the key of each model's fallback.
        """
        texts = {model: _external_key(file) for model, file in external.items()}
        if trust is None:
            return {KEY_FILE: key_file(None, texts)} if texts else {}
        keys = {key.id: key.text for key in self.backend_keys()}
        if trust.key not in keys or trust.authority != self.keyring().authority:
            raise SecretsFailed("keys or authority have changed meanwhile: looking again")
        return {KEY_FILE: key_file(keys[trust.key], texts), AUTHORITY_FILE: self.authority()}

    def add_key(self) -> str:
        """Add a key that is newer than all others; return its id."""
        with _explained():
            keys = self.backend_keys()
            if len(keys) >= MOST_KEYS:
                raise SecretsFailed(f"there are {len(keys)} keys: revoke some of the older ones")
            made_at = max([int(time.time()), *(key.made_at + 1 for key in keys)])
            # Not urlsafe: with a dash in front an engine would take it for an option.
            text = secrets.token_hex(32)
            name = f"{made_at}.{_key_id(text)}"
            _link(_check(self._folder / "keys", stat.S_IFDIR) / name, text)
            return _key_id(text)

    def remove_key(self, id: str) -> None:
        """Remove a key, for good."""
        with _explained():
            for key in (key for key in self.backend_keys() if key.id == id):
                (self._folder / "keys" / f"{key.made_at}.{key.id}").unlink(missing_ok=True)

    @property
    def _folder(self) -> Path:
        if self._parent is None:
            raise SecretsFailed("protected replicas need the spec's secret_dir, also while they go")
        return self._parent / self._fleet

    def _key(self, name: str, made_at: int, id: str) -> BackendKey:
        text = _read(self._folder / "keys" / name)
        if _key_id(text) != id:
            raise SecretsFailed(f"{self._folder / 'keys' / name} holds another key than it says")
        return BackendKey(made_at=made_at, id=id, text=text)

    def _make_authority(self) -> None:
        """Make the authority unless there is one. Of several hosts that do, all use the first's."""
        file = self._folder / "ca.pem"
        if file.exists():
            return
        # Another host may have made both since then, the authority first.
        if self.backend_keys() and not file.exists():
            raise SecretsFailed(f"{file} is gone, but not the keys: put it back from your backup")
        from reconciler.adapters import certificates  # not at the top: it takes long to import

        _link(file, certificates.new_authority(self._fleet))

    def _renew(self, model: str, walltime_s: float) -> None:
        """Make a model's certificate, unless it has one that no job of it can outlive."""
        from reconciler.adapters import certificates

        file = self._folder / "models" / f"{model}.pem"
        own, *signers = certificates_in(_read(file)) if file.exists() else [""]
        lasting_s = walltime_s + _LEAST_LEFT_S
        if signers == [self.authority()] and certificates.seconds_left(own) > lasting_s:
            return
        authority = _read(self._folder / "ca.pem")
        lasts_s = walltime_s + _LASTS_BEYOND_S
        if certificates.seconds_left(authority) < lasts_s:
            raise SecretsFailed(f"{self._folder / 'ca.pem'} ends before a new certificate would")
        _replace(
            file, certificates.new_certificate(authority, tls_name(self._fleet, model), lasts_s)
        )


def _external_key(file: str) -> str:
    """Return the key that somebody else has given us. Raises SecretsFailed."""
    with _explained():
        text = _read(_check(Path(file), stat.S_IFREG)).strip()
    if not _EXTERNAL_KEY.fullmatch(text):
        raise SecretsFailed(f"{file} must hold one key: letters, digits and any of -._~+/=: alone")
    return text


def _key_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def _explained() -> Iterator[None]:
    """Turn an error of the filesystem into its one line."""
    try:
        yield
    except OSError as error:
        raise SecretsFailed(f"{error.filename}: {error.strerror}") from None


def _check(path: Path, kind: int) -> Path:
    """Return the path if only our user may look into it. Raises OSError or SecretsFailed."""
    _check_status(path, path.lstat(), kind)
    return path


def _check_status(path: Path, status: os.stat_result, kind: int) -> None:
    mode = "0700" if kind == stat.S_IFDIR else "0600"
    if stat.S_IFMT(status.st_mode) != kind:
        raise SecretsFailed(f"{path} is no {'folder' if kind == stat.S_IFDIR else 'plain file'}")
    if status.st_uid != os.geteuid():
        raise SecretsFailed(f"{path} belongs to another user (id {status.st_uid})")
    if status.st_mode & 0o077:
        is_now = f"{stat.S_IMODE(status.st_mode):04o}"
        raise SecretsFailed(f"{path} is open to other users: its mode is {is_now}, not {mode}")


def _read(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        _check_status(path, os.fstat(descriptor), stat.S_IFREG)
        return file.read()


def certificates_in(pem: str) -> list[str]:
    """Return the certificates in a text, without the keys that may stand there too."""
    return _CERTIFICATE.findall(pem)


def _certificates(path: Path) -> list[str]:
    """Return the certificates in a file; there is at least one."""
    found = certificates_in(_read(path))
    if not found:
        raise SecretsFailed(f"{path} holds no certificate: put it back from your backup")
    return found


def _written(folder: Path, text: str) -> Path:
    descriptor, part = tempfile.mkstemp(dir=folder, prefix=".part-")
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    return Path(part)


def _link(path: Path, text: str) -> None:
    """Write a file unless there is one of that name; never half of one."""
    part = _written(path.parent, text)
    try:
        path.hardlink_to(part)
    except FileExistsError:
        pass
    finally:
        part.unlink()


def _replace(path: Path, text: str) -> None:
    _written(path.parent, text).rename(path)
