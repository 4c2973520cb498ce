"""Pictures for the quantiser of ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxruntime.quantization import CalibrationDataReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt


class Batches(CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """Batches of ``images``, one after the other.

    Args:
        batches: of shape [B, 3, H, W].
    """

    def __init__(self, batches: Iterable[npt.NDArray[Any]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """Return the next one by the name of the input; None at the end."""
        images = next(self._batches, None)
        return None if images is None else {"images": images}
