"""A static lint: what TensorRT's ONNX parser would refuse, and what would make a slow engine, without TensorRT."""

from exporters.tensorrt.lint.report import AttentionBlock, Finding, LintReport
from exporters.tensorrt.lint.rules import RULES, Rule, lint

__all__ = ["RULES", "AttentionBlock", "Finding", "LintReport", "Rule", "lint"]
