"""Whether it works."""

from typing import Any

ROUTES: list[Any] = []
