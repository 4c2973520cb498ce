"""deploycli list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deploycli.console import print_json, stdout, table_of
from deploycli.models.errors import UsageError
from deploycli.options import json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.models.variants import Variant


@click.command("list")
@click.argument("pattern", required=False)
@json_option
def command(pattern: str | None, as_json: bool) -> int:
    """List the models that have a name; PATTERN is a part of a name, or a glob.

    \b
    Examples:
      deploycli list
      deploycli list 'swin_*_384'
    """
    from deploycli.models.registry import variants

    found = variants(pattern)
    if not found:
        raise UsageError(f"no model matches {pattern!r}", hint="deploycli list, for all of them")
    if as_json:
        print_json(
            [
                {
                    "name": variant.name,
                    "aliases": list(variant.aliases),
                    "summary": variant.summary,
                    "spec": variant.spec.to_json(),
                    "preprocessing": variant.preprocessing and variant.preprocessing.to_json(),
                    "pretrained": variant.pretrained and variant.pretrained.repo,
                }
                for variant in found
            ]
        )
    else:
        show_variants(found)
    return 0


def show_variants(variants: Sequence[Variant]) -> None:
    """Print the table of models."""
    table = table_of("model", "summary", "image", "also called")
    for variant in variants:
        _, height, width = variant.spec.inputs[0].shape
        table.add_row(variant.name, variant.summary, f"{height}x{width}", ", ".join(variant.aliases[:1]))
    stdout().print(table)
