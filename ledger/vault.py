"""Personal values: sealed before the first event is written, unsealed for readers who may see them, and erased.

Owns every data key: in the database, one or more a subject, wrapped by the project's key. Invariants:
nothing is sealed or fingerprinted under a key that is not the one the project began with; a sealed
value opens only at the place it was sealed for, and only while the database has its key; `seal` and
`fingerprint` never do I/O. Who may read what, and whose keys are destroyed, is decided elsewhere.
Sealing does not hide which values have the same subject, nor how long each is (there is no padding).
"""

import asyncio
import binascii
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID
from weakref import WeakValueDictionary

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Meta, Struct, field

from ledger.errors import StoreUnavailable
from ledger.personal import ERASED, PERSONAL, SEALED, SUBJECT_CHARACTERS_MAX, marks, replaced, subjects
from ledger.postgres import Pool, Statement, queries, store_errors, texts
from ledger.project_key import NONCE_BYTES, ProjectKey, UnusableKey, create_key_file, key_errors, read_key_file

SQL = queries("ledger", "vault")
_find_data_keys = Statement("find_data_keys", SQL.find_data_keys)

RETIRE_SECONDS_MAX = 2.0

Held = tuple[object, ...]
"""Opaque. While the caller keeps it, the keys it stands for stay in memory, unless they are given up."""


class Unprepared(Exception):
    """There is no key in memory to seal a value with; `prepare` has one there."""


class BrokenSeal(Exception):
    """A sealed value was altered or moved: it does not open at the place where it was found."""


class Place(Struct, frozen=True):
    """Where a value stands: `path` is the JSON pointer (RFC 6901) to it from the entry's root."""

    project_id: str
    stream_id: UUID
    stream_version: int
    event_id: UUID
    path: str

    def encoded(self) -> bytes:
        """The associated data up to the path, which follows. Frozen: a change closes every box.

        Unambiguous: fixed widths first, then the project, which never holds the NUL that ends it.
        """
        return b"muniment sealed value 1\0%b%b%b%b\0" % (
            self.stream_id.bytes,
            self.event_id.bytes,
            self.stream_version.to_bytes(8, "big"),
            self.project_id.encode(),
        )


# The two forms of a marked value


class _PersonalValue(Struct, forbid_unknown_fields=True):
    subject: Annotated[str, Meta(min_length=1, max_length=SUBJECT_CHARACTERS_MAX)]
    value: Any


class _Personal(Struct, forbid_unknown_fields=True):
    inner: _PersonalValue = field(name=PERSONAL)


class _Box(Struct, forbid_unknown_fields=True):
    subject: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    key: int
    nonce: str
    box: str


class _Sealed(Struct, forbid_unknown_fields=True):
    inner: _Box = field(name=SEALED)


# The keys


class _Ring(Struct, weakref=True, eq=False):
    """What is known of one subject's keys: those that were unwrapped, by number, and which is for new values.

    `current` is the number of the newest that is neither retired nor destroyed; 0 if there is none. `last` is that
    of the newest there ever was.
    """

    keys: dict[int, AESGCM]
    current: int = 0
    last: int = 0


class _Look(Struct, eq=False):
    """A query for the keys of these subjects; more may join until it begins."""

    subjects: set[str]
    job: asyncio.Task[dict[tuple[str, int], bytes | None]] | None = None


