"""CRC-32 of what a store keeps, as fast as this machine has it.

Every record that is read or written goes through this, and for the short ones that entities are
``zlib`` takes three times as long as ISA-L, which has the processor multiply polynomials. Both give
the same numbers (ISO 3309, RFC 1952 section 8), so files do not depend on which one is there.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
