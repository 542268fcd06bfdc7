"""The suite that the author of a backend runs: ``spir check BACKEND``, or `checks` under pytest.

It needs the extra ``conformance``. See ``docs/conformance.md``.
"""

from __future__ import annotations

from spir.conformance.suite import Check, Report, Row, check, checks

__all__ = ["Check", "Report", "Row", "check", "checks"]
