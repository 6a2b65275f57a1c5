"""The native module or its Python twin: the same names, the same answers, chosen by the caller.

`parts(pure)` gives the drain, the tree, the decoder, the index and the scan of one of the two. The
native module is optional; without it, or with ``FANWISE_PURE=1``, the twin runs.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from fanwise._errors import FeatureMissing

from ._pure_scan import open_long

__all__ = ["Parts", "open_long", "parts", "why_pure"]


class Parts(NamedTuple):
    """The parts that exist twice; ``name`` is "native" or "pure"."""

    name: str
    Drain: Any
    Tree: Any
    Decoder: Any
    Index: Any
    scan_dirs: Callable[..., Any]
    mark_dirs: Callable[..., Any]
    present_in: Callable[..., Any]
    mount_at: Callable[..., int]


def why_pure() -> str | None:
    """Say why the Python twin would run by default, or None when the native module would."""
    if os.environ.get("FANWISE_PURE") == "1":
        return "FANWISE_PURE=1"
    try:
        import fanwise.kernel._native  # noqa: F401 - only whether it loads
    except ImportError as error:
        return f"the native module does not load: {error}"
    return None


def parts(pure: bool | None = None) -> Parts:
    """Choose: True the Python twin, False the native module, None the native one if it is there.

    Raises FeatureMissing when the native module is asked for and does not load.
    """
    reason = why_pure() if pure is None or pure is False else "asked for"
    if pure is False and reason not in (None, "FANWISE_PURE=1"):
        raise FeatureMissing(
            "fanwise.kernel._native", str(reason), "install a C compiler and build fanwise again"
        )
    if pure is not False and reason is not None:
        from . import _pure_decode, _pure_drain, _pure_index, _pure_scan, _pure_tree

        return Parts(
            "pure",
            _pure_drain.Drain,
            _pure_tree.Tree,
            _pure_decode.Decoder,
            _pure_index.Index,
            _pure_scan.scan_dirs,
            _pure_scan.mark_dirs,
            _pure_scan.present_in,
            _pure_scan.mount_at,
        )
    from . import _native

    return Parts(
        "native",
        _native.Drain,
        _native.Tree,
        _native.Decoder,
        _native.Index,
        _native.scan_dirs,
        _native.mark_dirs,
        _native.present_in,
        _native.mount_at,
    )
