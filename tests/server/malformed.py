"""Malformed bodies and malformed requests, made from sound ones and reproducible by seed."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import contains
from random import Random
from typing import Any

from server.transport.http_protocol import MAX_PIPELINED

JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "Hi"}]
SOUND: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/generate"): {"prompt": "x", "adapter": ["math", "safety"], "weights": [1, 0.5], "max_tokens": 2, "stop": "\n"},
    ("POST", "/v1/completions"): {"model": "math:1+safety:0.8", "prompt": ["a", "b"], "max_tokens": 2, "logit_bias": {"5": 1}},
    ("POST", "/v1/chat/completions"): {"model": "safety", "messages": MESSAGES, "max_tokens": 2, "stream_options": None},
    ("POST", "/tokenize"): {"messages": MESSAGES, "return_token_strs": True},
    ("POST", "/detokenize"): {"tokens": [97, 98, 99]},
    ("POST", "/v1/load_lora_adapter"): {"lora_name": "other", "lora_path": "math"},
    ("POST", "/v1/unload_lora_adapter"): {"lora_name": "other"},
    ("POST", "/adapters"): {"hub_id": "someone/something", "name": "other"},
    ("PUT", "/adapters/other/alias"): {"adapter": "math"},
    ("PUT", "/merges/other"): {
        "base_digest": "5" * 64,
        "adapters": [{"reference": "math@0123456789ab", "weight": 0.5, "block_weights": [0.5, 2]}],
        "about": "by hand",
        "scores": {"rows": 0.5},
    },
}
WRONG = ("1e400", "NaN", "-Infinity", '{"a": [null]}', "[[[]]]", "[{}]", "[null]", "[[1, {}], 2]", '["\\ud800"]', "9" * 400)
"""Values that no field may have, in JSON or almost JSON."""


UPGRADE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
"""Headers that offer another protocol."""
FORM = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--'


Body = dict[str, Any]
Spoil = Callable[[Body], bytes]


@dataclass(frozen=True, slots=True)
class Malformed:
    """A request whose body must be refused."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes


