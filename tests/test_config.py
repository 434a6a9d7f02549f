"""Settings of any method: what is checked by a field's type, and what comes back from JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Optional

import pytest

from pydefect.config import Settings
from pydefect.errors import InputError


@dataclass(frozen=True)
class Some(Settings):
    TITLE: ClassVar[str] = "Some"
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"limit": (0, 1), "share": (0, 1)}

    limit: Optional[float] = None  # noqa: UP045 - people write it so
    share: float | None = None
    blur: float = 1.5
    count: int = 3
    flag: bool | None = None
    kind: Literal["a", "b"] | None = None
    pairs: tuple[tuple[int, ...], ...] = ((1, 2), (3, 4))
    name: str = ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 2}, "limit: 2 given; allowed are 0 to 1"),
        ({"limit": "a"}, "limit: 'a' given; allowed are 0 to 1"),
        ({"share": -0.5}, "share: -0.5 given; allowed are 0 to 1"),
        ({"share": True}, "share: True given; allowed are 0 to 1"),
        ({"blur": "abc"}, "blur: 'abc' given; allowed are finite numbers"),
        ({"blur": float("nan")}, "blur: nan given; allowed are finite numbers"),
        ({"blur": None}, "blur: None given; allowed are finite numbers"),
        ({"blur": False}, "blur: False given; allowed are finite numbers"),
        ({"count": 2.5}, "count: 2.5 given; allowed are whole numbers"),
        ({"count": True}, "count: True given; allowed are whole numbers"),
        ({"kind": "zzz"}, "kind: 'zzz' given; allowed are 'a', 'b'"),
        ({"flag": 1}, "flag: 1 given; allowed are True, False"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Some(**settings)


def test_what_comes_back_from_json_is_equal() -> None:
    for one in (Some(), Some(limit=0.5, share=1, blur=-3, count=-2, flag=True, kind="b", pairs=((5,), ()))):
        back = Some.from_dict(json.loads(json.dumps(one.to_dict())))
        assert back == one
        assert hash(back) == hash(one)
    assert isinstance(Some(blur=2).blur, float)
