"""Every family, cast: valid, minimal, within its budget in the simulation, and taken by the rules of the parser."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.compare import BUDGETS, compare
from exporters.onnx_file import load_model
from exporters.precision.cast import cast
from exporters.precision.policy import REDUCED_TYPES, Policy
from exporters.precision.simulate import open_runtime
from exporters.rewrite.names import name_nodes
from exporters.rewrite.pipeline import rewrite
from exporters.runtimes import OrtRuntime
from exporters.tensorrt.lint import lint
from exporters.trace import trace
from exporters.rewrite.unique import MODULE_KEY
from exporters.onnx_file import write_model
from tests.exporters.precision.casts import check, check_casts, check_ends
from tests.models import crossformers, swins, vits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
