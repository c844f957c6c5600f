"""Who may do what over HTTP: bearer tokens from the environment, and the names a server answers to.

Without tokens only loopback may be bound, and whoever is there may do everything but trade again after a halt: a kill
switch that nobody can reach is none, and who resets it is known.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from serving.errors import ServingError

READ_TOKEN = "DETENT_READ_TOKEN"  # noqa: S105 - the name of a variable
DECIDE_TOKEN = "DETENT_DECIDE_TOKEN"  # noqa: S105
OPERATOR_TOKEN = "DETENT_OPERATOR_TOKEN"  # noqa: S105
MIN_TOKEN = 16
"""Characters of a token."""
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")

_TOKEN = re.compile(r"[!-~]+")


class Role(IntEnum):
    """What a caller may do; each includes those before it."""

    PUBLIC = 0
    """Health, the page without its data, the OpenAPI document."""
    READ = 1
    """Everything that changes no trading state; inference too, since nothing comes of it."""
    DECIDE = 2
    """Ask for decisions."""
    OPERATOR = 3
    """Kill switch, reduce-only, reset."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Tokens:
    """One secret per role, or none at all."""

    read: str | None = None
    decide: str | None = None
    operator: str | None = None
    _digests: tuple[tuple[Role, bytes], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        named = {READ_TOKEN: self.read, DECIDE_TOKEN: self.decide, OPERATOR_TOKEN: self.operator}
        given = {name: token for name, token in named.items() if token is not None}
        for name, token in given.items():
            # The text of a secret belongs in no message.
            if len(token) < MIN_TOKEN or not _TOKEN.fullmatch(token):
                raise ServingError(
                    f"{name}: expected {MIN_TOKEN} or more visible ASCII characters without spaces, "
                    f"was a text of {len(token)}"
                )
        if len(set(given.values())) != len(given):
            raise ServingError(f"{', '.join(given)}: expected different tokens, was one twice")
        if given and self.operator is None:
            raise ServingError(
                f"{OPERATOR_TOKEN}: expected one beside {', '.join(given)}, or nobody could halt trading; was none"
            )
        roles = ((Role.READ, self.read), (Role.DECIDE, self.decide), (Role.OPERATOR, self.operator))
        digests = tuple((role, _digest(token.encode("ascii"))) for role, token in roles if token is not None)
        object.__setattr__(self, "_digests", digests)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Tokens:
        """Tokens by the variables `DETENT_READ_TOKEN`, `DETENT_DECIDE_TOKEN` and `DETENT_OPERATOR_TOKEN`.

        Raises: ServingError for a token that is short, holds spaces, or is used twice, and without one for operators.
        """
        return cls(read=environ.get(READ_TOKEN), decide=environ.get(DECIDE_TOKEN), operator=environ.get(OPERATOR_TOKEN))

    @property
    def required(self) -> bool:
        """Whether callers must show a token."""
        return self.operator is not None

    def role(self, authorization: bytes | None) -> Role:
        """The role of an Authorization header: PUBLIC without a known token, OPERATOR where none is needed."""
        if not self.required:
            return Role.OPERATOR
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return Role.PUBLIC
        # Digests, and all of them: the time taken tells neither length nor prefix nor role.
        shown, found = _digest(token.strip()), Role.PUBLIC
        for role, digest in self._digests:
            if hmac.compare_digest(digest, shown):
                found = role
        return found


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, tokens: Tokens) -> None:
    """Raise ServingError where a service without tokens would be open to other machines."""
    if not tokens.required and not is_loopback(host):
        raise ServingError(
            f"host: expected a loopback address while {OPERATOR_TOKEN} is not set, was {host!r}: "
            "anyone who reaches it could trade"
        )


def host_name(header: bytes) -> str:
    """The name in a Host header, without port and brackets, in lower case."""
    text = header.decode("latin-1").strip().lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.rstrip(".")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
