"""Request and reply over the two streams, for clients that ask for one decision at a time."""

from __future__ import annotations

import time
from typing import Any, cast

from serving.records import DecisionRecord, DecisionRequest, decode_record, encode
from serving.stream.output import DECISION_FIELD, EVENT_FIELD
from serving.stream.settings import StreamSettings

_PAGE = 500
# A wait that no client's socket time-out cuts off.
_BLOCK_S = 1.0

# KEYS: features, decisions. ARGV: request. Returns where the decisions end before the request is there.
_ASK = """
local last = '0-0'
local info = redis.pcall('XINFO', 'STREAM', KEYS[2])
if not info.err then
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last = info[i + 1] end
  end
end
redis.call('XADD', KEYS[1], '*', 'request', ARGV[1])
return last
"""


def ask(client: Any, settings: StreamSettings, request: DecisionRequest, timeout_s: float) -> DecisionRecord:
    """Put a request on the feature stream and wait for its decision on the other.

    An event that was decided on before gets its decision again, if the stream still has it, after the time-out.

    Args: client: `redis.Redis` without `decode_responses`; timeout_s: seconds.
    Raises: TimeoutError without a decision in time: it may still come; redis.RedisError.
    """
    deadline = time.monotonic() + timeout_s
    key, wanted = settings.decisions, request.event_id.encode()
    last = client.eval(_ASK, 2, settings.features, key, encode(request))
    while (left := deadline - time.monotonic()) > 0.0:
        for _, messages in client.xread({key: last}, block=max(1, int(1e3 * min(left, _BLOCK_S)))) or ():
            for _, fields in messages:
                if fields.get(EVENT_FIELD) == wanted:
                    return _decision(fields)
            last = messages[-1][0]
    newest = "+"
    while messages := client.xrevrange(key, max=newest, count=_PAGE):
        for _, fields in messages:
            if fields.get(EVENT_FIELD) == wanted:
                return _decision(fields)
        newest = f"({messages[-1][0].decode()}"
    raise TimeoutError(f"event {request.event_id}: expected a decision on {key} within {timeout_s:g} s, was none")


def _decision(fields: dict[bytes, bytes]) -> DecisionRecord:
    return cast(DecisionRecord, decode_record(fields[DECISION_FIELD]))
