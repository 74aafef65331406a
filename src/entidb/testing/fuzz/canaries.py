"""What must never be seen in an answer for another database."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

# ---------------------------------------------------------------- canaries


class Canary:
    """A text that one database contains and no other; ``value`` goes into its entities."""

    def __init__(self, seed: int) -> None:
        self.text = "canary" + hashlib.sha256(str(seed).encode()).hexdigest()[:32]
        self.entity_id = hashlib.sha256(self.text.encode()).digest()[:16]

    @property
    def value(self) -> dict[str, str]:
        return {"secret": self.text}

    def sings_in(self, data: bytes) -> bool:
        """Whether the text or the id is in ``data`` (unpacked), as it is, as hex or as base64."""
        raw, entity = self.text.encode(), self.entity_id
        forms = (raw, entity, raw.hex().encode(), entity.hex().encode(), base64.b64encode(raw))
        return any(form in data for form in forms)


def leaks(data: bytes, canaries: Iterable[Canary]) -> list[str]:
    """The texts of those canaries that are in ``data``."""
    return [canary.text for canary in canaries if canary.sings_in(data)]
