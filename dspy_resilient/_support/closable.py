"""`with` and `async with` for what has `close` and `aclose`. It closes nothing by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self


class ClosedAtEnd:
    """Something that is closed at the end of a block, where that is an event loop without blocking."""

    if TYPE_CHECKING:

        def close(self) -> None: ...

        async def aclose(self) -> None: ...

    def __enter__(self) -> Self:
        """Return this object; it is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    async def __aenter__(self) -> Self:
        """Return this object; it is closed at the end of the block."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.aclose()
