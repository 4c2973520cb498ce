"""TensorRT's rules, without TensorRT: what its parser or builder refuses, and what makes a slow engine.

It imports graph and target. One more rule is a function from a `subject.Subject` to problems, and its line in
`rules.RULES`.
"""

from deploycli.exporters.lint.report import AttentionBlock, Finding, LintReport
from deploycli.exporters.lint.rules import RULES, Rule, lint

__all__ = ["RULES", "AttentionBlock", "Finding", "LintReport", "Rule", "lint"]
