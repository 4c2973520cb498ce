"""TensorRT's rules, without TensorRT. See README.md beside this file."""

from deploycli.exporters.lint.report import AttentionBlock, Finding, LintReport
from deploycli.exporters.lint.rules import RULES, Rule, lint

__all__ = ["RULES", "AttentionBlock", "Finding", "LintReport", "Rule", "lint"]
