"""The values that commands ask for and facts are made of: times, lines of text, references, people, actions.

Their bounds are part of the contract (SPEC s3, s4), and their field names stand in the bytes of entries for ever.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from msgspec import Meta, Struct

Stamp = str
"""A time as it is stored and shown: `YYYY-MM-DDTHH:MM:SS.ffffffZ`. Fixed width, so stamps sort as text."""

ONE_LINE = r"^[^\x00-\x1f\x7f]*$(?!\n)"
"""In Python `$` also matches before a last line feed, and JSON Schema has no `\\Z`: so every pattern ends like this."""

Line = Annotated[str, Meta(min_length=1, max_length=255, pattern=ONE_LINE)]
"""One line of text without control characters: names, roles, the caller's own ids."""

Json = dict[str, Any]


def stamp(moment: datetime) -> Stamp:
    """`moment` (aware) as a Stamp."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def moment(text: Stamp) -> datetime:
    """The aware datetime behind a Stamp. Raises ValueError for anything else."""
    if len(text) != 27 or text[10] != "T" or text[-1] != "Z":
        raise ValueError(f"{text!r} is no stamp")
    return datetime.fromisoformat(text)


class Ref(Struct, frozen=True, forbid_unknown_fields=True):
    """A thing of the caller's world that this is about, such as `invoice:9`. Searchable."""

    type: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f:]*$(?!\n)")]
    id: Line


class Principal(Struct, frozen=True):
    """One person or one machine, compared exactly (SPEC §3)."""

    issuer: str
    sub: str

    @classmethod
    def of(cls, who: "Actor | Voter") -> "Principal":
        return cls(who.issuer, who.sub)

    def __str__(self) -> str:
        """`issuer#sub`: one text per person, since an issuer has no fragment (OpenID Connect Discovery s3)."""
        return f"{self.issuer}#{self.sub}"


class Actor(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who did it, as authenticated; never what the caller says of itself."""

    issuer: str
    sub: str
    kind: Literal["human", "agent", "service", "system"]
    assurance: Literal["authenticated", "asserted", "imported"]
    roles: tuple[str, ...] = ()
    client: str | None = None
    on_behalf_of: tuple[Principal, ...] = ()
    name: Any = None
    auth_time: int | None = None
    acr: str | None = None
    amr: tuple[str, ...] = ()

    @property
    def principal(self) -> str:
        """The Principal as one text; made here, for every command needs it."""
        return f"{self.issuer}#{self.sub}"


SYSTEM = Actor(issuer="muniment", sub="system", kind="system", assurance="authenticated")
"""The actor of what nobody asked for: expiry and reactions."""


class AgentDescription(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an agent says it is. Asserted by the caller, and never mixed with the authenticated actor."""

    name: Line | None = None
    version: Line | None = None
    provider: Line | None = None
    model: Line | None = None
    instructions_digest: "Digest | None" = None
    tools_digest: "Digest | None" = None
    policy_digest: "Digest | None" = None


Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$(?!\n)")]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]


class Cost(Struct, frozen=True, forbid_unknown_fields=True):
    """Money, as a decimal string: a binary fraction cannot hold a cent."""

    amount: Annotated[str, Meta(pattern=r"^-?[0-9]{1,30}(\.[0-9]{1,30})?$(?!\n)")]
    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$(?!\n)")]


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a model call used, in tokens."""

    provider: Line | None = None
    model: Line | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cached_input_tokens: Count | None = None
    reasoning_tokens: Count | None = None
    cost: Cost | None = None


class Artifact(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A file kept elsewhere; its digest makes it part of the evidence."""

    uri: Annotated[str, Meta(min_length=1, max_length=2048, pattern=ONE_LINE)] | None = None
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")] | None = None
    media_type: Line | None = None
    size_bytes: Count | None = None
    name: Line | None = None


class Action(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is to be run, exactly: a tool with its arguments."""

    tool: Line
    arguments: Any = None
    operation: Line | None = None
    target: Line | None = None


class Quorum(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many must approve, how many denials end it, and which roles make eligible."""

    approve: Annotated[int, Meta(ge=1, le=20)] = 1
    deny: Annotated[int, Meta(ge=1, le=20)] = 1
    roles: Annotated[tuple[Line, ...], Meta(min_length=1, max_length=16)] = ("approver",)


Risk = Literal["low", "medium", "high", "critical"]


class Voter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose vote an importer brings, and the record that shows it."""

    issuer: Line
    sub: Line
    evidence: UUID | None = None


Asked = Literal["rebuild", "rollback", "verify", "retry", "skip"]
"""What operators ask of a view."""


class Replayed(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a view was compared with: a replay of ledgers that had these heads, by that code.

    `heads_digest` and `digest` are over all of them: each one's project, ledger and position, and each one's digest.
    `projects` says how many they were, where that was counted; `drifted` in how many values the view differed.
    """

    code_version: str
    heads_digest: str
    digest: str
    rows: int
    projects: int | None = None
    drifted: int = 0
    drifted_projects: tuple[str, ...] = ()