class Maker:
    """A source of malformed bodies, reproducible by seed. Few are about `max_bytes` long, since those take long to send."""

    def __init__(self, seed: int, max_bytes: int) -> None:
        self._random, self._max_bytes = Random(seed), max_bytes
        self._kinds: tuple[Spoil, ...] = (
            self._cut, self._flipped, self._wrong_type, self._unknown_field, self._deep, self._not_utf8, self._twice, self._wide,
            self._long_key, self._many_fields, self._mixed, self._no_object, self._digits, self._with_nul, self._rubbish,
        )  # fmt: skip

    def body(self) -> Malformed:
        """Return the next malformed body."""
        (method, path), sound = self._random.choice([*SOUND.items()])
        if self._random.random() < 0.08:
            return Malformed(method, path, *self._not_json(sound))
        kinds = self._kinds if self._random.random() > 0.004 else (self._long,)
        return Malformed(method, path, JSON, self._random.choice(kinds)(sound))

    def _with(self, sound: Body, field: str, value: str) -> bytes:
        others = [f"{json.dumps(key)}: {json.dumps(other)}" for key, other in sound.items() if key != field]
        others.insert(self._random.randint(0, len(others)), f"{json.dumps(field)}: {value}")
        return ("{" + ", ".join(others) + "}").encode()

    def _field(self, sound: Body) -> str:
        return self._random.choice([*sound])

    def _cut(self, sound: Body) -> bytes:
        text = json.dumps(sound).encode()
        return text[: self._random.randrange(len(text))]

    def _flipped(self, sound: Body) -> bytes:
        text = bytearray(json.dumps(sound).encode()[:-1])  # never complete again
        for _ in range(self._random.randint(1, 8)):
            text[self._random.randrange(1, len(text))] = self._random.randrange(256)
        return bytes(text)

    def _wrong_type(self, sound: Body) -> bytes:
        return self._with(sound, self._field(sound), self._random.choice(WRONG))

    def _unknown_field(self, sound: Body) -> bytes:
        return self._with(sound, self._random.choice(("promt", "", "\x00", "__proto__", "\ud800", "a" * 300)), "1")

    def _deep(self, sound: Body) -> bytes:
        depth, (opens, closes) = self._random.randint(2, 3000), self._random.choice((("[", "]"), ('{"a":', "}")))
        return self._with(sound, self._field(sound), opens * depth + "[[]]" + closes * depth)

    def _not_utf8(self, sound: Body) -> bytes:
        text = json.dumps(sound)
        wrong = self._random.choice(
            (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\xef\xbb\xbf" * 2)
        )
        return self._random.choice((text.encode("utf-16"), text.encode("utf-32"), wrong + text.encode()))

    def _twice(self, sound: Body) -> bytes:
        field = self._field(sound)
        return b"{" + json.dumps(field).encode() + b": 1, " + json.dumps(sound).encode()[1:]

    def _wide(self, sound: Body) -> bytes:
        item = self._random.choice(("[]", "{}", "[1]", '""', "0.1", "null"))
        return self._with(sound, self._field(sound), "[[" + ",".join([item] * self._random.randint(300, 20_000)) + "], 1]")

    def _long_key(self, sound: Body) -> bytes:
        return self._with(sound, "k" * self._random.randint(1000, 50_000), "1")

    def _many_fields(self, sound: Body) -> bytes:
        return json.dumps(sound | {f"field-{i}": i for i in range(self._random.randint(65, 5000))}).encode()

    def _mixed(self, sound: Body) -> bytes:
        items = [
            self._random.choice(("1", '"a"', "null", "true", "{}", "[]", "-1", "1e99"))
            for _ in range(self._random.randint(3, 60))
        ]
        return self._with(sound, self._field(sound), "[" + ", ".join([*items, "{}", '"a"']) + "]")

    def _no_object(self, sound: Body) -> bytes:
        values = (None, True, 5, "text", [sound], [], [[sound]], 1e99)
        return json.dumps(self._random.choice(values)).encode()

    def _digits(self, sound: Body) -> bytes:
        return self._with(sound, self._field(sound), self._random.choice("-1") + "9" * self._random.randint(400, 20_000))

    def _with_nul(self, sound: Body) -> bytes:
        return json.dumps(sound).encode().replace(b'"', b'"\x00', 1)

    def _rubbish(self, _: Body) -> bytes:
        return self._random.randbytes(self._random.randint(1, 3000)) + b"\xff"

    def _long(self, sound: Body) -> bytes:
        room = self._max_bytes - 400
        kinds = (
            lambda: json.dumps({"prompt": "a" * room, "adaptor": "math"}),
            lambda: json.dumps({"prompt": "\ud83d" * (room // 6)}),
            lambda: '{"prompt": [' + "1," * (room // 2) + "1]}",
            lambda: '{"tokens": [' + "1e308," * (room // 6) + "1]}",
            lambda: '{"messages": [' + '{"role": "user", "content": ""},' * (room // 40) + "1]}",
            lambda: '{"adapter": ["' + '", "'.join(["a"] * (room // 5)) + '"]}',
            lambda: '{"logit_bias": {' + ", ".join(f'"{i}": 1' for i in range(room // 14)) + "}}",
            lambda: json.dumps(sound) + " " * room + "}",
            lambda: "[" * room,
        )
        return self._random.choice(kinds)().encode()

    def _not_json(self, sound: Body) -> tuple[dict[str, str], bytes]:
        text = json.dumps(sound).encode()
        kinds = (
            ({}, text),
            ({"Content-Type": "text/plain"}, text),
            ({"Content-Type": "application/x-www-form-urlencoded"}, b"prompt=x&max_tokens=2"),
            ({"Content-Type": "multipart/form-data"}, text),
            ({"Content-Type": "multipart/form-data; boundary=b"}, FORM),
            ({"Content-Type": "\xff/json; charset=\xff"}, text),
            ({**JSON, "Content-Encoding": "gzip"}, gzip.compress(text)),
            ({**JSON, "Content-Encoding": "br"}, b"\x0b\x02\x80" + text[:3]),
            (JSON, b""),
        )  # fmt: skip
        return self._random.choice(kinds)


Statuses = frozenset[int]
REFUSED: Statuses = frozenset({400})


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes for a connection of their own, and the answers that they must get."""

    content: bytes
    answers: tuple[Statuses, ...]
    """The allowed statuses of each answer, in order."""
    closes: bool | None
    """Whether the server then closes the connection although the client could still send. None: either is right."""
    is_cut: bool = False
    """Whether only the beginning of `content` is sent, after which the client ends its side."""

    def check(self, statuses: Sequence[int], is_closed: bool) -> str | None:
        """Return the fault of answers with these `statuses`, or None if there is none.

        `is_closed` says whether the server closed a connection whose client had not ended its side. A request that was cut short
        may get fewer answers or none, since its client left, but no others and not in another order.
        """
        expected = self.answers[: len(statuses)] if self.is_cut else self.answers
        if len(statuses) != len(expected) or not all(map(contains, expected, statuses)):
            return f"answered {[*statuses]}, expected {[sorted(each) for each in self.answers]}{' or fewer' * self.is_cut}"
        if not self.is_cut and self.closes not in (None, is_closed):
            return "the connection was closed" if is_closed else "the connection was left open"
        return None


def raw(random: Random, headers: str) -> Raw:
    """Return bytes that are no request, several requests, or an endless one. `headers` end each head that is sound so far."""
    kind = random.choice(raw_kinds(random, headers))
    if random.random() < 0.7:
        return kind
    return replace(kind, content=kind.content[: random.randrange(len(kind.content)) + 1], is_cut=True)


def raw_kinds(random: Random, headers: str) -> tuple[Raw, ...]:
    """Return all kinds of `raw`, none cut short."""
    body = b'{"prompt": "x"}'
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}".encode()
    bad = head + b"Content-Length: 9\r\n\r\n" + b'{"prompt"'
    key = headers.encode()
    long = b"a" * random.randint(330_000, 500_000)  # more than the event loop reads at once plus the 64 KiB that it may buffer
    num_bad, num_good = random.randint(2, MAX_PIPELINED), random.randint(2, MAX_PIPELINED)
    length = random.choice((b"-1", b"abc", b"1e3", b"+15", b"1_5", b"0x15", b"9" * 30))
    chunk = random.choice((b"zz", b"-1", b"F" * 20, b"", b";;;"))
    return (
        # No HTTP.
        _refused(b"\xcd" + random.randbytes(random.randint(1, 5000))),
        _refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(500)),
        _refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.randbytes(40)),
        _refused(b"POST /generate HTTP/9.9\r\n\r\n"),
        _refused(b"G\x00ET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        _refused(b"GET /" + long + b" HTTP/1.1\r\n\r\n", 431),
        _refused(b"GET / HTTP/1.1\r\nX: " + long + b"\r\n\r\n", 431),
        _refused(b"GET /generate\r\n\r\n", 505),
        Raw(b"\r\n" * random.randint(1, 50) + b"POST", (), closes=False),
        # Bodies without a length, with two lengths, or with a wrong one.
        _refused(head + b"No colon\r\n\r\n" + body),
        _refused(head + b"X: a\r\n b\x00\r\n\r\n" + body),
        _refused(head + b"Transfer-Encoding: chunked\r\nContent-Length: 15\r\n\r\n" + body),
        _refused(head + b"Content-Length: 15\r\nContent-Length: 3\r\n\r\n" + body),
        _refused(head + b"Content-Length: " + length + b"\r\n\r\n" + body),
        Raw(head + b"Content-Length: 99\r\n\r\n" + body, (), closes=False),
        Raw(head + b"Content-Length: 3\r\n\r\n" + body, (REFUSED, REFUSED), closes=True),
        _refused(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"\r\n" + body),
        Raw(head + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + body, (), closes=False),
        _refused(head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + body + b"\r\n0\r\n\r\n"),
        _refused(head + b"Transfer-Encoding: gzip\r\n\r\n" + gzip.compress(body)),
        Raw(head + b"Expect: 100-continue\r\nContent-Length: 15\r\n\r\n", (frozenset({100}),), closes=False),
        # Sound requests that cannot be served.
        Raw(head + UPGRADE + b"\r\n", (REFUSED,), closes=None),
        Raw(head + UPGRADE + b"Content-Length: 9\r\n\r\n" + b'{"prompt"', (REFUSED,), closes=None),
        Raw(head + UPGRADE + b'Transfer-Encoding: chunked\r\n\r\n9\r\n{"prompt"\r\n0\r\n\r\n', (REFUSED,), closes=None),
        Raw(head + UPGRADE + b"Content-Length: 99\r\n\r\n" + body, (), closes=False),
        Raw(b"GET /generate HTTP/1.1\r\nHost: x\r\n" + key + UPGRADE + b"\r\n", (frozenset({405}),), closes=None),
        Raw(b"GET /../../etc/passwd%00 HTTP/1.1\r\nHost: x\r\n" + key + b"\r\n", (frozenset({404}),), closes=False),
        Raw(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + key + b"\r\n", (frozenset({400, 404, 405}),), closes=None),
        # Several requests.
        Raw(bad * num_bad, (REFUSED,) * num_bad, closes=False),
        Raw(bad * 40, (*(REFUSED,) * (MAX_PIPELINED + 1), frozenset({429})), closes=True),
        Raw(bad + b"\xcd" + random.randbytes(300), (REFUSED, REFUSED), closes=True),
        Raw(
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * num_good + b"rubbish\r\n\r\n",
            (*(frozenset({200}),) * num_good, REFUSED),
            closes=True,
        ),
    )


def _refused(content: bytes, *statuses: int) -> Raw:
    return Raw(content, (frozenset(statuses or REFUSED),), closes=True)
