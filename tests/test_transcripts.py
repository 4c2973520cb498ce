"""What the READMEs show is what the commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt.library import has_driver, is_installed
from tests.deploycli.commands import in_this_process
from tests.transcripts import TERMINAL, run_all, same, summary

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(not is_installed(RTX), reason="the READMEs compile with TensorRT for RTX, which is not installed")
@pytest.mark.skipif(has_driver(), reason="the READMEs show what a machine without a GPU prints")
def test_console_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    command = in_this_process(monkeypatch, capfd)
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)

    def call(arguments: list[str]) -> tuple[int, str, str]:
        found = command(*arguments)
        return found.code, found.out, found.err

    for block, shown, code, lines in run_all(call):
        printed = "\n".join(lines)
        assert code == shown.code, f"{block.place}: {shown.line}: exit {code}\n{printed}"
        if shown.shown:
            assert same(shown.shown, lines), f"{block.place}: {shown.line} prints\n{printed}"
    print(summary())


@pytest.mark.parametrize(
    ("shown", "printed", "alike_"),
    [
        (["rel. 5.9e-07  1/1 (1)  ok"], ["rel. 6.2e-07   1/1 (1)   ok"], True),
        (["rel. 5.9e-07  budget 1e-04"], ["rel. 5.9e-07  budget 1e-03"], False),
        (["313 nodes"], ["314 nodes"], False),
        (["a", "...", "z"], ["a", "b", "c", "z"], True),
        (["a", "...", "z"], ["a", "b", "c"], False),
        (["a"], ["a", "b"], False),
        (["built in 5 s by 1.7.1.116"], ["built in 61 s by 1.8.0.2"], True),
    ],
)
def test_figures_that_vary_are_all_that_may_differ(shown: list[str], printed: list[str], alike_: bool) -> None:
    assert same(shown, printed) is alike_