class Vault:
    """Seals, unseals and fingerprints for every project whose key file is in `keys_dir`.

    `create_keys`: may make the key file of a project that never had one. The keys of the last `subjects_max` subjects
    stay in memory, which saves unwrapping them; whether one may still open anything the database is asked each time.
    Every method may raise UnusableKey, and those that wait StoreUnavailable.
    """

    def __init__(self, keys_dir: Path, pool: Pool, *, create_keys: bool, subjects_max: int = 10_000) -> None:
        self._keys_dir = keys_dir
        self._pool = pool
        self._create_keys = create_keys
        self._subjects_max = subjects_max
        self._projects: dict[str, ProjectKey] = {}
        self._recent: OrderedDict[tuple[str, str], _Ring] = OrderedDict()
        self._rings: WeakValueDictionary[tuple[str, str], _Ring] = WeakValueDictionary()
        self._given_up = 0
        self._looks: dict[str, _Look] = {}
        self._looking: dict[str, asyncio.Lock] = {}

    async def open(self, project_id: str) -> None:
        """Load the project's key and prove that it is the one the project began with.

        Costs nothing after the first time. The other methods that wait do it by themselves.
        """
        if project_id in self._projects:
            return
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{1,62}", project_id):
            raise ValueError(f"{project_id!r} is no project id, so it names no key file")
        path = self._keys_dir / f"{project_id}.key"
        known = await self._query(SQL.find_project_key, project_id)
        secret = await asyncio.to_thread(read_key_file, path)
        if secret is None:
            secret = await self._create(path, project_id, known=bool(known))
        key = ProjectKey(project_id, secret)
        if not known:
            # Dying before this leaves a key file that nothing depends on yet; the next start takes it.
            await self._query(SQL.claim_project_key, project_id, key_id=key.key_id)
            known = await self._query(SQL.find_project_key, project_id)
        if known != [(key.key_id,)]:
            raise UnusableKey(
                f"The key file {path} is not the key that project {project_id} began with; nothing "
                "was done with it. Put the original there, from a backup or another node."
            )
        self._projects[project_id] = key

    async def _create(self, path: Path, project_id: str, *, known: bool) -> bytes:
        if known:
            raise UnusableKey(
                f"The key file {path} is missing, and project {project_id} has begun with it. Put "
                "the original there, from a backup or another node: no other opens what it sealed."
            )
        if not self._create_keys:
            raise UnusableKey(
                f"Project {project_id} has no key file {path}. Make one with `muniment project "
                f"create {project_id}`, or put there the one that other nodes have."
            )
        return await asyncio.to_thread(create_key_file, path)

    def fingerprint(self, project_id: str, canonical: bytes) -> bytes:
        """HMAC-SHA-256 of a command's canonical bytes: 32 bytes. The project must be open."""
        return self._opened(project_id).fingerprint(canonical)

    def pseudonym(self, project_id: str, subject: str) -> str:
        """What `subject` is called at rest. The project must be open."""
        return self._opened(project_id).pseudonym(subject)

    async def prepare(self, project_id: str, subjects: Iterable[str]) -> Held:
        """Have a data key of each subject in memory, creating what is missing; no I/O if all are.

        Keep what it returns until `seal` is done: while it lives, these keys are not forgotten,
        however many other subjects come in between.
        """
        await self.open(project_id)
        project = self._projects[project_id]
        rings = self._remembered(project_id, {project.pseudonym(subject) for subject in subjects})
        while missing := [name for name, ring in rings.items() if ring.current not in ring.keys]:
            rings |= await self._find(project, missing)
            lacking = [name for name in missing if not rings[name].keys]
            if lacking:
                numbers = [rings[name].last + 1 for name in lacking]
                wrapped = [project.new_wrapped(*new) for new in zip(lacking, numbers, strict=True)]
                # Committed on return, so values may be sealed under them. Dying here leaves keys without values.
                await self._query(SQL.create_data_keys, project_id, subjects=lacking, numbers=numbers, wrapped=wrapped)
        return tuple(rings.values())

    async def prepare_for(self, project_id: str, asked: bytes) -> Held | None:
        """As `prepare`, for the subjects of the personal values inside a command's canonical bytes, if it has any: a
        caller's, who hears of an unusable key that the store is. Raises StoreUnavailable."""
        if b"$personal" not in asked:
            return None
        with key_errors():
            return await self.prepare(project_id, subjects(msgspec.json.decode(asked)))

    def seal(self, project_id: str, value: Any, where: Place) -> Any:
        """A copy of `value` with its personal values sealed. Raises Unprepared unless its subjects are prepared.

        `value` is decoded JSON that `check` has passed and stands at `where`. AES-256-GCM with a
        random 96-bit nonce (NIST SP 800-38D s8.3: up to 2^32 values a key).
        """
        project, place = self._at(project_id, where)

        def sealed(marked: dict[str, Any], at: str) -> dict[str, Any]:
            personal = msgspec.convert(marked, _Personal).inner
            pseudonym = project.pseudonym(personal.subject)
            ring = self._rings.get((project_id, pseudonym))
            key = ring.keys.get(ring.current) if ring else None
            if ring is None or key is None:
                raise Unprepared(f"Subject {pseudonym} of project {project_id} is not prepared.")
            nonce = os.urandom(NONCE_BYTES)
            box = key.encrypt(nonce, msgspec.json.encode(personal.value), place + at.encode())
            inner = {"subject": pseudonym, "key": ring.current, "nonce": _base64(nonce), "box": _base64(box)}
            return {SEALED: inner}

        return replaced(value, PERSONAL, where.path, sealed)

    async def unseal(self, project_id: str, value: Any, where: Place) -> Any:
        """`unseal_all` for one value."""
        return (await self.unseal_all(project_id, [(value, where)]))[0]

    async def unseal_all(self, project_id: str, values: Sequence[tuple[Any, Place]]) -> list[Any]:
        """Copies of the values, each standing at its place, with what was sealed readable again.

        A value whose key was destroyed, or is not in this database, reads `{"$erased": true}`: what was destroyed
        before this was asked opens nothing, whatever is in memory. One query for all, none where nothing is sealed.
        Raises BrokenSeal if one was altered or moved.
        """
        await self.open(project_id)
        boxes = [_box(marked, where, at) for value, where in values for marked, at in marks(value, SEALED, where.path)]
        keys = await self._usable(project_id, {(box.subject, box.key) for box in boxes}) if boxes else {}
        return [self._unsealed(project_id, value, where, keys) for value, where in values]

    async def _usable(self, project_id: str, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], AESGCM]:
        """Those of the wanted keys that the database has now."""
        rings = self._remembered(project_id, {subject for subject, _ in wanted})
        stored = await self._look(project_id, rings)
        project, keys = self._projects[project_id], {}
        for subject, number in wanted:
            wrapped, known = stored.get((subject, number)), rings[subject].keys
            if wrapped is None:
                known.pop(number, None)
                continue
            keys[subject, number] = known.get(number) or project.unwrap(subject, number, wrapped)
            # By its name, and not the one that was there before: that may have been given up meanwhile.
            ring = self._rings.get((project_id, subject)) or _Ring({})
            ring.keys[number] = keys[subject, number]
            self._remember(project_id, subject, ring)
        return keys

    async def _look(self, project_id: str, subjects: Iterable[str]) -> dict[tuple[str, int], bytes | None]:
        """The keys that these subjects have now. One query at a time in a project: who asks while one is on its way
        shares the next, for that one began before."""
        look = self._looks.get(project_id)
        if look is None:
            look = self._looks[project_id] = _Look(set())
            look.job = asyncio.create_task(self._look_now(project_id))
        look.subjects.update(subjects)
        assert look.job is not None
        return await asyncio.shield(look.job)

    async def _look_now(self, project_id: str) -> dict[tuple[str, int], bytes | None]:
        async with self._looking.setdefault(project_id, asyncio.Lock()):
            look = self._looks.pop(project_id)
            values = {"project_id": project_id.encode(), "subjects": texts(look.subjects)}
            with store_errors():
                async with self._pool.connection() as connection:
                    rows = await _find_data_keys.fetch(connection, values)
        return {(subject, number): wrapped for subject, number, wrapped, _ in rows}

    def _unsealed(self, project_id: str, value: Any, where: Place, keys: dict[tuple[str, int], AESGCM]) -> Any:
        _, place = self._at(project_id, where)

        def opened(marked: dict[str, Any], at: str) -> Any:
            box = _box(marked, where, at)
            key = keys.get((box.subject, box.key))
            if key is None:
                return {ERASED: True}
            try:
                plain = key.decrypt(_bytes(box.nonce), _bytes(box.box), place + at.encode())
            except (InvalidTag, ValueError):
                raise _broken(where, at) from None
            return msgspec.json.decode(plain)

        return replaced(value, SEALED, where.path, opened)

    # Erasing

    async def retire(self, project_id: str, pseudonym: str) -> int:
        """Have nothing more sealed under the keys that a subject has now; the number of the last of them, 0 for none.

        What they sealed opens as before. A process that has one in memory goes on with it until it gives it up. Whoever
        asks holds up all who write to a ledger: it ends within RETIRE_SECONDS_MAX.
        """
        try:
            async with asyncio.timeout(RETIRE_SECONDS_MAX):
                rows = await self._query(SQL.retire_data_keys, project_id, subject=pseudonym)
        except TimeoutError as error:
            raise StoreUnavailable(why="The database of the keys did not answer in time") from error
        number: int = rows[0][0]
        return number

    def give_up(self, project_id: str, pseudonyms: Iterable[str]) -> None:
        """Forget what is in memory of these subjects: their keys were retired."""
        for pseudonym in pseudonyms:
            self._rings.pop((project_id, pseudonym), None)
            self._recent.pop((project_id, pseudonym), None)
            self._given_up += 1

    def give_up_all(self, project_id: str) -> None:
        """Forget what is in memory of a project's subjects: keys of any may have been retired."""
        self.give_up(project_id, [name for project, name in list(self._rings) if project == project_id])
        self._given_up += 1

    async def destroy(self, project_id: str, erased: Mapping[str, int]) -> int:
        """Destroy the keys of these subjects (pseudonyms), each up to a number; how many were there still.

        Durable on return: from then on nothing that any of them sealed is opened again, in whatever process.
        """
        values = {"subjects": list(erased), "through": list(erased.values())}
        return len(await self._query(SQL.destroy_data_keys, project_id, **values))

    async def first_keys(self, project_id: str, pseudonyms: Iterable[str]) -> dict[str, int]:
        """The number of the oldest key that each of these subjects has still; those that have none are not named."""
        first: dict[str, int] = {}
        rows = await self._query(SQL.find_data_keys, project_id, subjects=list(pseudonyms))
        for subject, number, wrapped, _ in rows:
            if wrapped is not None:
                first[subject] = min(number, first.get(subject, number))
        return first

    async def undestroyed(self) -> dict[str, list[str]]:
        """The subjects (pseudonyms) that have retired keys which are there still, by project."""
        found: dict[str, list[str]] = {}
        for project_id, pseudonym in await self._query(SQL.find_retired):
            found.setdefault(project_id, []).append(pseudonym)
        return found

    def _opened(self, project_id: str) -> ProjectKey:
        key = self._projects.get(project_id)
        if key is None:
            raise UnusableKey(f"Project {project_id} is not open in this vault: open() it first.")
        return key

    def _at(self, project_id: str, where: Place) -> tuple[ProjectKey, bytes]:
        if where.project_id != project_id:
            raise ValueError(f"a place in {where.project_id} is none in project {project_id}")
        return self._opened(project_id), where.encoded()

    def _remembered(self, project_id: str, names: Iterable[str]) -> dict[str, _Ring]:
        """What is in memory of these subjects; an empty ring where nothing is."""
        rings = {}
        for name in names:
            ring = self._rings.get((project_id, name))
            rings[name] = ring or _Ring({})
            if ring:
                self._remember(project_id, name, ring)
        return rings

    def _remember(self, project_id: str, name: str, ring: _Ring) -> None:
        self._rings[project_id, name] = self._recent[project_id, name] = ring
        self._recent.move_to_end((project_id, name))
        if len(self._recent) > self._subjects_max:
            self._recent.popitem(last=False)

    async def _find(self, project: ProjectKey, names: Iterable[str]) -> dict[str, _Ring]:
        """What the database holds of these subjects, kept in memory from now on."""
        rings = {name: _Ring({}) for name in names}
        while True:
            given_up = self._given_up
            rows = await self._query(SQL.find_data_keys, project.project_id, subjects=list(rings))
            if given_up == self._given_up:
                break  # else what was read may be older than that a key was retired
        for name, number, wrapped, retired in rows:
            ring = rings[name]
            ring.last = max(ring.last, number)
            if wrapped is not None and not retired:
                ring.keys[number] = project.unwrap(name, number, wrapped)
                ring.current = max(ring.current, number)
        for name in {name for name, ring in rings.items() if ring.keys}:
            self._remember(project.project_id, name, rings[name])
        return rings

    async def _query(self, sql: Any, project_id: str = "", **values: Any) -> list[tuple[Any, ...]]:
        """Run one statement, committed on return."""
        with store_errors():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(sql, {"project_id": project_id, **values}, prepare=True)
                return await cursor.fetchall() if cursor.description else []


def _box(marked: dict[str, Any], where: Place, at: str) -> _Box:
    try:
        return msgspec.convert(marked, _Sealed).inner
    except msgspec.ValidationError:
        raise _broken(where, at) from None


def _broken(where: Place, at: str) -> BrokenSeal:
    return BrokenSeal(
        f"The sealed value at {at} of event {where.event_id} (project {where.project_id}, stream "
        f"{where.stream_id}, version {where.stream_version}) does not open there: it was altered, "
        "or moved from another place."
    )


def _base64(content: bytes) -> str:
    return binascii.b2a_base64(content, newline=False).decode()


def _bytes(text: str) -> bytes:
    """The bytes behind `text`, which must be their one base64 form (RFC 4648 s3.5)."""
    content = binascii.a2b_base64(text, strict_mode=True)
    if _base64(content) != text:
        raise ValueError("not canonical base64")
    return content
