"""The fleet's secrets in memory: FileSecrets's rules without its files and its cryptography.

tests/unit/test_secrets.py holds the same tests for both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from reconciler.adapters.secrets import FEWEST_KEYS
from reconciler.errors import SecretsFailed
from reconciler.routes import AUTHORITY_FILE, KEY_FILE, key_file
from reconciler.state import Credentials, Keyring, Trust

AUTHORITY = "0123456789ab"


@dataclass(slots=True)
class MemorySecrets:
    """The adapter; an id is a number that was never used before."""

    ids: list[str] = field(default_factory=list)
    folder: str = "/shared/secrets/sim"
    made: int = 0

    def keyring(self) -> Keyring:
        return Keyring(ids=tuple(self.ids), authority=AUTHORITY) if self.ids else Keyring()

    def issue(self, model: str, walltime_s: float) -> Credentials:
        assert model
        assert walltime_s > 0
        while len(self.ids) < FEWEST_KEYS:
            self.add_key()
        return Credentials(folder=self.folder, keys=tuple(self.ids))

    def external_keys(self, files: Iterable[str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
        return dict.fromkeys(files, "id of external"), {}

    def gateway_files(self, trust: Trust | None, external: Mapping[str, str]) -> Mapping[str, str]:
        texts = dict.fromkeys(external, "external")
        if trust is None:
            return {KEY_FILE: key_file(None, texts)} if texts else {}
        if trust.key not in self.ids or trust.authority != AUTHORITY:
            raise SecretsFailed("keys or authority have changed meanwhile: looking again")
        return {KEY_FILE: key_file(f"secret of {trust.key}", texts), AUTHORITY_FILE: AUTHORITY}

    def add_key(self) -> str:
        self.made += 1
        self.ids.append(f"{self.made:08x}")
        return self.ids[-1]

    def remove_key(self, id: str) -> None:
        if id in self.ids:
            self.ids.remove(id)
