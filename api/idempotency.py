"""The copy of receipts in Redis: it makes replays quicker and nothing else (SPEC, "Idempotency, exactly").

The ledger is the truth. What Redis says is believed only under the project's own MAC, made over the very
command that is asked now; so a copy that is lost, stale, forged or mixed up is no copy, and the committer
answers. Receipts are kept as they are: personal values stay sealed. A Redis error never reaches a caller,
and after one Redis is left alone for a while.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ledger.batch import RULES
from ledger.commands import COMMANDS
from ledger.errors import ERRORS
from ledger.operations import OPERATIONS
from ledger.receipt import Receipt
from ledger.subjects import OF_SUBJECTS
from ledger.vault import Vault

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 0.2
REST_SECONDS = 5.0
RECEIPT_BYTES_MAX = 64 * 1024
UNWRITTEN_MAX = 10_000
MAC_BYTES = 32

_STATES = {command.__name__: RULES[command.stream_type][1] for command in (*COMMANDS, *OPERATIONS, *OF_SUBJECTS)}
_encode = msgspec.json.Encoder(enc_hook=lambda refusal: (refusal.code, refusal.params)).encode
_decode = msgspec.json.Decoder(Receipt, dec_hook=lambda _, said: ERRORS[said[0]](**said[1])).decode


class Asked(NamedTuple):
    """One command as its sender means it; `fingerprint` is what the ledger compares it by."""

    project_id: str
    ledger_id: UUID
    principal: str
    command_id: str
    fingerprint: bytes

    def key(self) -> bytes:
        scope = _framed(self.project_id.encode(), self.principal.encode(), self.command_id.encode())
        return b"idempotency:" + sha256(scope).hexdigest().encode()


class Copy:
    """See the module. `find` waits for two round trips at most; `keep` never waits."""

    def __init__(self, redis_url: str, vault: Vault, *, ttl_seconds: int) -> None:
        # redis-py's own defaults would hold a request for seconds on a server that is gone.
        self._redis = Redis.from_url(
            redis_url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._vault = vault
        self._ttl_seconds = ttl_seconds
        self.replays = 0
        self._rests_until = 0.0
        self._wanted: dict[bytes, asyncio.Future[Any]] = {}
        self._unwritten: dict[bytes, bytes] = {}
        self._job: asyncio.Task[None] | None = None

    async def find(self, asked: Sequence[Asked]) -> list[Receipt | None]:
        """The receipts of those that were answered before and are still here."""
        if time.monotonic() < self._rests_until:
            return [None] * len(asked)
        new = asyncio.get_running_loop().create_future
        values = [self._wanted.setdefault(one.key(), new()) for one in asked]
        self._work()
        found = [self._believed(one, await asyncio.shield(value)) for one, value in zip(asked, values, strict=True)]
        self.replays += sum(receipt is not None for receipt in found)
        return found

    def keep(self, asked: Asked, receipt: Receipt) -> None:
        """Have `receipt` copied if Redis is well; a large one is not worth it."""
        if time.monotonic() < self._rests_until or len(self._unwritten) >= UNWRITTEN_MAX:
            return
        payload = _encode(receipt)
        if len(payload) <= RECEIPT_BYTES_MAX:
            self._unwritten[asked.key()] = self._mac(asked, payload) + payload
            self._work()

    async def connected(self) -> bool:
        """Whether Redis answers now."""
        try:
            async with asyncio.timeout(2 * TIMEOUT_SECONDS):
                return bool(await self._redis.ping())
        except Exception:  # noqa: BLE001 - whatever it was, the answer is no
            return False

    async def close(self) -> None:
        """Write what is unwritten, and disconnect."""
        if self._job is not None:
            await self._job
        await self._redis.aclose()

    def _mac(self, asked: Asked, payload: bytes) -> bytes:
        content = _framed(b"receipt copy 1", asked.key(), asked.ledger_id.bytes, asked.fingerprint, payload)
        return self._vault.fingerprint(asked.project_id, content)

    def _believed(self, asked: Asked, value: Any) -> Receipt | None:
        if not isinstance(value, bytes) or not hmac.compare_digest(
            value[:MAC_BYTES], self._mac(asked, value[MAC_BYTES:])
        ):
            return None
        try:
            receipt = _decode(value[MAC_BYTES:])
            state = msgspec.convert(receipt.state, _STATES[receipt.type] | None)
        except (msgspec.MsgspecError, LookupError, TypeError, ValueError):
            return None  # of another release, which knows other types or errors
        return msgspec.structs.replace(receipt, state=state, replayed=True)

    def _work(self) -> None:
        if self._job is None or self._job.done():
            self._job = asyncio.create_task(self._exchange())

    async def _exchange(self) -> None:
        """One round trip after another while there is something to ask or to write; one in flight."""
        while self._wanted or self._unwritten:
            wanted, self._wanted = self._wanted, {}
            unwritten, self._unwritten = self._unwritten, {}
            values: dict[bytes, Any] = {}
            try:
                async with asyncio.timeout(2 * TIMEOUT_SECONDS):
                    values = await self._round_trip(list(wanted), unwritten)
            except Exception as error:  # noqa: BLE001 - it never reaches a caller; the ledger answers
                self._rests_until = time.monotonic() + REST_SECONDS
                log.warning("Redis does not answer (%r): without it for %.0f s", error, REST_SECONDS)
            finally:
                for key, future in wanted.items():
                    future.set_result(values.get(key))

    async def _round_trip(self, wanted: list[bytes], unwritten: dict[bytes, bytes]) -> dict[bytes, Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for key, value in unwritten.items():
            pipeline.set(key, value, ex=self._ttl_seconds)
        for key in wanted:
            pipeline.get(key)
        answers = await pipeline.execute(raise_on_error=False)
        return dict(zip(wanted, answers[len(unwritten) :], strict=True))


def _framed(*parts: bytes) -> bytes:
    """The parts one after another, each behind its length, so that no two lists of parts look alike."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)
